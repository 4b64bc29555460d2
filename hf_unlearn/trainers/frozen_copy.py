"""Copies of a model that share nothing with it, also of one that was loaded in ZeRO-3 shards."""

from __future__ import annotations

import copy
from types import MethodType
from typing import Any

import torch
from torch import nn


def frozen_copy(model: Any) -> Any:
    """
    A copy in evaluation mode that needs no gradient; its weights are whole, on the CPU where the model is sharded.

    A model loaded under ZeRO-3 has empty tensors in place of its weights, and a plain `deepcopy` would copy those.
    Its parameters are gathered one at a time, so that no device ever holds the whole model. Collective there.
    """
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        if hasattr(parameter, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter]):
                whole = parameter.detach().cpu().clone()
            memo[id(parameter)] = torch.nn.Parameter(whole, requires_grad=False)
    return independent_copy(model, memo).eval().requires_grad_(False)


def independent_copy(model: Any, memo: dict[int, Any] | None = None) -> Any:
    """
    A deep copy that computes with its own weights.

    A plain `deepcopy` need not: TRL's SFTTrainer (1.x) leaves a `forward` on the model that has the model's own bound
    method in its closure. Functions are not copied, so the copy would compute with the original's weights, and train
    them. Such a `forward` is left out: the copy has its class's.
    """
    copied = copy.deepcopy(model, memo if memo is not None else {})
    for original, module in zip(model.modules(), copied.modules(), strict=True):
        forward = vars(module).get("forward")
        if forward is not None and _is_captured(forward, original):
            del module.forward
    return copied


def _is_captured(function: Any, module: nn.Module) -> bool:
    """Whether a callable holds a bound method of `module`: in its closure, or in what it wraps."""
    if isinstance(function, MethodType):  # itself copied, with what it is bound to; the function in it is not
        function = function.__func__
    held = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    held += [getattr(function, name) for name in ("__wrapped__", "func") if hasattr(function, name)]
    return any(
        getattr(value, "__self__", None) is module or _is_captured(value, module)
        for value in held
        if callable(value) and not isinstance(value, type | nn.Module)
    )
