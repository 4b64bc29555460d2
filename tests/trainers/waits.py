"""Counts, on a CPU, the operations that would make the host wait for a CUDA device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_ATEN = torch.ops.aten
# `lift_fresh` is what torch.tensor() and new_tensor() end with: on a device, a blocking copy from the host.
_ALWAYS = {
    _ATEN._local_scalar_dense,
    _ATEN.is_nonzero,
    _ATEN.nonzero,
    _ATEN.nonzero_numpy,
    _ATEN.argwhere,
    _ATEN.masked_select,
    _ATEN.equal,
    _ATEN.bincount,
    _ATEN._unique,
    _ATEN._unique2,
    _ATEN.unique_dim,
    _ATEN.unique_consecutive,
    _ATEN.unique_dim_consecutive,
    _ATEN.lift_fresh,
}
_INDEXED = {_ATEN.index, _ATEN.index_put, _ATEN.index_put_, _ATEN._index_put_impl_}
_MASKS = (torch.bool, torch.uint8)
# What a tensor on the CPU answers without any dispatch.
_COPIES = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu, torch.Tensor.__array__}


class Waits:
    """`count` is what was seen within [`watching`], by the operation's name."""

    def __init__(self) -> None:
        self.count: Counter[str] = Counter()
        self._paused = 0

    def note(self, name: str) -> None:
        if not self._paused:
            self.count[name] += 1

    @contextmanager
    def watching(self) -> Iterator[None]:
        with _Functions(self), _Operations(self):
            yield

    def unwatched(self, values: Iterable[Any]) -> Iterator[Any]:
        """The values; what it takes to make them (collating on the host) does not count."""
        iterator = iter(values)
        while True:
            self._paused += 1
            try:
                value = next(iterator)
            except StopIteration:
                return
            finally:
                self._paused -= 1
            yield value


class _Operations(TorchDispatchMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        masked = packet in _INDEXED and any(index is not None and index.dtype in _MASKS for index in args[1])
        unsized = (
            packet is _ATEN.repeat_interleave and func._overloadname == "Tensor" and not kwargs.get("output_size")
        )
        if packet in _ALWAYS or masked or unsized:
            self._waits.note(str(packet))
        return func(*args, **kwargs)


class _Functions(TorchFunctionMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # every device is the CPU here, so a move to the host is one that says so
        moved = func is torch.Tensor.to and "cpu" in (*args[1:], (kwargs or {}).get("device"))
        if func in _COPIES or moved:
            self._waits.note(f"Tensor.{func.__name__}")
        return func(*args, **(kwargs or {}))
