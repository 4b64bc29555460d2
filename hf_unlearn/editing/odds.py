"""How likely a model finds given next tokens at given places: log-odds, in float64, with edits in force or not.

Shapes: K pairs of a place and a token, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from ..data import pad_rows
from ..losses import IGNORE_INDEX
from ..metrics.likelihood import evaluation_mode
from ..trainers.forward import ModelForward
from ..trainers.measure import rank_batches

_HALF = -0.6931471805599453  # log 0.5
_CHUNK = 256  # places whose logits exist at once


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """
    Places and the tokens that they are asked about.

    Args:
        rows, tokens (`Tensor`):
            `(K,)` int64: a place is token `tokens[k]` of row `rows[k]`, whose output predicts the one after it.
        ids (`Tensor`):
            `(K,)` int64: the next token that is asked about.
        shares (`Tensor`):
            `(K,)` float64, above 0 and at most 1: a token with the share s may have the s-th power of what a word may
            have, so that tokens of a word whose shares sum to 1 bound the word together.
    """

    rows: Tensor
    tokens: Tensor
    ids: Tensor
    shares: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    @classmethod
    def of(cls, triples: Sequence[tuple[int, int, int]]) -> Pairs:
        """From (row, token, id), each once, sorted; each has to do all alone."""
        return cls.shared(dict.fromkeys(triples, 1.0))

    @classmethod
    def shared(cls, shares: Mapping[tuple[int, int, int], float]) -> Pairs:
        """From the share of each (row, token, id), sorted."""
        triples = sorted(shares)
        table = torch.tensor(triples, dtype=torch.int64).reshape(-1, 3)
        own = torch.tensor([shares[triple] for triple in triples], dtype=torch.float64)
        return cls(rows=table[:, 0], tokens=table[:, 1], ids=table[:, 2], shares=own)

    def chosen(self, which: Tensor) -> Pairs:
        """Those that the mask `(K,)` names."""
        return Pairs(rows=self.rows[which], tokens=self.tokens[which], ids=self.ids[which], shares=self.shares[which])

    def and_then(self, other: Pairs, offset: int) -> Pairs:
        """These and the others, whose rows come `offset` later."""
        return Pairs(
            rows=torch.cat([self.rows, other.rows + offset]),
            tokens=torch.cat([self.tokens, other.tokens]),
            ids=torch.cat([self.ids, other.ids]),
            shares=torch.cat([self.shares, other.shares]),
        )

    def limits(self, probability: float) -> Tensor:
        """`(K,)` float64: the log-odds that each may have where words may have a probability."""
        return torch.logit(torch.tensor(probability, dtype=torch.float64) ** self.shares)

    def bounds(self, odds: Tensor) -> Tensor:
        """`(K,)` float64: the probability of the word that each token's log-odds `(K,)` allow, by its share."""
        return (torch.nn.functional.logsigmoid(odds) / self.shares).exp()

    def places(self) -> tuple[list[tuple[int, int]], Tensor]:
        """The distinct places (row, token), sorted, and the place `(K,)` of each pair."""
        table = torch.stack([self.rows, self.tokens], dim=1)
        distinct, inverse = torch.unique(table, dim=0, return_inverse=True)
        return [(row, token) for row, token in distinct.tolist()], inverse


@dataclass(frozen=True, kw_only=True)
class Demands:
    """
    What is to become unlikely.

    Args:
        rows (`Sequence[Mapping]`):
            Tokenised rows.
        pairs ([`Pairs`]):
            Places in them, and tokens.
    """

    rows: Sequence[Mapping[str, Any]]
    pairs: Pairs


@dataclass(frozen=True, kw_only=True)
class Odds:
    """
    Of each pair: log-odds `log p / (1 - p)`, and how many tokens are likelier.

    Args:
        values (`Tensor`):
            `(K,)` float64, nats.
        ranks (`Tensor`):
            `(K,)` int64, 0 for the most likely token.
    """

    values: Tensor
    ranks: Tensor

    def probabilities(self) -> Tensor:
        """`(K,)` float64."""
        return torch.sigmoid(self.values)

    def log_probs(self) -> Tensor:
        """`(K,)` float64, nats."""
        return torch.nn.functional.logsigmoid(self.values)


@torch.no_grad()
def next_token_odds(
    model: Any,
    rows: Sequence[Mapping[str, Any]],
    pairs: Pairs,
    *,
    pad_token_id: int,
    batch_size: int = 16,
    accelerator: Any = None,
    description: str | None = None,
) -> Odds:
    """
    Log-odds of the tokens at their places, by one forward pass a batch over the rows that are asked about; logits are
    computed at those places only.

    Args:
        model (`PreTrainedModel`, or what PEFT or an engine has made of it):
            The model; put into evaluation mode meanwhile.
        rows (`Sequence[Mapping]`):
            Tokenised rows: `input_ids`.
        pairs ([`Pairs`]):
            What is asked.
        pad_token_id (`int`):
            Id to pad with.
        batch_size (`int`, *optional*, defaults to `16`):
            Rows a forward pass, on each rank.
        accelerator (`Accelerator`, *optional*):
            With several processes each takes its share, and all get everything.
        description (`str`, *optional*):
            Text of a progress bar.
    """
    run = accelerator or local_run(model)
    places, of_pair = pairs.places()
    asked: dict[int, dict[int, list[int]]] = {}  # row -> token -> numbers of pairs
    for number, place in enumerate(of_pair.tolist()):
        row, token = places[place]
        asked.setdefault(row, {}).setdefault(token, []).append(number)
    wanted = sorted(asked)
    table = [_row(rows[row], asked[row], row) for row in wanted]
    forward = ModelForward(getattr(model, "module", model))
    found: list[tuple[list[int], Tensor, Tensor]] = []
    with evaluation_mode(model):
        collate = partial(pad_rows, pad_token_id=pad_token_id)
        for batch in rank_batches(table, batch_size, run, collate, description):
            (scores,) = forward(model, [batch])
            numbers = [asked[row][token] for row in _numbers(batch) for token in sorted(asked[row])]
            with scores.whole():
                for start in range(0, scores.count, _CHUNK):
                    few = numbers[start : start + _CHUNK]
                    logits = scores.rows(slice(start, start + len(few))).double()
                    owners = [place for place, own in enumerate(few) for _ in own]
                    flat = [number for own in few for number in own]
                    if flat:
                        found.append((flat, *log_odds(logits, owners, pairs.ids[flat])))
    pieces = gather_object(found) if run.num_processes > 1 else found
    values = torch.zeros(len(pairs), dtype=torch.float64)
    ranks = torch.zeros(len(pairs), dtype=torch.int64)
    for flat, odds, above in pieces:
        values[flat], ranks[flat] = odds, above
    if not bool(torch.isfinite(values).all()):
        number = int((~torch.isfinite(values)).nonzero()[0])
        raise FloatingPointError(
            f"The log-odds of token {int(pairs.ids[number])} after token {int(pairs.tokens[number])} of row "
            f"{int(pairs.rows[number])} are {float(values[number])}: the model's logits are not finite there."
        )
    return Odds(values=values, ranks=ranks)


def local_run(model: Any) -> Any:
    """What [`rank_batches`] asks of an accelerator, for one process."""
    return SimpleNamespace(
        num_processes=1, process_index=0, is_main_process=True, device=next(model.parameters()).device
    )


def _row(row: Mapping[str, Any], asked: Mapping[int, Any], number: int) -> dict[str, Any]:
    """A label after each place that is asked about; a token more where that is the last one."""
    ids = list(row["input_ids"])
    last = max(asked)
    if not 0 <= min(asked) <= last < len(ids):
        raise ValueError(f"Row {number} has {len(ids)} tokens; asked about the one after token {last}.")
    ids = [*ids, ids[-1]][: last + 2]  # what comes later has no say
    labels = [IGNORE_INDEX] * len(ids)
    for token in asked:
        labels[token + 1] = ids[token + 1]
    return {"input_ids": ids, "labels": labels, "index": number}


def _numbers(batch: Mapping[str, Tensor]) -> list[int]:
    return [row for row in batch["index"].tolist() if row >= 0]  # below 0: only keeps the ranks in step


def log_odds(logits: Tensor, owners: list[int], ids: Tensor) -> tuple[Tensor, Tensor]:
    """Log-odds and ranks of K tokens, the logits of whose places are `logits[owners]`, `(P, V)` float64."""
    total = logits.logsumexp(1)
    odds, ranks = [], []
    for start in range(0, len(owners), 64):
        own = ids[start : start + 64, None].to(logits.device)
        of = owners[start : start + 64]
        rows = logits[of]
        z = rows.gather(1, own)
        logp = z.squeeze(1) - total[of]
        found = logp - torch.log1p(-logp.exp().clamp(max=0.5))
        likely = logp > _HALF  # what is left of 1 is then lost to rounding, and summed anew
        others = rows[likely].scatter(1, own[likely], -torch.inf).logsumexp(1)
        found[likely] = z.squeeze(1)[likely] - others
        odds.append(found)
        ranks.append((rows > z).sum(1))
    return torch.cat(odds).cpu(), torch.cat(ranks).cpu()
