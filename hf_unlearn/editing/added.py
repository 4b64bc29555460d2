"""An edit in force without touching a weight: its product is added to what the matrix puts out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .mlp import mlp_output

if TYPE_CHECKING:
    from .plan import LayerEdit

Term = Callable[[Tensor], Tensor]


@contextmanager
def added_outputs(model: Any, terms: Mapping[int, Term]) -> Iterator[None]:
    """
    Context in which the second MLP matrix of some blocks puts out `W h + term(h)`.

    Weights are neither read nor written, so that it works on every engine and on quantised models, and is gone
    afterwards whatever happens. Gradients flow through the terms.

    Args:
        model (`PreTrainedModel`, or what PEFT or an engine has made of it):
            The model.
        terms (`Mapping[int, Callable]`):
            By block (1 to n, or -n to -1): a function from the inputs `(..., m)` in float32 to what is added,
            `(..., d)`. The sum is taken in float32 and rounded to the type of the output.
    """
    handles = []
    try:
        for layer, term in terms.items():
            handles.append(mlp_output(model, layer).module.register_forward_hook(_adding(term)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def edits_in_force(model: Any, edits: Sequence[LayerEdit]) -> Any:
    """Context of [`added_outputs`] with the low-rank products of a plan's edits."""
    return added_outputs(model, {edit.layer: _low_rank(edit) for edit in edits if len(edit.lora_a)})


def _low_rank(edit: LayerEdit) -> Term:
    held: dict[Any, tuple[Tensor, Tensor]] = {}

    def term(inputs: Tensor) -> Tensor:
        if inputs.device not in held:
            held[inputs.device] = (edit.lora_a.float().to(inputs.device), edit.lora_b.float().to(inputs.device))
        a, b = held[inputs.device]
        return (inputs @ a.T) @ b.T

    return term


def _adding(term: Term) -> Any:
    def add(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        return (output.float() + term(arguments[0].float())).to(output.dtype)

    return add
