"""A matrix as one process holds it: whole, as a shard, and with float32 masters where an engine keeps them.

The rest of the folder knows no engine: it reads, cuts and writes the parts that are described here.

Shapes: a stored matrix is `(d, m)`, or `(m, d)` for Conv1D.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..geometry import fsdp2_units

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, kw_only=True)
class Part:
    """
    Numbers of a matrix that live on this process.

    Args:
        name (`str`):
            `"weight"` for what the forward pass sees, `"master"` for the optimizer's float32 copy.
        read (`Callable`):
            The numbers as they are now; the storage itself or a copy.
        write (`Callable`):
            Puts numbers of the same shape and type in their place.
        cut (`Callable`):
            From a whole stored matrix to the share of it that belongs here, in the shape of `read`. May be collective.
    """

    name: str
    read: Callable[[], Tensor]
    write: Callable[[Tensor], Any]
    cut: Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Held:
    """
    All parts of a matrix on this process.

    Args:
        parts (`tuple[Part, ...]`):
            The weight, or its shard, comes first.
        groups (`tuple[ProcessGroup, ...]`):
            Processes that hold the matrix together, one group for each dimension of a mesh; empty where every process
            holds all of it by itself.
        device (`torch.device`):
            Where tensors for collective operations of these groups live.
    """

    parts: tuple[Part, ...]
    groups: tuple[Any, ...]
    device: torch.device

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the processes that hold the matrix together; replicas count as often as there are."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def anywhere(self, flag: bool) -> bool:
        """Whether the flag is set on any of these processes; collective, and the same answer on all of them."""
        return bool(self._reduce(torch.tensor([float(flag)]), dist.ReduceOp.MAX).item())

    def _reduce(self, values: Tensor, how: Any) -> Tensor:
        if not self.groups:
            return values
        there = values.to(self.device)
        for group in self.groups:
            dist.all_reduce(there, op=how, group=group)
        return there.cpu()


def settle(model: nn.Module) -> None:
    """Puts away what FSDP2 has left gathered: the parameters of a gathered module are other objects."""
    for unit in fsdp2_units(model):
        unit.reshard()


def hold(matrix: Any) -> Held:
    """
    The parts of a linear layer's weight as they are at this moment.

    Args:
        matrix (`nn.Module`):
            The linear layer, without an adapter around it; [`settle`] comes before.

    Raises:
        ValueError: parameters that ZeRO keeps on NVMe or quantised.
    """
    weight = matrix.weight
    if hasattr(weight, "ds_id"):
        return _partitioned(weight)
    if hasattr(weight, "device_mesh"):
        return _sharded(weight)
    parts = [_tensor("weight", weight.detach(), lambda whole: whole)]
    groups: tuple[Any, ...] = ()
    if hasattr(weight, "_hp_mapping"):  # ZeRO-1 and 2, and DeepSpeed's bf16 optimizer
        groups = (weight._dp_group,)
        if weight._hp_mapping is not None:  # None where other ranks keep all of its master
            parts.append(_fragment(weight._hp_mapping))
    return Held(parts=tuple(parts), groups=groups, device=weight.device)


def is_plain_float(matrix: Any) -> bool:
    """Whether the layer has a weight of ordinary floating-point numbers, which an edit can be added to."""
    weight = getattr(matrix, "weight", None)
    if not isinstance(weight, Tensor) or weight.dtype not in _FLOATS:
        return False
    # bitsandbytes, torchao and others mark packed numbers by the tensor's type, whatever its dtype says
    return type(weight) in (nn.Parameter, Tensor) or hasattr(weight, "device_mesh")


def has_hidden_masters(model: Any, weight: Any) -> bool:
    """
    Whether the model is a DeepSpeed engine (0.19) that trains the weight in 16 bits without ZeRO: its optimizer then
    has float32 masters which nothing leads to from the weight.
    """
    stage = getattr(model, "zero_optimization_stage", None)
    if not callable(stage) or stage() != 0 or getattr(model, "optimizer", None) is None:
        return False
    return weight.requires_grad and weight.dtype in (torch.bfloat16, torch.float16)


def tensor_parallel(model: Any, parameters: Iterable[Any]) -> str | None:
    """What says that the model's matrices are split over processes by tensor parallelism; None if nothing does."""
    loaded = getattr(getattr(model, "config", None), "distributed_config", None)
    sizes = {"tp_size": getattr(model, "_tp_size", None), "distributed_config.tp_size": getattr(loaded, "tp_size", 1)}
    for name, size in sizes.items():
        if isinstance(size, int) and size > 1:
            return f"{name}={size}"
    for parameter in parameters:
        mesh = getattr(parameter, "device_mesh", None)
        if mesh is not None and "tp" in (mesh.mesh_dim_names or ()):
            return f"weights on a mesh with dimensions {tuple(mesh.mesh_dim_names)}"
    return None


def _tensor(name: str, storage: Tensor, cut: Callable[[Tensor], Tensor]) -> Part:
    return Part(name=name, read=lambda: storage, write=storage.copy_, cut=cut)


def _fragment(mapping: Any) -> Part:
    """The part of a flat float32 master that this rank keeps (ZeRO-1 and 2)."""
    there = mapping.lp_fragment_address
    return _tensor(
        "master", mapping.get_hp_fragment().detach(), lambda whole: whole.flatten()[there.start :][: there.numel]
    )


def _sharded(weight: Any) -> Held:
    """A `DTensor` of FSDP2."""
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = weight.device_mesh, weight.placements
    device = torch.device(mesh.device_type)
    local = weight.detach().to_local()

    def cut(whole: Tensor) -> Tensor:
        return distribute_tensor(whole.to(device), mesh, placements).to_local()

    groups = tuple(mesh.get_group(dim) for dim in range(mesh.ndim))
    return Held(parts=(_tensor("weight", local, cut),), groups=groups, device=device)


def _partitioned(weight: Any) -> Held:
    """A parameter of ZeRO-3: this rank's equal share of the flat matrix, padded at the end."""
    share = weight.ds_tensor
    if share.status.name != "AVAILABLE" or hasattr(share, "ds_quant_scale"):
        raise ValueError(
            "ZeRO-3 keeps this model's parameters on NVMe or quantised (zero_quantized_weights), where an edit cannot "
            "be added to them. Keep them in memory as they are, or pass as_adapter=True."
        )
    if getattr(weight, "ds_secondary_tensor", None) is not None:
        raise ValueError(
            "ZeRO-3 keeps a second copy of this model's parameters (zero_hpz_partition_size above 1), which would not "
            "get the edit. Leave it at 1, or pass as_adapter=True."
        )
    weight.partition()  # a whole copy, where one is resident; the next forward pass gathers it again
    size, rank = share.numel(), dist.get_rank(weight.ds_process_group)

    def cut(whole: Tensor) -> Tensor:
        flat = whole.flatten()[rank * size :][:size]
        return torch.nn.functional.pad(flat, (0, size - len(flat)))

    parts = [_tensor("weight", share.data, cut)]
    if hasattr(weight, "_z3_optimizer") and weight.requires_grad:
        from deepspeed.utils import safe_get_local_fp32_param, safe_set_local_fp32_param

        parts.append(
            Part(
                name="master",
                read=lambda: safe_get_local_fp32_param(weight),
                write=lambda values: safe_set_local_fp32_param(weight, values),
                cut=cut,
            )
        )
    return Held(parts=tuple(parts), groups=(weight.ds_process_group,), device=weight.device)
