"""At which tokens activations are taken.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from ..losses import IGNORE_INDEX

PositionName = Literal["last_prompt", "response", "predicting", "all"]
Positions = PositionName | Callable[[Mapping[str, Tensor]], Tensor]
"""
`last_prompt`: the token whose output predicts the first token of the response; of a row without response, the last.
`response`: the tokens of the response. `predicting`: those whose outputs predict them, one place earlier. `all`: all
but padding. Or a function from a batch of `input_ids`, `attention_mask` and `labels` `(B, T)` to a boolean mask of the
same shape.
"""


def position_mask(batch: Mapping[str, Tensor], positions: Positions | str, bos_token_id: int | None) -> Tensor:
    """
    The chosen tokens `(B, T)`, boolean; never padding, and never a BOS token at the start of a row: its activations
    are far larger than all others, whatever follows.

    Args:
        batch (`Mapping`):
            `input_ids`, `attention_mask` and `labels`, each `(B, T)`; labels are not shifted.
        positions (`Positions`):
            Which tokens.
        bos_token_id (`int`, *optional*):
            The model's.

    Raises:
        TypeError: a function that returns no boolean mask.
        ValueError: an unknown name, or a mask of another shape.
    """
    ids, real = batch["input_ids"], batch["attention_mask"].bool()
    if callable(positions):
        chosen = positions(batch)
        if not isinstance(chosen, Tensor) or chosen.dtype != torch.bool:
            shown = chosen.dtype if isinstance(chosen, Tensor) else type(chosen).__name__
            raise TypeError(f"positions returned {shown}; expected a boolean mask of shape {tuple(ids.shape)}.")
        if chosen.shape != ids.shape:
            raise ValueError(f"positions returned a mask of shape {tuple(chosen.shape)}; expected {tuple(ids.shape)}.")
    else:
        if positions not in get_args(PositionName):
            raise ValueError(
                f"positions is {positions!r}; expected one of {', '.join(get_args(PositionName))}, or a function."
            )
        chosen = _named(positions, batch["labels"], real)
    starts = real & (real.cumsum(1) == 1)
    if bos_token_id is not None:
        chosen = chosen & ~(starts & (ids == bos_token_id))
    return chosen & real


def _named(name: str, labels: Tensor, real: Tensor) -> Tensor:
    if name == "all":
        return real
    response = (labels != IGNORE_INDEX) & real
    if name == "response":
        return response
    if name == "predicting":
        return torch.cat([response[:, 1:], torch.zeros_like(response[:, :1])], dim=1) & real
    order = torch.arange(labels.shape[1], device=labels.device).expand_as(labels)
    end = labels.shape[1]
    first = torch.where(response, order, end).amin(1, keepdim=True)
    last = torch.where(real, order, -1).amax(1, keepdim=True)
    return order == torch.where(first < end, first - 1, last)


class Occurrences:
    """
    The last token of every occurrence of some token sequences: where a concept has just been read.

    Args:
        spellings (`Sequence[Sequence[int]]`):
            Token ids of each spelling.

    Raises:
        ValueError: no spelling, or one without tokens.
    """

    def __init__(self, spellings: Sequence[Sequence[int]]) -> None:
        if not spellings or not all(len(ids) for ids in spellings):
            raise ValueError(
                f"spellings is {list(spellings)!r}; expected at least one sequence of token ids, none of them empty."
            )
        self.spellings = [list(ids) for ids in spellings]

    def __call__(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The mask `(B, T)`."""
        ids = batch["input_ids"]
        found = torch.zeros_like(ids, dtype=torch.bool)
        for spelling in self.spellings:
            if len(spelling) > ids.shape[1]:
                continue
            windows = ids.unfold(1, len(spelling), 1)
            matches = (windows == torch.tensor(spelling, device=ids.device)).all(2)
            found[:, len(spelling) - 1 :] |= matches
        return found
