"""Hidden states of chosen layers, taken out of a forward pass with their graph.

Shapes: B batch, T tokens, d model width, n blocks of the decoder.

Layers are counted as Transformers does in `hidden_states`: layer L is the output of block L, 1 <= L <= n, and negative
numbers count from the end (-1 is n). The one difference is the last: `outputs.hidden_states[-1]` of Transformers comes
after the final norm, a tap on layer n before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Layer = int | str
"""Number of a block, or path of a module in the base model, like `"model.layers.3.mlp"`."""


@contextmanager
def hidden_states(model: nn.Module, layers: Layer | Sequence[Layer]) -> Iterator[dict[Layer, Tensor]]:
    """
    Collects the outputs of layers during the one forward pass inside the context.

    The pass runs to its end: engines that shard weights need every rank in every module. Nothing is detached, so a
    loss on a tap reaches all earlier layers. Blocks that gradient checkpointing computes again in backward are not
    taken a second time.

    Args:
        model (`nn.Module`):
            The model that will be called: a decoder, with adapters or not, or what an engine has made of it (DDP,
            DeepSpeed, FSDP2).
        layers (`int`, `str` or `Sequence`):
            1 to n, -n to -1, or module paths in the base model (without the prefixes of PEFT and of engines).

    Yields:
        `dict[Layer, Tensor]`: hidden states `(B, T, d)` by layer as it was asked for; filled by the forward pass.

    Raises:
        ValueError: a layer does not exist, or what it puts out is not `(B, T, d)`.
        RuntimeError: the model was called twice or not at all, a layer was called twice or not at all, or re-entrant
            checkpointing has cut its graph.

    Example:
        ```python
        with hidden_states(model, [4, -1]) as hidden:
            model(input_ids=ids, attention_mask=mask, use_cache=False)
        hidden[4]  # (B, T, d)
        ```
    """
    wanted = [layers] if isinstance(layers, int | str) else list(layers)
    blocks = None if all(isinstance(layer, str) for layer in wanted) else _blocks(model)
    modules = {layer: _module_of(model, layer, blocks) for layer in wanted}
    root = _without_engine(model)
    taps = _Taps()
    handles: list[Any] = []
    try:
        handles.append(root.register_forward_pre_hook(taps.enter))
        for layer, module in modules.items():
            # behind the hooks of engines, which put into the graph what fetches the weights in backward
            handles.append(module.register_forward_hook(taps.taker(layer)))
        handles.append(root.register_forward_hook(taps.leave, always_call=True))
        yield taps.taken
    finally:
        for handle in handles:
            handle.remove()
    taps.check(wanted)


def num_layers(model: nn.Module) -> int:
    """
    Number of blocks of a decoder.

    Raises:
        ValueError: the list of blocks is missing or ambiguous.
    """
    return len(_blocks(model))


def block(model: nn.Module, layer: int) -> nn.Module:
    """
    The block whose output layer `layer` is.

    Raises:
        TypeError: not a number.
        ValueError: no such block.
    """
    return _module_of(model, _position(layer, num_layers(model)), _blocks(model))


def resolve_layer(model: nn.Module, layer: Layer) -> Layer:
    """
    The layer in its one spelling: a number from 1 to n, or the module path as it is.

    Raises:
        TypeError: neither a number nor a path.
        ValueError: no such layer or module.
    """
    if isinstance(layer, str):
        _module_of(model, layer, None)
        return layer
    return _position(layer, num_layers(model))


class _Taps:
    """The state of one context: what was taken, and whether the model is in its forward pass."""

    def __init__(self) -> None:
        self.taken: dict[Layer, Tensor] = {}
        self._calls = 0
        self._inside = False
        self._grad = False

    def enter(self, module: nn.Module, arguments: Any) -> None:
        self._calls += 1
        if self._calls > 1:
            raise RuntimeError(
                "The model was called a second time inside hidden_states(...), which holds the states of one forward "
                "pass. Open a context for each pass, or stack the batches."
            )
        self._inside, self._grad = True, torch.is_grad_enabled()

    def leave(self, module: nn.Module, arguments: Any, output: Any) -> None:
        self._inside = False

    def taker(self, layer: Layer) -> Callable[[nn.Module, Any, Any], None]:
        def take(module: nn.Module, arguments: Any, output: Any) -> None:
            if not self._inside:  # checkpointing computes it again, in backward
                return
            if layer in self.taken:
                raise RuntimeError(f"Layer {layer!r} was called twice in one forward pass; tap a module that is not.")
            if self._grad and not torch.is_grad_enabled():
                raise RuntimeError(
                    f"Layer {layer!r} is computed without gradient, inside re-entrant gradient checkpointing. Set "
                    'gradient_checkpointing_kwargs={"use_reentrant": False}, or tap whole blocks.'
                )
            self.taken[layer] = _hidden(output, layer)

        return take

    def check(self, wanted: Sequence[Layer]) -> None:
        missing = [layer for layer in wanted if layer not in self.taken]
        if not missing:
            return
        if not self._calls:
            raise RuntimeError(
                "The model that was given to hidden_states(...) was not called inside the context; give it the model "
                "that is called there, not a part of it. (A compiled model does not see hooks that come later.)"
            )
        raise RuntimeError(f"Layers {missing} took no part in the forward pass; choose modules that the model calls.")


def _hidden(output: Any, layer: Layer) -> Tensor:
    value = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(value, Tensor) or value.dim() != 3:
        shown = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"Layer {layer!r} puts out {shown}; expected hidden states of shape (B, T, d). Give the path of a module "
            "that does."
        )
    return value


def _without_engine(model: nn.Module) -> nn.Module:
    """The model inside DDP, a DeepSpeed engine or torch.compile; FSDP2 and PEFT stay."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        inner = inner if isinstance(inner, nn.Module) else getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def base_model(model: nn.Module) -> nn.Module:
    """The decoder with its head, without engine and PEFT."""
    model = _without_engine(model)
    get_base_model = getattr(model, "get_base_model", None)
    return get_base_model() if callable(get_base_model) else model


def _position(layer: int, n: int) -> int:
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise TypeError(f"layer is {layer!r}; expected the number of a block (int) or the path of a module (str).")
    if layer == 0 or abs(layer) > n:
        raise ValueError(
            f"layer is {layer}, but the model has {n} blocks; expected 1 to {n}, or -{n} to -1 counted from the end "
            "(-1 is the last). For embeddings or parts of a block, give the module's path instead."
        )
    return layer if layer > 0 else n + 1 + layer


def _module_of(model: nn.Module, layer: Layer, blocks: nn.ModuleList | None) -> nn.Module:
    if not isinstance(layer, str):
        assert blocks is not None
        return blocks[_position(layer, len(blocks)) - 1]
    base = base_model(model)
    try:
        return base.get_submodule(layer)
    except AttributeError:
        raise ValueError(
            f"{type(base).__name__} has no module {layer!r}; expected a path as in named_modules() of the base model, "
            'such as "model.layers.3.mlp".'
        ) from None


def _blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder's list of blocks: as long as its config says, and inside of no other such list."""
    base: Any = base_model(model)
    config: Any = getattr(base, "config", None)
    # the text part of a model with several
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    n = getattr(text, "num_hidden_layers", None)
    if not isinstance(n, int):
        raise ValueError(
            f"{type(base).__name__} does not say in its config how many blocks it has (num_hidden_layers); give the "
            "path of a module instead of a number."
        )
    # an encoder for pictures may have as many blocks
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else base
    found: dict[str, nn.ModuleList] = {}
    for name, module in decoder.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) != n:
            continue
        if not any(not outer or name.startswith(f"{outer}.") for outer in found):  # as many experts as blocks
            found[name] = module
    if len(found) != 1:
        shown = f"{len(found)} lists of modules of that length ({', '.join(found)})" if found else "no list that long"
        raise ValueError(
            f"{type(base).__name__} has {n} blocks by its config, and {type(decoder).__name__} holds {shown}; cannot "
            "tell which are the blocks. Give the path of a module instead of a number."
        )
    return next(iter(found.values()))
