"""A frozen copy of a model, also of one that was loaded in ZeRO-3 shards."""

from __future__ import annotations

import copy
from typing import Any

import torch


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
    return copy.deepcopy(model, memo).eval().requires_grad_(False)
