"""Whether words can still be reached: probability and rank where rows say them, and whether they are generated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .concepts import Occurrence
from .odds import Odds, Pairs


@dataclass(frozen=True, kw_only=True)
class Reach:
    """
    Of each occurrence of a word in given rows.

    Args:
        log_probs (`Tensor`):
            `(O,)` float64: log-probability of the whole word, given all that comes before it.
        ranks (`Tensor`):
            `(O,)`: tokens that are likelier than the word's own, at that of its tokens where they are most; 0 where
            greedy decoding that has come there says the word.
        tokens (`Tensor`):
            `(O,)`: tokens of the word.
    """

    log_probs: Tensor
    ranks: Tensor
    tokens: Tensor

    def summary(self) -> dict[str, Any]:
        """
        Median and largest probability, perplexity of the words' tokens, share of occurrences
        that greedy decoding says, lowest rank; and the log-probability of each occurrence.
        """
        return {
            "occurrences": len(self.log_probs),
            "median_probability": float(self.log_probs.median().exp()),
            "largest_probability": float(self.log_probs.max().exp()),
            "perplexity": float((-self.log_probs.sum() / self.tokens.sum()).exp()),
            "greedy_share": float((self.ranks == 0).double().mean()),
            "lowest_rank": int(self.ranks.min()),
            "log_probs": self.log_probs.tolist(),
        }

    def falls(self, after: Reach) -> Tensor:
        """`(O,)`: probability before over probability after."""
        return (self.log_probs - after.log_probs).exp()


def occurrence_pairs(rows: Sequence[Mapping[str, Any]], occurrences: Sequence[Occurrence]) -> Pairs:
    """Every token of every occurrence, at the place before it."""
    return Pairs.of(
        [
            (one.row, token - 1, int(rows[one.row]["input_ids"][token]))
            for one in occurrences
            for token in range(one.start, one.stop)
        ]
    )


def reach_of(rows: Sequence[Mapping[str, Any]], occurrences: Sequence[Occurrence], pairs: Pairs, odds: Odds) -> Reach:
    """
    Gathers the log-odds of [`occurrence_pairs`] by occurrence.

    Args:
        rows, occurrences:
            As for [`occurrence_pairs`].
        pairs ([`Pairs`]), odds ([`Odds`]):
            What was asked and what was measured.
    """
    at = {
        triple: number
        for number, triple in enumerate(
            zip(pairs.rows.tolist(), pairs.tokens.tolist(), pairs.ids.tolist(), strict=True)
        )
    }
    log_probs, ranks = odds.log_probs(), odds.ranks
    numbers = [
        [at[one.row, token - 1, int(rows[one.row]["input_ids"][token])] for token in range(one.start, one.stop)]
        for one in occurrences
    ]
    return Reach(
        log_probs=torch.stack([log_probs[own].sum() for own in numbers]),
        ranks=torch.stack([ranks[own].max() for own in numbers]),
        tokens=torch.tensor([len(own) for own in numbers]),
    )
