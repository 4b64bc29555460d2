"""Noise on the weights before step 0: what training restores afterwards is what it is asked to keep, and no more."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..geometry import fsdp2_units
from .model_setup import is_peft_model

if TYPE_CHECKING:
    from .config import UnlearningConfig

logger = logging.get_logger(__name__)

_STANDARD_DEVIATION = 0.02  # of a fresh weight, where the config does not name its own


def check_noise(args: UnlearningConfig, model: Any) -> None:
    """
    Refuses noise that cannot do what it is for, and warns of retain rows that would not be brought back.

    Raises:
        ValueError: an adapter (the base under it keeps what is to be forgotten), or frozen weights.
    """
    share = args.weight_noise
    if share == 0:
        return
    if is_peft_model(model):
        raise ValueError(
            f"weight_noise={share} replaces a part of the weights, and an adapter leaves them as they are. Train the "
            "whole model (no peft_config), or set weight_noise=0."
        )
    frozen = [name for name, parameter in _matrices(model) if not parameter.requires_grad]
    if frozen:
        raise ValueError(
            f"weight_noise={share} needs every weight matrix trained again, and {len(frozen)} of them are frozen "
            f"({', '.join(frozen[:3])}{', ...' if len(frozen) > 3 else ''}). Unfreeze them, or set weight_noise=0."
        )
    if args.retain_eval_size > 0:
        logger.warning(
            f"weight_noise={share} takes what is not trained again, and retain_eval_size={args.retain_eval_size:g} "
            "holds rows of every retain set out of training: what only they say will be gone. Set retain_eval_size=0 "
            "to train on all of them, unless the retain sets teach the same thing many times over."
        )


@torch.no_grad()
def add_weight_noise(model: nn.Module, share: float, *, seed: int) -> None:
    r"""
    Moves every weight matrix towards a fresh initialisation, in place and on every engine alike:

    $$W \leftarrow (1 - \alpha) W + \alpha N, \quad N_{ij} \sim \mathcal N(0, \sigma^2)$$

    with the standard deviation sigma of the model's config (`initializer_range`, else 0.02); norms and biases stay.
    This is the noise of UNDO (arXiv 2506.06278), there with Xavier's scale.

    Args:
        model (`Module`):
            The model inside of what the engine wraps; weights may be sharded (FSDP2, ZeRO-3) or have float32 masters
            elsewhere (ZeRO), which are moved too.
        share (`float`):
            alpha, between 0 and 1.
        seed (`int`):
            The noise of a matrix is a function of the seed and its name: the same on every engine and rank.
    """
    for unit in fsdp2_units(model):
        unit.reshard()  # the parameters of a gathered module are other objects
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if config is not None else None
    deviation = float(getattr(config, "initializer_range", None) or _STANDARD_DEVIATION)
    for name, parameter in _matrices(model):
        generator = torch.Generator().manual_seed((seed * 1_000_003 + zlib.crc32(name.encode())) % 2**63)
        shape = getattr(parameter, "ds_shape", parameter.shape)
        noise = torch.randn(tuple(shape), generator=generator) * deviation
        _mix(parameter, noise, share)


def _matrices(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, parameter in model.named_parameters():
        if len(getattr(parameter, "ds_shape", parameter.shape)) > 1:
            yield name, parameter


def _mix(parameter: Any, noise: Tensor, share: float) -> None:
    if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
        _mix_zero(parameter, noise, share)
    elif hasattr(parameter, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        local = parameter.to_local()
        piece = distribute_tensor(noise.to(local.device), parameter.device_mesh, parameter.placements).to_local()
        local.lerp_(piece.to(local.dtype), share)
    else:
        parameter.lerp_(noise.to(parameter.device, parameter.dtype), share)


def _mix_zero(parameter: Any, noise: Tensor, share: float) -> None:
    """Master weights and the weights of the forward pass; collective."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

    master = safe_get_full_fp32_param(parameter)
    whole = master.lerp(noise.to(master.device, master.dtype), share)
    safe_set_full_fp32_param(parameter, whole)
    if not hasattr(parameter, "ds_id"):
        parameter.data.copy_(whole)
        return
    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        if torch.distributed.get_rank() == 0:
            parameter.data.copy_(whole)
