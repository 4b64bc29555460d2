"""Embedding-space attack: free vectors in front of an answer, optimised until the model gives it.

An upper bound of what attacks on the input reach, since no text has to produce the vectors. With enough of them and
enough steps they can write an answer into a model that never saw it: read the result beside that of such a model.

Shapes: n rows, B rows of a batch, T tokens of a row, p soft tokens, d width, V vocabulary.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_unlearn.attacks.rows import encode_rows
from hf_unlearn.attacks.summary import mean_measure
from hf_unlearn.data import pad_rows
from hf_unlearn.losses import IGNORE_INDEX, token_log_probs
from hf_unlearn.metrics.generate import padding_id
from hf_unlearn.metrics.likelihood import base_model, evaluation_mode, longest_first
from hf_unlearn.reports.outcomes import AttackOutcome, Curve, Subject

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class SoftPromptConfig:
    """
    The attacker's means. The attack is that of arXiv 2402.09063; the defaults are this library's own.

    Args:
        tokens (`int`, *optional*, defaults to `8`):
            Vectors that are added, p.
        steps (`int`, *optional*, defaults to `100`):
            Steps of Adam.
        learning_rate (`float`, *optional*, defaults to `0.1`):
            Of Adam, in units of the embedding table's root mean square, so that it means the same for all models.
        position (`Literal["start", "end"]`, *optional*, defaults to `"end"`):
            Where the vectors go: in front of everything, or between the prompt and the answer.
        shared (`bool`, *optional*, defaults to `False`):
            One soft prompt for all rows instead of one for each: what it recovers is not written into it row by row.
        batch_size (`int`, *optional*, defaults to `32`):
            Rows a pass. It changes no result beyond rounding.
        seed (`int`, *optional*, defaults to `0`):
            Of the vectors' start: the embeddings of ordinary tokens, drawn uniformly.
    """

    tokens: int = 8
    steps: int = 100
    learning_rate: float = 0.1
    position: Literal["start", "end"] = "end"
    shared: bool = False
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in (("tokens", 1), ("steps", 0), ("batch_size", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least {low}.")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate is {self.learning_rate}; expected a number above 0.")
        if self.position not in ("start", "end"):
            raise ValueError(f"position is {self.position!r}; expected 'start' or 'end'.")


@dataclass(frozen=True, kw_only=True, eq=False)
class SoftPromptResult:
    """
    Probabilities (geometric mean over a row's response tokens) before and under the attack.

    Args:
        before (`tuple[float, ...]`):
            n, of the rows as they are.
        after (`tuple[float, ...]`):
            n, with the soft prompts that are returned.
        losses (`tuple[float, ...]`):
            `steps + 1` means over rows of the NLL in nats, at the start and after each step.
        embeddings (`Tensor`):
            The best soft prompts that were seen, for each row on its own: `(n, p, d)` float32 on the CPU, or
            `(1, p, d)` if shared.
    """

    before: tuple[float, ...]
    after: tuple[float, ...]
    losses: tuple[float, ...] = field(repr=False)
    embeddings: Tensor = field(repr=False)


def soft_prompt(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    config: SoftPromptConfig | None = None,
    *,
    description: str | None = None,
) -> SoftPromptResult:
    r"""
    Finds, for each row with prompt x and response y, vectors e that minimise the mean NLL of the response

    $$-\frac{1}{|y|} \sum_t \log p(y_t \mid E(x), e, E(y_{<t}))$$

    and keeps the best that were seen on the way. No weight, gradient, mode or `requires_grad` of the model is
    different afterwards, whatever happens.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The unlearned model, or the control; it must accept `inputs_embeds`.
        tokenizer (`PreTrainedTokenizerBase`):
            Its tokenizer.
        rows (`Sequence[Mapping]`):
            n rows with a prompt and a response, in any format of [`tokenize_example`].
        config ([`SoftPromptConfig`], *optional*):
            The attacker's means.
        description (`str`, *optional*):
            Text of a progress bar; no bar without it.

    Raises:
        ValueError: no rows, a row without a prompt or a response, or an NLL that is not finite.
    """
    config = config or SoftPromptConfig()
    rows = encode_rows(rows, tokenizer)
    _check(rows)
    pad = padding_id(tokenizer)
    batches = longest_first([len(row["input_ids"]) for row in rows], config.batch_size)
    parts = [_Part(model, rows, numbers, pad, config.position) for numbers in batches]
    start, scale = _start(model, tokenizer, len(rows), config)
    total = torch.zeros(config.steps + 1, dtype=torch.float64)
    best = start.clone()
    before = torch.empty(len(rows), dtype=torch.float64)
    after = torch.empty(len(rows), dtype=torch.float64)
    # one soft prompt a row: batches do not interact, and each is finished before the next
    groups = [parts] if config.shared else [[part] for part in parts]
    bar = tqdm(total=len(groups) * config.steps, desc=description, disable=description is None, leave=False)
    with evaluation_mode(model), frozen(model), torch.enable_grad(), bar:
        for group in groups:
            numbers = [number for part in group for number in part.numbers]
            with torch.no_grad():
                before[numbers] = torch.cat([part.nll(None).cpu().double() for part in group])
            kept: slice | list[int] = slice(None) if config.shared else numbers
            vectors = start[kept].to(model.device).requires_grad_()
            losses, values, found = _optimise(vectors, group, scale, config, bar)
            total += losses
            after[numbers], best[kept] = values, found
    if not bool(torch.isfinite(total).all() and torch.isfinite(before).all()):
        raise ValueError(
            "The model gives an NLL that is not finite: its weights or activations have overflowed. Load it in "
            "bfloat16 or float32 instead of float16, or lower learning_rate."
        )
    return SoftPromptResult(
        before=tuple((-before).exp().tolist()),
        after=tuple((-after).exp().tolist()),
        losses=tuple((total / len(rows)).tolist()),
        embeddings=best,
    )


run = soft_prompt
"""The attack in the form that all attacks have: `run(model, tokenizer, rows, config)`."""


def outcome(
    result: SoftPromptResult,
    subject: Subject = "unlearned",
    *,
    settings: Mapping[str, Any] | None = None,
    seconds: float = math.nan,
) -> AttackOutcome:
    """The result in the form of attacks.json; arguments as in [`prefill.outcome`]."""
    curve = Curve(
        name="answers",
        subject=subject,
        x=tuple(float(step) for step in range(len(result.losses))),
        y=result.losses,
        x_label="steps of the soft prompt",
        y_label="mean NLL, nats",
    )
    return AttackOutcome(
        attack="soft_prompt",
        settings=settings or {},
        measures=(
            mean_measure("probability, plain prompt", subject, result.before),
            mean_measure("probability, with the soft prompt", subject, result.after),
        ),
        curves=(curve,),
        seconds=seconds,
    )


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter takes part in differentiation; each gets its `requires_grad` back, and keeps its gradient."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _optimise(
    vectors: Tensor, group: Sequence[_Part], scale: float, config: SoftPromptConfig, bar: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of the NLL before each step and after the last, NLL of each row with the best vectors, and these."""
    optimizer = torch.optim.Adam([vectors], lr=config.learning_rate * scale)
    losses = []
    best: Tensor | None = None
    lowest = torch.empty(0)
    for step in range(config.steps + 1):
        last = step == config.steps
        gradient = torch.zeros_like(vectors)
        found = []
        for part in group:
            with torch.set_grad_enabled(not last):
                # rows are summed, not averaged: a soft prompt of its own does not depend on its batch
                nll = part.nll(vectors)
                if not last:
                    gradient += torch.autograd.grad(nll.sum(), vectors)[0]
            found.append(nll.detach().cpu().double())
        values = torch.cat(found)
        losses.append(values.sum())
        # NaN is never lower; a shared soft prompt is judged by the mean
        if best is None:
            best, lowest = vectors.detach().cpu().clone(), values
        elif config.shared:
            if values.mean() < lowest.mean():
                best, lowest = vectors.detach().cpu().clone(), values
        else:
            better = values < lowest
            best[better], lowest = vectors.detach().cpu()[better], torch.where(better, values, lowest)
        if not last:
            vectors.grad = gradient
            optimizer.step()
            bar.update()
    assert best is not None
    return torch.stack(losses), lowest, best


class _Part:
    """A batch of rows, with and without room for soft tokens."""

    def __init__(
        self, model: Any, rows: Sequence[Mapping[str, Any]], numbers: list[int], pad: int, position: str
    ) -> None:
        self.model, self.numbers, self.position = model, numbers, position
        self.options = {"logits_to_keep"} & set(inspect.signature(base_model(model).forward).parameters)
        self.rows = [rows[number] for number in numbers]
        self.pad = pad

    def nll(self, vectors: Tensor | None) -> Tensor:
        """Mean NLL `(B,)` of the responses with soft prompts `(B, p, d)` or `(1, p, d)`, or without any."""
        p = 0 if vectors is None else vectors.shape[1]
        places = [0 if self.position == "start" else _response_start(row["labels"]) for row in self.rows]
        padded = [
            {
                "input_ids": [*row["input_ids"][:at], *[self.pad] * p, *row["input_ids"][at:]],
                "labels": [*row["labels"][:at], *[IGNORE_INDEX] * p, *row["labels"][at:]],
            }
            for row, at in zip(self.rows, places, strict=True)
        ]
        batch = pad_rows(padded, pad_token_id=self.pad)
        device = self.model.device
        embedded = self.model.get_input_embeddings()(batch["input_ids"].to(device))
        if vectors is not None:
            slots = torch.tensor(places, device=device)[:, None] + torch.arange(p, device=device)
            index = slots[..., None].expand(-1, -1, embedded.shape[-1])
            embedded = embedded.scatter(1, index, vectors.to(embedded.dtype).expand(len(places), -1, -1))
        labels = batch["labels"]
        first = int((labels[:, 1:] != IGNORE_INDEX).any(0).nonzero()[0])  # the first that predicts a response
        kept = labels.shape[1] - first
        logits = self.model(
            inputs_embeds=embedded,
            attention_mask=batch["attention_mask"].to(device),
            use_cache=False,
            **dict.fromkeys(self.options, kept),
        ).logits
        logps, mask = token_log_probs(logits[:, -kept:], labels[:, -kept:].to(logits.device))
        return (-logps.sum(-1) / mask.sum(-1)).to(device)


def _start(model: Any, tokenizer: Any, n: int, config: SoftPromptConfig) -> tuple[Tensor, float]:
    """
    Embeddings `(n, p, d)` or `(1, p, d)` of ordinary tokens, and the root mean square of an entry of the table. Rows
    are drawn one after another, so that a row's start does not depend on how many follow.
    """
    generator = torch.Generator().manual_seed(config.seed)
    specials = set(tokenizer.all_special_ids)
    ordinary = torch.tensor([token for token in range(len(tokenizer)) if token not in specials])
    drawn = torch.randint(len(ordinary), (1 if config.shared else n, config.tokens), generator=generator)
    embeddings = model.get_input_embeddings()
    with torch.no_grad():
        start = embeddings(ordinary[drawn].to(model.device)).float().cpu()
        sample = ordinary[torch.randint(len(ordinary), (min(len(ordinary), 4096),), generator=generator)]
        scale = float(embeddings(sample.to(model.device)).float().square().mean().sqrt())
    return start, scale


def _response_start(labels: Sequence[int]) -> int:
    return next(place for place, label in enumerate(labels) if label != IGNORE_INDEX)


def _check(rows: Sequence[Mapping[str, Any]]) -> None:
    for number, row in enumerate(rows):
        if all(label == IGNORE_INDEX for label in row["labels"]):
            raise ValueError(f"Row {number} has no response token (all labels are -100); expected one to attack.")
        if _response_start(row["labels"]) == 0:
            raise ValueError(
                f"Row {number} has no prompt: its first token is already a label, and without a prompt there is "
                "nothing to compare with. Start the row with a BOS token or a chat template, labelled -100."
            )
