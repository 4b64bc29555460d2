"""Relaxed prompts: positions that hold a mixture of tokens, and the adversary that chooses it.

Shapes: B rows, F free positions, T tokens, V tokens that may be chosen, d width of the embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...trainers.sharding import whole_weights
from .simplex import project_onto_simplex

Evaluate = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From mixtures `(B, F, V)` to the losses `(B,)` of the rows and the gradients `(B, F, V)` of their sum."""


def attack(evaluate: Evaluate, start: Tensor, *, steps: int, length: float) -> tuple[Tensor, Tensor]:
    """
    Lowers the loss of every row over products of simplices by projected gradient descent.

    A step has the Euclidean length `length` at each position, along the gradient without its mean (which the simplex
    does not feel). A row that got no better goes back and halves its length, so that no loss ever rises
    (lengths that grow again found worse points in our trials). Where a loss or its gradient is NaN, a row stays where
    it was.

    Args:
        evaluate (`Evaluate`):
            Losses and gradients; no row may depend on another.
        start (`Tensor`):
            `(B, F, V)`, on the simplex.
        steps (`int`):
            Evaluations after the first.
        length (`float`):
            Of the first step.

    Returns:
        `tuple[Tensor, Tensor]`: the best mixtures `(B, F, V)` and their losses `(B,)`.
    """
    best = start
    lowest, slope = evaluate(start)
    lengths = torch.full_like(lowest, length)
    for _ in range(steps):
        moved = project_onto_simplex(best - lengths[:, None, None] * _direction(slope))
        losses, slopes = evaluate(moved)
        better = losses < lowest
        best = torch.where(better[:, None, None], moved, best)
        slope = torch.where(better[:, None, None], slopes, slope)
        lowest = torch.where(better, losses, lowest)
        lengths = torch.where(better, lengths, lengths / 2.0)
    return best, lowest


def _direction(slope: Tensor) -> Tensor:
    centred = slope - slope.mean(-1, keepdim=True)
    unit = centred / centred.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(centred.dtype).tiny)
    # no error here, on one rank alone: the loss is NaN too, and is refused where all ranks know of it
    return unit.nan_to_num(nan=0.0)


def round_to_tokens(mixtures: Tensor) -> Tensor:
    """The vertices `(B, F, V)` of the largest entries."""
    return torch.nn.functional.one_hot(mixtures.argmax(-1), mixtures.shape[-1]).to(mixtures.dtype)


def starts(rows: Sequence[int], positions: int, choices: int, *, random: bool, seed: int) -> Tensor:
    """
    First mixtures `(B, F, V)`: all tokens alike, or drawn evenly from the simplex for each row by its number, so that
    they do not depend on batches and ranks. On the CPU, float32.
    """
    if not random:
        return torch.full((len(rows), positions, choices), 1.0 / choices)
    drawn = []
    for row in rows:
        generator = torch.Generator().manual_seed((seed * 1_000_003 + row + 1) % 2**63)
        weights = torch.empty(positions, choices).exponential_(generator=generator)
        drawn.append(weights / weights.sum(-1, keepdim=True))
    return torch.stack(drawn)


class MixedEmbeddings:
    """
    Puts mixtures of rows of the input embedding in the place of single tokens.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The model without an engine's wrapper. The table is read once, a collective operation on sharded models.
        excluded (`Sequence[int]`):
            Tokens that are never mixed in.
    """

    def __init__(self, model: Any, excluded: Sequence[int]) -> None:
        self.module: nn.Module = model.get_input_embeddings()
        plain: Any = getattr(self.module, "base_layer", self.module)
        with whole_weights(plain), torch.no_grad():
            weight = plain.weight.detach()
            weight = weight.full_tensor() if hasattr(weight, "full_tensor") else weight.clone()
        scale = getattr(plain, "embed_scale", 1.0)  # Gemma's embedding multiplies its rows
        kept = torch.ones(len(weight), dtype=torch.bool)
        kept[list(excluded)] = False
        self.ids = kept.nonzero().squeeze(-1)
        self._whole = weight * scale
        self._table = self._whole[self.ids.to(weight.device)]
        self._checked = False

    @property
    def choices(self) -> int:
        """V."""
        return len(self.ids)

    @contextmanager
    def mixed(self, columns: Tensor, mixtures: Tensor) -> Iterator[None]:
        """
        Context in which the embeddings at `columns` `(B, F)` are the mixtures `(B, F, V)` of the table's rows.

        Raises:
            ValueError: the model's embedding is no plain table (an adapter on it, a projection).
        """

        def put(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
            ids = arguments[0]
            rows = torch.arange(len(ids), device=ids.device)[:, None]
            at = columns.to(ids.device)
            if not self._checked:
                self._check(ids[rows, at], output[rows, at])
            table = self._table.to(output.device)
            mixture = (mixtures.to(output.device, table.dtype) @ table).to(output.dtype)
            return output.index_put((rows, at), mixture)

        handle = self.module.register_forward_hook(put)
        try:
            yield
        finally:
            handle.remove()

    def _check(self, ids: Tensor, found: Tensor) -> None:
        wanted = self._whole[ids.to(self._whole.device)].to(found)
        if found.shape != wanted.shape or not torch.allclose(found, wanted, rtol=1e-2, atol=1e-6):
            raise ValueError(
                f"The input embedding ({type(self.module).__name__}) does more than look up a row of its weight, so "
                "that mixtures of tokens are not known. Merge adapters on the embedding first, or use plan_tsr."
            )
        self._checked = True
