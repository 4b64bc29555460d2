"""What concepts are in the space of a block's output: directions of the output head, or points.

Shapes: n tokens or concepts, V vocabulary, d model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..probes.taps import base_model
from ..trainers.sharding import whole_weights

Source = Literal["unembedding", "embedding", "activation"]
"""
`unembedding`: rows of the output head, folded with the final norm: directions. `embedding`: rows of the input
embedding: points, as in the paper. `activation`: the block's own mean output where the concept has just been said.
"""
SOURCES: tuple[Source, ...] = ("unembedding", "embedding", "activation")
_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm")


@torch.no_grad()
def unembedding_directions(model: Any, ids: Sequence[int]) -> Tensor:
    """
    Directions `(n, d)`, float32, along which the residual stream raises the logits of tokens above the mean logit:
    rows of the output head minus their mean, times the weight of the final norm (centred where that norm centres).

    What scales a state (the norm's division, Gemma's and Cohere's factors) is left out: a direction has no length.
    Collective on sharded models.
    """
    head = model.get_output_embeddings()
    rows = _rows(head, ids)
    gain, centres = _gain(final_norm(model))
    folded: Tensor = rows * gain
    return folded - folded.mean(1, keepdim=True) if centres else folded


@torch.no_grad()
def embedding_points(model: Any, ids: Sequence[int]) -> Tensor:
    """Rows `(n, d)` of the input embedding, float32, as the paper takes them. Collective on sharded models."""
    module = model.get_input_embeddings()
    with whole_weights(module):
        weight = _whole(module.weight)
        return weight[list(ids)].float().cpu()


def final_norm(model: Any) -> nn.Module:
    """
    The norm before the output head.

    Raises:
        ValueError: there is none that is known.
    """
    decoder: Any = base_model(model)
    decoder = decoder.base_model
    for name, module in decoder.named_modules():
        if name.rpartition(".")[2] in _NORMS and name.count(".") <= 1 and hasattr(module, "weight"):
            return module
    raise ValueError(
        f"{type(decoder).__name__} has no final norm that is known here (looked for {', '.join(_NORMS)}); use another "
        "source of concepts."
    )


def _rows(head: nn.Module, ids: Sequence[int]) -> Tensor:
    plain: Any = getattr(head, "base_layer", head)
    with whole_weights(plain):
        weight = _whole(plain.weight)
        mean = torch.zeros(weight.shape[1], dtype=torch.float64)
        for start in range(0, len(weight), 8192):
            mean += weight[start : start + 8192].double().sum(0).cpu()
        return weight[list(ids)].float().cpu() - (mean / len(weight)).float()


def _gain(norm: nn.Module) -> tuple[Tensor, bool]:
    """The factor `(d,)` of a norm, and whether it subtracts the mean: found by asking the norm itself."""
    with whole_weights(norm):
        # called without the hooks of an engine, with whole weights in float32; FSDP2's class refuses copy()
        alone: Any = object.__new__(type(norm))
        alone.__dict__.update(norm.__dict__)
        alone._parameters = {
            name: None if value is None else nn.Parameter(_whole(value).float().cpu(), requires_grad=False)
            for name, value in norm._parameters.items()
        }
        width = next(value.numel() for value in alone._parameters.values() if value is not None)
        probe = torch.linspace(1.0, 2.0, width) * (-1.0) ** torch.arange(width)
        centres = torch.allclose(alone.forward(probe + 3.0), alone.forward(probe), rtol=1e-3, atol=1e-4)
        odd = (alone.forward(probe) - alone.forward(-probe)) / 2.0  # a bias drops out
    unit = probe - probe.mean() if centres else probe
    return odd / (unit / unit.square().mean().sqrt()), centres


def _whole(weight: Any) -> Tensor:
    weight = weight.detach()
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight
