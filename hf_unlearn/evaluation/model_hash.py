"""Which model was scored: a hash of its weights, and the settings that change what the same weights compute."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..reports.eval_spread import is_sharded
from ..reports.plain import to_plain

_CHUNK_BYTES = 64 * 2**20
# of a config: where it came from, and how it is run, neither of which changes what is computed
_VOLATILE = ("_name_or_path", "transformers_version", "architectures", "torch_dtype", "dtype", "use_cache")


def model_hash(model: torch.nn.Module) -> str | None:
    """
    SHA-256 over names, shapes, data types and bytes of all parameters and persistent buffers, sorted by name; of
    weights that are tied, once. Adapters count, so the hash of a model with an adapter is not that of the merged one.

    Tensors are read one after the other, 64 MiB at a time: on any device, in any data type.

    Args:
        model (`torch.nn.Module`):
            Any model.

    Returns:
        `str`, *optional*: 64 hexadecimal digits; None where [`hash_obstacle`] names a reason.
    """
    if hash_obstacle(model) is not None:
        return None
    digest = hashlib.sha256()
    for name, value in _tensors(model):
        digest.update(f"{name}\0{tuple(value.shape)}\0{value.dtype}\0".encode())
        data = value.detach().contiguous().reshape(-1).view(torch.uint8)
        for start in range(0, data.numel(), _CHUNK_BYTES):
            digest.update(data[start : start + _CHUNK_BYTES].cpu().numpy().data)
    return digest.hexdigest()


def hash_obstacle(model: torch.nn.Module) -> str | None:
    """Why the model has no hash, in plain words; None where it has one."""
    if is_sharded(model):
        return "its weights are sharded (ZeRO-3, FSDP): no process holds them all"
    absent = [name for name, value in _tensors(model) if value.is_meta]
    if absent:
        return f"{len(absent)} of its weights are offloaded (first {absent[0]})"
    return None


def model_settings(model: Any) -> dict[str, Any]:
    """
    What besides the weights decides what a model computes, as plain values: its config, and of each adapter its scale
    and whether it is switched on.
    """
    config = getattr(model, "config", None)
    values: Mapping[str, Any] = {} if config is None else config.to_dict()
    adapters = {
        name: {
            kind: to_plain(getattr(module, kind, None)) for kind in ("scaling", "active_adapters", "merged_adapters")
        }
        | {"disabled": bool(getattr(module, "disable_adapters", False))}
        for name, module in model.named_modules()
        if hasattr(module, "active_adapters") and hasattr(module, "scaling")
    }
    return {
        "class": type(model).__name__,
        "config": {key: to_plain(value) for key, value in values.items() if key not in _VOLATILE},
        "adapters": adapters,
    }


def _tensors(model: torch.nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and persistent buffers by name, each once."""
    seen: set[int] = set()
    found = []
    for name, value in sorted(model.state_dict(keep_vars=True).items()):
        if isinstance(value, Tensor) and id(value) not in seen:
            seen.add(id(value))
            found.append((name, value))
    return found
