"""The second matrix of a block's MLP: the one that writes into the residual stream.

Shapes: m inner width of the MLP (its input), d model width (its output).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..probes.taps import base_model, block, resolve_layer

# By family: Llama, Qwen, Mistral, Gemma, Phi-3; GPT-2; GPT-NeoX; Phi; OPT.
_PATHS = ("mlp.down_proj", "mlp.c_proj", "mlp.dense_4h_to_h", "mlp.fc2", "fc2")
_EXPERTS = ("experts", "router", "shared_expert", "block_sparse_moe")


@dataclass(frozen=True, kw_only=True)
class MlpOutput:
    """
    Where a block's MLP writes its output.

    Args:
        layer (`int`):
            Number of the block, from 1.
        path (`str`):
            The module's path in the base model, without prefixes of PEFT and of engines.
        module (`nn.Module`):
            The linear layer, or the adapter's layer around it.
        in_features, out_features (`int`):
            m and d.
        transposed (`bool`):
            Whether the weight is stored as `(m, d)`: GPT-2's Conv1D.
    """

    layer: int
    path: str
    module: nn.Module
    in_features: int
    out_features: int
    transposed: bool


def mlp_output(model: nn.Module, layer: int) -> MlpOutput:
    """
    Finds the second MLP matrix of a block.

    Args:
        model (`nn.Module`):
            A decoder, with adapters or not, or what an engine has made of it.
        layer (`int`):
            1 to n, or -n to -1.

    Raises:
        TypeError: `layer` is not a number.
        ValueError: no such block, a mixture of experts, or an architecture whose MLP is not known.
    """
    number = resolve_layer(model, layer)
    assert isinstance(number, int), "a number stays one"
    inside = block(model, number)
    experts = [name for name, _ in inside.named_modules() if name.rpartition(".")[2] in _EXPERTS]
    if experts:
        raise ValueError(
            f"Block {number} is a mixture of experts ({experts[0]}): each token goes through some of its matrices "
            "only, and Transformers keeps them in one tensor that no adapter changes one by one. Choose a block with "
            "a plain MLP, or edit a dense model."
        )
    for path in _PATHS:
        module = _submodule(inside, path)
        if module is not None:
            return _describe(number, _whole_path(model, inside, path), module)
    raise ValueError(
        f"Block {number} ({type(inside).__name__}) has no MLP that is known here; looked for {', '.join(_PATHS)}."
    )


def _submodule(inside: nn.Module, path: str) -> nn.Module | None:
    try:
        return inside.get_submodule(path)
    except AttributeError:
        return None


def _whole_path(model: nn.Module, inside: nn.Module, path: str) -> str:
    """Path from the base model's root: what PEFT's `target_modules` and a saved plan name it by."""
    prefix = next(name for name, module in base_model(model).named_modules() if module is inside)
    return f"{prefix}.{path}"


def _describe(layer: int, path: str, module: nn.Module) -> MlpOutput:
    plain: Any = getattr(module, "base_layer", module)  # an adapter's layer wraps the matrix
    if hasattr(plain, "nf") and hasattr(plain, "nx"):  # transformers' Conv1D
        return MlpOutput(
            layer=layer, path=path, module=module, in_features=plain.nx, out_features=plain.nf, transposed=True
        )
    if not hasattr(plain, "in_features"):
        raise ValueError(f"{path} is a {type(plain).__name__}; expected a linear layer.")
    return MlpOutput(
        layer=layer,
        path=path,
        module=module,
        in_features=plain.in_features,
        out_features=plain.out_features,
        transposed=False,
    )
