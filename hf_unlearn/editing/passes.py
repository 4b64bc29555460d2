"""Forward passes of a plan: what each of them needs, and which tokens of which rows they look at.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .added import edits_in_force
from .capture import Captured, capture
from .odds import Odds, Pairs, next_token_odds
from .plan import LayerEdit


@dataclass(frozen=True, kw_only=True)
class Run:
    """
    What every forward pass of a plan needs.

    Args:
        model (`Any`):
            The model, or what PEFT or an engine has made of it.
        pad_token_id (`int`):
            Id to pad with.
        batch_size (`int`):
            Rows a forward pass, on each rank.
        accelerator (`Any`):
            With several processes; None with one.
        progress (`bool`):
            Whether progress bars are shown.
    """

    model: Any
    pad_token_id: int
    batch_size: int = 16
    accelerator: Any = None
    progress: bool = False

    def options(self, text: str) -> dict[str, Any]:
        """Arguments that [`capture`] and [`next_token_odds`] share."""
        return {
            "pad_token_id": self.pad_token_id,
            "batch_size": self.batch_size,
            "accelerator": self.accelerator,
            "description": text if self.progress else None,
        }

    def odds(self, rows: Sequence[Mapping[str, Any]], pairs: Pairs, edits: Sequence[LayerEdit] = ()) -> Odds:
        """Log-odds of the pairs with edits in force."""
        with edits_in_force(self.model, tuple(edits)):
            return next_token_odds(self.model, rows, pairs, **self.options("measuring"))

    def at(
        self,
        rows: Sequence[Mapping[str, Any]],
        layer: int,
        positions: Any,
        edits: Sequence[LayerEdit] = (),
        *,
        also: nn.Module | None = None,
    ) -> Captured:
        """Inputs and outputs of one matrix with edits of earlier blocks in force; rows are read as far as needed."""
        if isinstance(positions, Places):
            rows = positions.shortened(rows)
        options = self.options("reading activations")
        with edits_in_force(self.model, tuple(edits)):
            return capture(self.model, rows, [layer], positions=positions, also=also, **options)[layer]


class Places:
    """
    Given tokens of given rows, as positions of [`capture`].

    Args:
        places (`Sequence[tuple[int, int]]`):
            (row, token).
    """

    def __init__(self, places: Sequence[tuple[int, int]]) -> None:
        self.by_row: dict[int, list[int]] = {}
        for row, token in places:
            self.by_row.setdefault(row, []).append(token)

    def shortened(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Rows up to the last place in them, which is all that it depends on; a first token where there is none."""
        ends = [max(self.by_row.get(number, (0,))) + 1 for number in range(len(rows))]
        return [{key: row[key][:end] for key in ("input_ids", "labels")} for row, end in zip(rows, ends, strict=True)]

    def __call__(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The mask `(B, T)`."""
        mask = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
        first = batch["attention_mask"].argmax(1).tolist()
        for at, row in enumerate(batch["index"].tolist()):
            for token in self.by_row.get(row, ()):
                mask[at, first[at] + token] = True
        return mask
