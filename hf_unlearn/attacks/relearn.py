"""Relearning: fine-tune on a part of the forgotten rows, and look at the part that was never shown.

What comes back without being shown was hidden and not removed. A model that never saw any of the rows, fine-tuned in
the same way, is the control: what it gets is learned from the shown rows, not recovered.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from hf_unlearn.attacks.rows import encode_rows, plain_copy
from hf_unlearn.attacks.summary import clustered_mean, errors_of, mean_measure
from hf_unlearn.data import pad_rows, tokenize_example
from hf_unlearn.metrics.generate import padding_id
from hf_unlearn.metrics.likelihood import mean_nll
from hf_unlearn.metrics.parts import evenly_spaced
from hf_unlearn.reports.outcomes import AttackOutcome, Curve, Measure, Subject

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WATCHED = 256  # benign rows that are measured


@dataclass(frozen=True, kw_only=True)
class RelearnConfig:
    """
    The attacker's means.

    Args:
        fraction (`float`, *optional*, defaults to `0.25`):
            Share of the rows that the attacker has.
        steps (`tuple[int, ...]`, *optional*, defaults to `(0, 10, 25, 50)`):
            Optimizer steps after which is measured.
        learning_rate (`float`, *optional*, defaults to `2e-4`):
            Of AdamW, constant.
        batch_size (`int`, *optional*, defaults to `16`):
            Rows a step.
        eval_batch_size (`int`, *optional*, defaults to `64`):
            Rows a forward pass when measuring.
        max_grad_norm (`float`, *optional*, defaults to `1.0`):
            Gradients are clipped to this norm.
        seed (`int`, *optional*, defaults to `0`):
            Of the choice of rows and of their order.
        method (`Literal["full", "lora"]`, *optional*, defaults to `"full"`):
            Whether all weights are trained, or an adapter on all linear layers, which is merged in the end.
        lora_rank (`int`, *optional*, defaults to `128`):
            Rank of the adapter; its alpha is the same, so that its scale is 1.
        repeats (`int`, *optional*, defaults to `1`):
            [`run`] attacks so many times, with seed, seed + 1, ...: other rows are shown, in other orders.
    """

    fraction: float = 0.25
    steps: tuple[int, ...] = (0, 10, 25, 50)
    learning_rate: float = 2e-4
    batch_size: int = 16
    eval_batch_size: int = 64
    max_grad_norm: float = 1.0
    seed: int = 0
    method: Literal["full", "lora"] = "full"
    lora_rank: int = 128
    repeats: int = 1

    def __post_init__(self) -> None:
        if self.method not in ("full", "lora"):
            raise ValueError(f"method is {self.method!r}; expected 'full' or 'lora'.")
        if self.lora_rank < 1 or self.repeats < 1:
            raise ValueError(f"lora_rank is {self.lora_rank}, repeats {self.repeats}; both must be positive.")
        if not 0 < self.fraction < 1:
            raise ValueError(
                f"fraction is {self.fraction}; expected a share of the rows between 0 and 1, both excluded."
            )
        if not self.steps or list(self.steps) != sorted(set(self.steps)) or self.steps[0] < 0:
            raise ValueError(f"steps is {self.steps}; expected rising numbers of steps, from 0.")
        for name in ("batch_size", "eval_batch_size", "learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive.")


@dataclass(frozen=True, kw_only=True)
class RelearnResult:
    """
    Probabilities (geometric mean over a row's response tokens, mean over rows) after each number of steps.

    Args:
        steps (`tuple[int, ...]`):
            Optimizer steps.
        shown (`tuple[float, ...]`):
            Of the rows that were fine-tuned on: forgotten ones, or at most 256 of the benign ones.
        unseen (`tuple[float, ...]`):
            Of the forgotten rows that were not: the recovery.
        shown_rows (`tuple[int, ...]`):
            Numbers of the shown rows; none for an attack with benign rows.
        unseen_rows (`tuple[int, ...]`):
            Numbers of the u forgotten rows that were not shown.
        unseen_each (`tuple[tuple[float, ...], ...]`):
            u probabilities after each number of steps, whose means are `unseen`.
    """

    steps: tuple[int, ...]
    shown: tuple[float, ...]
    unseen: tuple[float, ...]
    shown_rows: tuple[int, ...] = field(repr=False)
    unseen_rows: tuple[int, ...] = field(default=(), repr=False)
    unseen_each: tuple[tuple[float, ...], ...] = field(default=(), repr=False)


def relearn(
    model: Any,
    rows: Sequence[Mapping[str, Any]],
    *,
    pad_token_id: int,
    config: RelearnConfig | None = None,
    benign: Sequence[Mapping[str, Any]] | None = None,
    description: str | None = None,
) -> RelearnResult:
    """
    Fine-tunes `model`, in place, on a part of the forgotten rows, or on other ones. [`run`] does it to a copy.

    Args:
        model (`PreTrainedModel`):
            The unlearned model, or the control. All its parameters are trained: pass a copy.
        rows (`Sequence[Mapping]`):
            The forgotten rows, tokenised: `input_ids` and `labels`, lists of one length.
        pad_token_id (`int`):
            Id to pad with.
        config ([`RelearnConfig`], *optional*):
            The attacker's means.
        benign (`Sequence[Mapping]`, *optional*):
            Rows that have nothing to do with the forgotten ones, tokenised. They are fine-tuned on, all of them and
            in place of forgotten rows; `fraction` is not used, and all forgotten rows are unseen.
        description (`str`, *optional*):
            Text of a progress bar.

    Raises:
        ValueError: too few rows to have a shown and an unseen part, or no benign rows.
    """
    config = config or RelearnConfig()
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):  # for dropout: one seed, one result, and the caller's draws stay
        torch.manual_seed(config.seed)
        return _relearn(model, rows, pad_token_id, config, benign, description)


def shown_count(number: int, config: RelearnConfig) -> int:
    """
    How many of so many forgotten rows are shown.

    Raises:
        ValueError: too few rows to have a shown and an unseen part.
    """
    count = round(config.fraction * number)
    if not 0 < count < number:
        raise ValueError(
            f"{number} rows and fraction {config.fraction} leave {count} shown rows; expected at least one shown "
            "and one unseen row."
        )
    return count


def _relearn(
    model: Any,
    rows: Sequence[Mapping[str, Any]],
    pad_token_id: int,
    config: RelearnConfig,
    benign: Sequence[Mapping[str, Any]] | None,
    description: str | None,
) -> RelearnResult:
    order = np.random.default_rng(config.seed).permutation(len(rows)).tolist()
    count = 0 if benign is not None else shown_count(len(rows), config)
    if benign is not None and not len(benign):
        raise ValueError("There are no benign rows to fine-tune on; expected at least one.")
    shown, unseen = sorted(order[:count]), sorted(order[count:])
    lesson = list(benign) if benign is not None else [rows[i] for i in shown]
    hidden = [rows[i] for i in unseen]
    # benign data may be a corpus: a part of it shows as well that it was learned
    watched = [lesson[i] for i in evenly_spaced(len(lesson), _WATCHED)] if benign is not None else lesson
    trained = _with_adapter(model, config) if config.method == "lora" else model.requires_grad_(True)
    weights = [parameter for parameter in trained.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=config.learning_rate, weight_decay=0.0)
    batches = _batches(range(len(lesson)), config)
    found: dict[str, list[tuple[float, ...]]] = {"shown": [], "unseen": []}

    def measure() -> None:
        for name, part in (("shown", watched), ("unseen", hidden)):
            nll = mean_nll(trained, part, pad_token_id=pad_token_id, batch_size=config.eval_batch_size)
            found[name].append(tuple(float(value) for value in np.exp(-nll)))

    for step in tqdm(range(config.steps[-1] + 1), desc=description, disable=description is None, leave=False):
        if step in config.steps:
            measure()
        if step == config.steps[-1]:
            break
        batch = pad_rows([lesson[i] for i in next(batches)], pad_token_id=pad_token_id)
        ids, mask, labels = (batch[key].to(model.device) for key in ("input_ids", "attention_mask", "labels"))
        trained.train()
        logits = trained(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits.float().flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, config.max_grad_norm)
        optimizer.step()
    if config.method == "lora":
        trained.merge_and_unload()
    model.requires_grad_(True).zero_grad(set_to_none=True)
    model.eval()
    return RelearnResult(
        steps=config.steps,
        shown=tuple(float(np.mean(values)) for values in found["shown"]),
        unseen=tuple(float(np.mean(values)) for values in found["unseen"]),
        shown_rows=tuple(shown),
        unseen_rows=tuple(unseen),
        unseen_each=tuple(found["unseen"]),
    )


def _with_adapter(model: Any, config: RelearnConfig) -> Any:
    """The model with a fresh adapter in its linear layers, alone trainable."""
    from peft import LoraConfig, get_peft_model

    if hasattr(model, "peft_config"):
        raise TypeError("The model has adapters already; merge them first: `model = model.merge_and_unload()`.")
    lora = LoraConfig(
        r=config.lora_rank, lora_alpha=config.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return get_peft_model(model, lora)


def _batches(rows: Sequence[int], config: RelearnConfig) -> Any:
    """Row numbers, pass after pass, each in an order of its own."""
    rng = np.random.default_rng([config.seed, 1])
    while True:
        order = rng.permutation(len(rows)).tolist()
        for start in range(0, len(order), config.batch_size):
            yield [rows[i] for i in order[start : start + config.batch_size]]


@dataclass(frozen=True, kw_only=True)
class RelearnRuns:
    """
    One [`RelearnResult`] for each seed.

    Args:
        runs (`tuple[RelearnResult, ...]`): in the order of the seeds.
        benign (`bool`): whether benign rows were fine-tuned on.
    """

    runs: tuple[RelearnResult, ...]
    benign: bool

    def unseen_at(self, place: int) -> tuple[list[float], list[int]]:
        """Probabilities of all unseen rows of all runs at a number of steps (by its place), and the rows' numbers."""
        values = [value for result in self.runs for value in result.unseen_each[place]]
        return values, [row for result in self.runs for row in result.unseen_rows]


def run(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    config: RelearnConfig | None = None,
    *,
    benign: Sequence[Mapping[str, Any]] | None = None,
    description: str | None = None,
) -> RelearnRuns:
    """
    [`relearn`] on a copy of the model for each of `config.repeats` seeds: the attack in the form that all have.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The unlearned model, or the control; it is not changed. Adapters are merged in the copy, and if all
            weights are trained the copy is in float32.
        tokenizer (`PreTrainedTokenizerBase`):
            Its tokenizer.
        rows (`Sequence[Mapping]`):
            The forgotten rows, in any format of [`tokenize_example`].
        config ([`RelearnConfig`], *optional*):
            The attacker's means.
        benign (`Sequence[Mapping]`, *optional*):
            Rows to fine-tune on in place of forgotten ones, in any format.
        description (`str`, *optional*):
            Text of the progress bars.

    Raises:
        ValueError, TypeError: as in [`relearn`]; adapters on quantised weights.
    """
    config = config or RelearnConfig()
    encoded = encode_rows(rows, tokenizer)
    harmless = None if benign is None else [tokenize_example(row, tokenizer) for row in benign]
    found = []
    for number in range(config.repeats):
        label = description if config.repeats == 1 or description is None else f"{description}, seed {number}"
        attacker = replace(config, seed=config.seed + number)
        copied = plain_copy(model)
        if config.method == "full" and not getattr(copied, "is_quantized", False):
            copied = copied.float()  # steps of 1e-5 are rounded away in half precision: an attack that does nothing
        found.append(
            relearn(
                copied,
                encoded,
                pad_token_id=padding_id(tokenizer),
                config=attacker,
                benign=harmless,
                description=label,
            )
        )
        del copied  # before the next one is made
    return RelearnRuns(runs=tuple(found), benign=benign is not None)


def outcome(
    result: RelearnRuns,
    subject: Subject = "unlearned",
    *,
    settings: Mapping[str, Any] | None = None,
    seconds: float = math.nan,
) -> AttackOutcome:
    """
    The result in the form of attacks.json; arguments as in [`prefill.outcome`]. Standard errors are over rows; with
    several seeds their spread is a measure of its own.
    """
    steps = result.runs[0].steps
    hidden = "all forgotten rows" if result.benign else "rows never shown"
    means = [clustered_mean(*result.unseen_at(place)) for place in range(len(steps))]
    points = [
        mean_measure(f"probability of {hidden}, {steps[place]} steps", subject, *result.unseen_at(place))
        for place in sorted({0, len(steps) - 1})
    ]
    first, rows = result.unseen_at(0)
    last, _ = result.unseen_at(len(steps) - 1)
    gained = mean_measure(f"recovery of {hidden}", subject, np.subtract(last, first), rows)
    shown = [float(np.mean([found.shown[place] for found in result.runs])) for place in range(len(steps))]
    measures = [*points, gained]
    if len(result.runs) > 1:
        ends = [found.unseen[-1] - found.unseen[0] for found in result.runs]
        spread = float(np.std(ends, ddof=1))
        name = "recovery, standard deviation over seeds"
        measures.append(Measure(name=name, subject=subject, value=spread, n=len(ends)))
    x = tuple(float(step) for step in steps)
    curves = [
        Curve(
            name=name,
            subject=subject,
            x=x,
            y=y,
            x_label="optimizer steps of relearning",
            y_label="probability",
            standard_error=errors,
        )
        for name, y, errors in (
            (hidden, tuple(mean.value for mean in means), errors_of(means)),
            ("benign rows" if result.benign else "rows shown", tuple(shown), None),
        )
    ]
    return AttackOutcome(
        attack="relearn", settings=settings or {}, measures=tuple(measures), curves=tuple(curves), seconds=seconds
    )
