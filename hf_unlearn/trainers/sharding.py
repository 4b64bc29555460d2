"""Weights that an engine shards: how to make those of one module whole outside of the model's own forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..geometry import fsdp2_units

_held: set[int] = set()  # ds_ids within a context of ours; DeepSpeed refuses to gather them a second time


@contextmanager
def whole_weights(module: nn.Module) -> Iterator[None]:
    """
    Context in which the weights of `module` can be read and multiplied with; a collective operation under ZeRO-3.

    A gradient that reaches them later, in backward, is reduced and partitioned like any other. Contexts may be nested
    (a model and its reference may share a head).
    """
    wanted = {parameter.ds_id: parameter for parameter in module.parameters() if hasattr(parameter, "ds_id")}
    wanted = {key: parameter for key, parameter in wanted.items() if key not in _held}
    if not wanted:
        yield
        return
    import deepspeed

    _held.update(wanted)
    try:
        with deepspeed.zero.GatheredParameters(list(wanted.values())):
            yield
    finally:
        _held.difference_update(wanted)


def is_collective(module: nn.Module) -> bool:
    """Whether calling the module fetches weights from other ranks (ZeRO-3 through `zero.Init` or its engine)."""
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters())


def unshard(model: Any, module: nn.Module) -> None:
    """
    Under FSDP2, gathers the weights of `module` again where they have been put away: those of the unit it belongs to,
    which is the whole model's (Transformers) or the head's own (accelerate), and of units within it.
    """
    if not any(hasattr(parameter, "device_mesh") for parameter in module.parameters()):
        return
    for unit in _units(model, module):
        unit.unshard()


def _units(model: nn.Module, module: nn.Module) -> list[Any]:
    """The FSDP2 units that hold the parameters of `module`."""
    units = fsdp2_units(model)
    inside = [part for part in module.modules() if part in units]
    path = next(name for name, part in model.named_modules() if part is module)
    names = path.split(".") if path else []
    above = [model.get_submodule(".".join(names[:depth])) for depth in range(len(names), -1, -1)]
    nearest = next((part for part in above if part in units), None)
    return inside if nearest is None or nearest in inside else [*inside, nearest]
