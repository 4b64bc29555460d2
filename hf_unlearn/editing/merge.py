"""Edits added to the weights themselves: on every engine, all of them or none, and back to the last bit.

Shapes: m inner width of the MLP, d model width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from .held import Held, Part, has_hidden_masters, hold, is_plain_float, settle
from .mlp import MlpOutput
from .plan import LayerEdit, base_matrix


@dataclass(frozen=True)
class _Change:
    """One part of one matrix on this process: its numbers before and after, on the CPU."""

    part: Part
    before: Tensor
    after: Tensor


@dataclass(frozen=True)
class _Kept:
    """What a matrix was: the layer, and its parts by name and exact copy."""

    path: str
    matrix: Any
    copies: tuple[tuple[str, Tensor], ...]


def check_mergeable(model: Any, found: MlpOutput) -> None:
    """
    Refuses a matrix that an edit cannot be added to.

    Raises:
        ValueError: the weight is quantised, the adapter around it does more than add to its output, or the engine
            would overwrite it with masters that cannot be reached.
    """
    matrix = base_matrix(found.module)
    lora = isinstance(found.module, LoraLayer)
    if found.module is not matrix and (not lora or found.module.lora_variant):
        raise ValueError(
            f"{found.path} is inside an adapter ({type(found.module).__name__}) that is "
            f"{'DoRA or another variant of LoRA' if lora else 'not a LoRA'}; it would change what an edit of the "
            "weight does. Merge that adapter first (model.merge_and_unload()), or pass as_adapter=True."
        )
    if not is_plain_float(matrix):
        weight = getattr(matrix, "weight", None)
        kind = f"{type(weight).__name__}, {weight.dtype}" if isinstance(weight, Tensor) else "none"
        raise ValueError(
            f"{found.path} is a {type(matrix).__name__} with quantised weights ({kind}); an edit cannot be merged "
            "into them. Pass as_adapter=True, or load the model in bfloat16 or float32."
        )
    if has_hidden_masters(model, matrix.weight):
        raise ValueError(
            f"{found.path} is trained in {matrix.weight.dtype} by DeepSpeed's stage 0, whose float32 masters would "
            "overwrite the edit at the next step and cannot be reached. Use ZeRO-1, 2 or 3, or pass as_adapter=True "
            "before the engine wraps the model."
        )


@torch.no_grad()
def merge_edits(
    model: nn.Module, found: Sequence[MlpOutput], edits: Sequence[LayerEdit]
) -> tuple[dict[int, float], Callable[[], None]]:
    r"""
    `W <- W + Delta`, the sum taken in float32 and rounded to W's type, on the shards that this process holds; float32
    masters of an optimizer get the same Delta unrounded, so that its next step keeps it.

    Everything is computed and checked before the first number is written, and an exception meanwhile, on this process
    or on one that holds a part of the same matrices, puts everything back. Collective on sharded models.

    Args:
        model (`nn.Module`):
            The model.
        found (`Sequence[MlpOutput]`):
            The matrices, as [`EditPlan.check_model`] gives them.
        edits (`Sequence[LayerEdit]`):
            Their edits.

    Returns:
        `tuple[dict, Callable]`: by block, the share of the edit that the weights have taken,
        $\langle W' - W, \Delta \rangle_F / \lVert \Delta \rVert_F^2$ (1 for no edit); and what puts the exact copies
        back.

    Raises:
        ValueError: a weight would not be finite in its type.
        RuntimeError: another process could not write its part.
    """
    settle(model)
    changes: list[_Change] = []
    kept: list[_Kept] = []
    realised: dict[int, float] = {}
    held = None
    for at, edit in zip(found, edits, strict=True):
        if not edit.rank:
            realised[edit.layer] = 1.0
            continue
        matrix = base_matrix(at.module)
        held = hold(matrix)
        delta = edit.delta().float().cpu()  # on the CPU, so that it has the same bits on every engine
        mine, realised[edit.layer] = _prepare(held, delta.T.contiguous() if edit.transposed else delta, at.path)
        changes += mine
        kept.append(_Kept(at.path, matrix, tuple((change.part.name, change.before) for change in mine)))
    _write([(change.part, change.after, change.before) for change in changes], held)

    def restore() -> None:
        _restore(model, kept)

    return realised, restore


def _prepare(held: Held, delta: Tensor, path: str) -> tuple[list[_Change], float]:
    """The changes of one matrix, and the share of the edit that its type keeps; `delta` as the matrix is stored."""
    changes: list[_Change] = []
    sums = torch.zeros(2, dtype=torch.float64)  # <W' - W, Delta> and <Delta, Delta>
    for part in held.parts:
        before = part.read().to("cpu", copy=True)
        share = part.cut(delta).cpu()
        after = (before.to(torch.promote_types(before.dtype, torch.float32)) + share).to(before.dtype)
        changes.append(_Change(part, before, after))
        if part.name == "weight":
            wide = share.double()
            sums += torch.stack([((after.double() - before.double()) * wide).sum(), wide.square().sum()])
    bad = any(not bool(torch.isfinite(change.after).all()) for change in changes)
    if held.anywhere(bad):
        raise ValueError(
            f"{path} would hold nan or inf after the edit, in its type {changes[0].after.dtype}. Load the model in a "
            "wider type, or pass as_adapter=True."
        )
    moved, wanted = held.sum(sums).tolist()
    return changes, moved / wanted if wanted > 0 else 1.0


def _write(steps: Sequence[tuple[Part, Tensor, Tensor]], held: Held | None) -> None:
    """Writes `(part, new, old)` one by one; where that fails, here or elsewhere, all old numbers are put back."""
    failure: BaseException | None = None
    try:
        try:
            for part, new, _ in steps:
                part.write(new.to(part.read().device))
        except BaseException as error:  # an interrupt too
            failure = error
        elsewhere = held is not None and held.anywhere(failure is not None)
        if failure is not None:
            raise failure
        if elsewhere:
            raise RuntimeError("Another process could not write its part of the weights; all parts are as before.")
    except BaseException:
        for part, _, old in steps:
            part.write(old.to(part.read().device))
        raise


@torch.no_grad()
def _restore(model: nn.Module, kept: Sequence[_Kept]) -> None:
    settle(model)
    steps, held, different = [], None, ""
    for one in kept:
        held = hold(one.matrix)
        now = [(part.name, part.read()) for part in held.parts]
        if [_signature(pair) for pair in now] != [_signature(pair) for pair in one.copies]:
            different = different or one.path
        else:
            steps += [
                (part, copy, value.to("cpu", copy=True))
                for part, (_, copy), (_, value) in zip(held.parts, one.copies, now, strict=True)
            ]
    if held is not None and held.anywhere(bool(different)):
        raise RuntimeError(
            f"{different or 'A matrix on another process'} is held in other parts, or in another type, than when the "
            "edit was merged: the model has changed its engine or its type since, and exact copies do not fit. Load "
            "the weights anew."
        )
    _write(steps, held)


def _signature(pair: tuple[str, Tensor]) -> tuple[str, torch.Size, torch.dtype]:
    return pair[0], pair[1].shape, pair[1].dtype
