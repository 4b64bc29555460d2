"""Quantisation: round every linear weight to a few bits, and see whether what was forgotten is back.

An unlearned model whose weights moved less than half a step of the grid rounds back to the model it came from. No
data and no accelerator are needed: the weights are rounded and stored in the type they had.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_unlearn.attacks.rows import RowScores, own_copy, plain_copy, score_rows
from hf_unlearn.attacks.summary import EXAMPLES, clustered_mean, errors_of, mean_measure, shortened
from hf_unlearn.reports.outcomes import AttackOutcome, Curve, Example, Subject

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class QuantiseConfig:
    """
    The grid.

    Args:
        bits (`int`, *optional*, defaults to `4`):
            8 and 4 are usual; from 2 to 8. The grid is symmetric: 2^bits - 1 values, 0 among them.
        group_size (`int`, *optional*):
            Inputs that share a scale; by default all inputs of an output row do. The last group of a row may be
            shorter.
        head (`bool`, *optional*, defaults to `False`):
            Whether the language-modelling head is rounded as well. If it is tied to the embedding, the copy gets a
            head of its own: embeddings are never rounded.
    """

    bits: int = 4
    group_size: int | None = None
    head: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits is {self.bits}; expected a number from 2 to 8 (usually 8 or 4).")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size is {self.group_size}; expected None (a whole row) or at least 1.")


@dataclass(frozen=True, kw_only=True, eq=False)
class QuantiseResult:
    """
    The rounded copy, and how far it is from the original.

    Args:
        model (`PreTrainedModel`):
            The copy; it shares no storage with the original.
        rounded (`tuple[str, ...]`):
            Names of the modules whose weights were rounded.
        untied (`tuple[str, ...]`):
            Those of them that had shared their weight with an embedding and now have one of their own.
        share (`float`):
            Rounded parameters / all parameters of the original, each counted once.
        relative_error (`float`):
            Frobenius norm of the change / norm of the rounded weights.
    """

    model: Any = field(repr=False)
    rounded: tuple[str, ...] = field(repr=False)
    untied: tuple[str, ...]
    share: float
    relative_error: float


@torch.no_grad()
def quantise(model: Any, config: QuantiseConfig | None = None) -> QuantiseResult:
    r"""
    Copies `model` and rounds its linear weights (`nn.Linear` and transformers' `Conv1D`) to the nearest point of

    $$\{-s q, \dots, -s, 0, s, \dots, s q\}, \qquad q = 2^{b-1} - 1, \quad s = \max |w| / q$$

    with a scale s for each output row or group. Embeddings, norms, biases and, by default, the head keep their
    values. A weight that several linear modules share is rounded once and stays shared.

    Args:
        model (`PreTrainedModel`):
            The unlearned model, or the control; it is not changed. Memory for a second one is needed.
        config ([`QuantiseConfig`], *optional*):
            The grid.

    Raises:
        TypeError: a PEFT model (adapters are merged first), weights that are already quantised, or a model that
            accelerate has spread over devices.
        ValueError: nothing to round, or a weight that is not finite.
    """
    config = config or QuantiseConfig()
    _check(model)
    total = sum(parameter.numel() for parameter in model.parameters())
    twin = own_copy(model)
    for parameter in twin.parameters():
        parameter.grad = None
    head = twin.get_output_embeddings()
    embedded = {id(module.weight) for module in twin.modules() if isinstance(module, nn.Embedding)}
    linear = [(name, module) for name, module in _linear_modules(twin) if config.head or module is not head]
    if not linear:
        raise ValueError(
            f"{type(model).__name__} has no Linear or Conv1D module to round (the head does not count unless "
            "head=True); expected a decoder with linear layers."
        )
    _warn_of_others(twin, head)
    seen: set[int] = set()
    untied: list[str] = []
    squares, changes, count = 0.0, 0.0, 0
    for name, module in linear:
        weight = module.weight
        if id(weight) in seen:
            continue
        stored_transposed = not isinstance(module, nn.Linear)
        before = weight.T if stored_transposed else weight
        try:
            after = round_to_nearest(before, config.bits, config.group_size)
        except ValueError as error:
            raise ValueError(f"The weight of {name!r} cannot be rounded: {error}") from error
        squares += float(before.double().square().sum())
        changes += float((before.double() - after.double()).square().sum())
        count += weight.numel()
        after = after.T if stored_transposed else after
        if id(weight) in embedded:
            module.weight = nn.Parameter(after.contiguous(), requires_grad=weight.requires_grad)
            untied.append(name)
            if module is head:  # so that the copy is saved and loaded with both
                twin.config.tie_word_embeddings = False
        else:
            weight.copy_(after)
        seen.add(id(module.weight))
    return QuantiseResult(
        model=twin,
        rounded=tuple(name for name, _ in linear),
        untied=tuple(untied),
        share=count / total,
        relative_error=(changes / squares) ** 0.5 if squares else 0.0,
    )


@dataclass(frozen=True, kw_only=True)
class RoundingConfig:
    """
    Which grids are tried, and how the rows are scored on each.

    Args:
        bits (`tuple[int, ...]`, *optional*, defaults to `(8, 4)`):
            One rounded copy for each.
        group_size (`int`, *optional*), head (`bool`, *optional*, defaults to `False`):
            As in [`QuantiseConfig`].
        max_new_tokens (`int`, *optional*, defaults to `200`):
            Longest answer in tokens.
        batch_size (`int`, *optional*, defaults to `64`):
            Rows a pass.
    """

    bits: tuple[int, ...] = (8, 4)
    group_size: int | None = None
    head: bool = False
    max_new_tokens: int = 200
    batch_size: int = 64

    def __post_init__(self) -> None:
        if not self.bits or len(set(self.bits)) != len(self.bits):
            raise ValueError(f"bits is {self.bits}; expected different numbers of bits, at least one.")
        for bits in self.bits:
            QuantiseConfig(bits=bits, group_size=self.group_size)
        if self.max_new_tokens < 1 or self.batch_size < 1:
            raise ValueError(
                f"max_new_tokens is {self.max_new_tokens}, batch_size {self.batch_size}; both must be at least 1."
            )


@dataclass(frozen=True, kw_only=True)
class RoundingResult:
    """
    What a model gives of the rows as it is, and rounded.

    Args:
        plain ([`RowScores`]): the model as it is.
        stored_bits (`int`): bits of a weight as it is.
        rounded (`Mapping[int, RowScores]`): by bits.
        relative_error (`Mapping[int, float]`): by bits, how far the weights moved.
    """

    plain: RowScores
    stored_bits: int
    rounded: Mapping[int, RowScores]
    relative_error: Mapping[int, float]


def run(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    config: RoundingConfig | None = None,
    *,
    description: str | None = None,
) -> RoundingResult:
    """
    Scores the rows on the model, and on rounded copies of it.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The unlearned model, or the control; adapters are merged in a copy, and it is not changed.
        tokenizer (`PreTrainedTokenizerBase`):
            Its tokenizer.
        rows (`Sequence[Mapping]`):
            Rows with a prompt and a response, in any format of [`tokenize_example`].
        config ([`RoundingConfig`], *optional*):
            The grids.
        description (`str`, *optional*):
            Text of the progress bars.

    Raises:
        TypeError, ValueError: as in [`quantise`] and [`score_rows`].
    """
    config = config or RoundingConfig()
    if hasattr(model, "peft_config"):
        model = plain_copy(model)
    _check(model)

    def score(which: Any, label: str) -> RowScores:
        return score_rows(
            which,
            tokenizer,
            rows,
            max_new_tokens=config.max_new_tokens,
            batch_size=config.batch_size,
            description=None if description is None else f"{description}: {label}",
        )

    plain = score(model, "as it is")
    rounded, moved = {}, {}
    for bits in config.bits:
        found = quantise(model, QuantiseConfig(bits=bits, group_size=config.group_size, head=config.head))
        rounded[bits], moved[bits] = score(found.model, f"{bits} bits"), found.relative_error
        del found  # a copy at a time
    stored = 8 * next(model.parameters()).element_size()
    return RoundingResult(plain=plain, stored_bits=stored, rounded=rounded, relative_error=moved)


def outcome(
    result: RoundingResult,
    subject: Subject = "unlearned",
    *,
    settings: Mapping[str, Any] | None = None,
    seconds: float = math.nan,
) -> AttackOutcome:
    """The result in the form of attacks.json; arguments as in [`prefill.outcome`]."""
    levels = [("as it is", result.stored_bits, result.plain)]
    levels += [(f"{bits} bits", bits, scores) for bits, scores in result.rounded.items()]
    measures = [
        mean_measure(f"{name}, {label}", subject, values)
        for label, _, scores in levels
        for name, values in (("probability", scores.probability), ("ROUGE-L recall", scores.rouge))
    ]
    ordered = sorted(levels, key=lambda level: level[1])
    curves = []
    for name in ("probability", "ROUGE-L recall"):
        means = [clustered_mean(s.probability if name == "probability" else s.rouge) for _, _, s in ordered]
        curves.append(
            Curve(
                name=name,
                subject=subject,
                x=tuple(float(bits) for _, bits, _ in ordered),
                y=tuple(mean.value for mean in means),
                x_label="bits of a weight",
                y_label="share",
                standard_error=errors_of(means),
            )
        )
    label, _, fewest = levels[-1]
    examples = [
        Example(prompt=f"row {number}, {label}", answer=shortened(answer), subject=subject)
        for number, answer in enumerate(fewest.answers[:EXAMPLES])
    ]
    return AttackOutcome(
        attack="quantise",
        settings=settings or {},
        measures=tuple(measures),
        curves=tuple(curves),
        examples=tuple(examples),
        seconds=seconds,
    )


def round_to_nearest(weight: Tensor, bits: int, group_size: int | None = None) -> Tensor:
    """
    The nearest point of a symmetric grid of `2^bits - 1` values, halves to the even one.

    Args:
        weight (`Tensor`):
            Shape `(d, m)`: d outputs, m inputs. Half types are rounded in float32.
        bits (`int`):
            At least 2.
        group_size (`int`, *optional*):
            Inputs that share a scale; a whole row by default. The last group may be shorter.

    Returns:
        `Tensor`: `(d, m)` in the type of `weight`, a new tensor. A group of zeros stays zero.

    Raises:
        ValueError: no matrix, too few bits, or a weight that is not finite.
    """
    if weight.dim() != 2 or bits < 2:
        raise ValueError(f"got a shape of {tuple(weight.shape)} and {bits} bits; expected (d, m) and at least 2 bits.")
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("it holds NaN or infinite values; check the training run that made it.")
    top = 2 ** (bits - 1) - 1
    exact = weight if weight.dtype == torch.float64 else weight.float()
    parts = exact.split(group_size or max(weight.shape[1], 1), dim=1)
    rounded = []
    for part in parts:
        scale = part.abs().amax(1, keepdim=True) / top if part.numel() else part
        # 0 / 0 where a whole group is zero, or so small that its scale is
        steps = (part / torch.where(scale > 0, scale, 1.0)).round().clamp(-top, top)
        rounded.append(steps * scale)
    return torch.cat(rounded, dim=1).to(weight.dtype)


def _linear_modules(model: Any) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        # Conv1D by its attributes: it is Linear with a transposed weight
        if isinstance(module, nn.Linear) or (hasattr(module, "nf") and hasattr(module, "nx")):
            yield name, module


def _check(model: Any) -> None:
    if hasattr(model, "peft_config"):
        raise TypeError(
            "The model has PEFT adapters, and rounding them apart from the weights they belong to is another model. "
            "Merge them first: `quantise(copy.deepcopy(model).merge_and_unload())`."
        )
    for name, module in model.named_modules():
        if hasattr(module, "_hf_hook"):  # its forward is bound to the original: a copy would compute with old weights
            raise TypeError(
                f"{name or type(module).__name__!r} has hooks of accelerate (device_map). Load the model on one "
                "device, without device_map."
            )
    for name, module in _linear_modules(model):
        if not module.weight.is_floating_point():
            raise TypeError(
                f"The weight of {name!r} is stored as {module.weight.dtype}: the model is already quantised. Load it "
                "in bfloat16 or float32."
            )


def _warn_of_others(model: Any, head: Any) -> None:
    """Matrices that are in no Linear, Conv1D or Embedding: experts that a mixture keeps in one tensor, for example."""
    known = {id(module.weight) for _, module in _linear_modules(model)}
    known |= {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    if head is not None:
        known.add(id(head.weight))
    others = [name for name, value in model.named_parameters() if value.dim() >= 2 and id(value) not in known]
    if others:
        warnings.warn(
            f"{len(others)} parameters with two or more dimensions are in no Linear or Conv1D module and keep their "
            f"values, the first is {others[0]!r}. The attack is weaker than the rounding of all weights.",
            stacklevel=3,
        )
