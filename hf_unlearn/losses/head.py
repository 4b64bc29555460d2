"""The output head of a decoder: from hidden states to logits, a chunk of rows at a time.

Shapes: N response positions, d hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_unlearn.losses.rows import upcast

# Elements of a chunk of float32 logits: 96 MiB on a CPU, 1 GiB on an accelerator.
_CHUNK_ELEMENTS = {"cpu": 3 * 2**23}
_CHUNK_ELEMENTS_ELSEWHERE = 2**28
# Of a block of the vocabulary: 8 MiB, which stays in a CPU's cache between the passes over it.
_BLOCK_ELEMENTS = {"cpu": 2**21}


@dataclass(frozen=True, kw_only=True, eq=False)
class OutputHead:
    """
    `logits = cap * tanh(scale * head(h) / cap)`; without a cap `scale * head(h)`.

    Args:
        module (`nn.Module`):
            What the model calls on its last hidden states: a linear layer, or a layer with an adapter.
        scale (`float`, *optional*, defaults to `1.0`):
            Factor on the logits (Cohere's `logit_scale`, the inverse of Granite's `logits_scaling`).
        cap (`float`, *optional*):
            Soft cap on the logits (Gemma's `final_logit_softcapping`).
        whole (`Callable`, *optional*):
            Context in which the module's weights are whole, where an engine shards them: entered once for each use,
            so that every rank enters it equally often, whatever rows it has.
        sharded (`Callable`, *optional*):
            Whether calling the module is a collective operation: all rows then go in one call, as ranks differ in
            rows. Asked at each use: an engine wraps the model later.
        chunk_size (`int`, *optional*):
            Rows of logits that exist at once, or as many logits of a block of the vocabulary; by default what fits
            into 96 MiB for rows and 8 MiB for blocks (CPU), or 1 GiB.
    """

    module: nn.Module
    scale: float = 1.0
    cap: float | None = None
    whole: Callable[[], AbstractContextManager[Any]] = nullcontext
    sharded: Callable[[], bool] = lambda: False
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        if self.chunk_size is not None and self.chunk_size < 1:
            raise ValueError(f"chunk_size is {self.chunk_size}; expected None or at least 1 row.")
        if self.cap is not None and not self.cap > 0:
            raise ValueError(f"cap is {self.cap}; expected None or a positive bound on the logits.")

    @property
    def linear(self) -> nn.Linear | None:
        """The head as a plain linear layer, whose gradients have a closed form; None for anything else."""
        offloaded = hasattr(self.module, "_hf_hook")  # accelerate moves the weights in when the module is called
        return self.module if _is_plain(self.module) and not offloaded else None

    def linear_parts(self, hidden: Tensor) -> list[tuple[Tensor, nn.Linear]] | None:
        """
        Inputs and linear layers whose outputs add up to the head's: the layer itself or, with a LoRA adapter, its base
        on `hidden` `(N, d)` and each up-projection on its scaled features `(N, r)`. None where there are none such
        (another kind of adapter, dropout that would be drawn anew, weights that are not at hand).
        """
        if self.linear is not None:
            return [(hidden, self.linear)]
        module: Any = self.module
        base = getattr(module, "base_layer", None)
        if not _is_plain(base) or not hasattr(module, "lora_A") or self.sharded():
            return None
        if module.merged or module.disable_adapters:
            return [(hidden, base)]
        parts = [(hidden, base)]
        for name in module.active_adapters:
            if name not in module.lora_A:
                continue
            down, up, dropout = module.lora_A[name], module.lora_B[name], module.lora_dropout[name]
            plain = _is_plain(down) and _is_plain(up) and not _draws(dropout)
            if not plain or name in getattr(module, "lora_variant", {}):
                return None
            parts.append((down(hidden.to(down.weight.dtype)) * module.scaling[name], up))
        return parts

    def chunks(self, rows: int, vocabulary: int, device: torch.device) -> Iterator[slice]:
        """Slices of `rows` rows, each small enough."""
        budget = _CHUNK_ELEMENTS.get(device.type, _CHUNK_ELEMENTS_ELSEWHERE)
        size = self.chunk_size or max(1, budget // max(vocabulary, 1))
        if rows > size:
            size = -(-rows // -(-rows // size))  # as many chunks, all alike
        return (slice(start, min(start + size, rows)) for start in range(0, rows, size))

    def blocks(self, rows: int, vocabulary: int, device: torch.device) -> Iterator[slice]:
        """Slices of the vocabulary whose logits, for all of `rows` rows, are few enough."""
        budget = _BLOCK_ELEMENTS.get(device.type, _CHUNK_ELEMENTS_ELSEWHERE)
        budget = budget if self.chunk_size is None else self.chunk_size * vocabulary
        size = max(1, budget // max(rows, 1))
        return (slice(start, min(start + size, vocabulary)) for start in range(0, vocabulary, size))

    def finish(self, rows: Tensor) -> Tensor:
        """Scale and cap of raw logits `(n, V)`, in float32 or wider. May work in place on a float32 copy."""
        rows = upcast(rows)
        if self.scale != 1.0:
            rows = rows * self.scale
        if self.cap is not None:
            rows = torch.tanh(rows / self.cap) * self.cap
        return rows

    def unfinish_(self, grad: Tensor, rows: Tensor) -> Tensor:
        """Gradient `(n, V)` of the raw logits from that of the finished `rows`, in place."""
        if self.cap is not None:
            grad.mul_(1.0 - (rows / self.cap).square_())
        if self.scale != 1.0:
            grad.mul_(self.scale)
        return grad

    def logits(self, hidden: Tensor) -> Tensor:
        """
        Logits `(n, V)` of hidden states `(n, d)`. A plain linear layer is multiplied with, within [`whole`]; any other
        module is called, so that adapters take part.
        """
        linear = self.linear
        if linear is None:
            return self.finish(_call(self.module, hidden))
        return self.finish(F.linear(hidden, linear.weight, linear.bias))


def _draws(dropout: nn.Module) -> bool:
    return isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0


def _is_unit(module: nn.Module) -> bool:
    """Whether `fully_shard` (FSDP2) was applied to the module itself; it then has a derived class."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def _is_plain(module: object) -> TypeGuard[nn.Linear]:
    """Whether this is a linear layer and no subclass, but for the one that `fully_shard` derives."""
    kind = type(module)
    if isinstance(module, nn.Linear) and _is_unit(module):
        kind = kind.__mro__[2]
    return kind is nn.Linear


def _call(module: nn.Module, hidden: Tensor) -> Tensor:
    """
    Calls the module. One that is an FSDP2 unit has its weights gathered already, and its hooks would open a forward
    pass of the unit (accelerate's holds the last norm too) that never ends.
    """
    return module.forward(hidden) if _is_unit(module) else module(hidden)
