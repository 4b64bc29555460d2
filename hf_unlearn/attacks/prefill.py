"""Prefill: the answer is begun for the model, and what it adds by itself is scored.

A model that has only unlearned to begin an answer goes on with it once it has begun. A long prefill contains short
answers whole: the given tokens never count, and a row of which nothing is left is not scored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_unlearn.attacks.rows import decoded, encode_rows, split_row
from hf_unlearn.attacks.summary import EXAMPLES, clustered_mean, errors_of, mean_measure, shortened
from hf_unlearn.losses import IGNORE_INDEX
from hf_unlearn.metrics.generate import greedy, padding_id
from hf_unlearn.metrics.likelihood import mean_nll
from hf_unlearn.metrics.rouge import rouge_l_recall
from hf_unlearn.reports.outcomes import AttackOutcome, Curve, Example, Subject

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class PrefillConfig:
    """
    How much is given.

    Args:
        tokens (`tuple[int, ...]`, *optional*, defaults to `(0, 3, 5, 10, 25)`):
            Numbers of response tokens that are given, rising; 0 is the model as it answers by itself.
        max_new_tokens (`int`, *optional*, defaults to `200`):
            Longest continuation in tokens.
        batch_size (`int`, *optional*, defaults to `64`):
            Rows decoded, or scored, at once.
    """

    tokens: tuple[int, ...] = (0, 3, 5, 10, 25)
    max_new_tokens: int = 200
    batch_size: int = 64

    def __post_init__(self) -> None:
        if not self.tokens or list(self.tokens) != sorted(set(self.tokens)) or self.tokens[0] < 0:
            raise ValueError(f"tokens is {self.tokens}; expected rising numbers of response tokens, from 0.")
        if self.max_new_tokens < 1 or self.batch_size < 1:
            raise ValueError(
                f"max_new_tokens is {self.max_new_tokens}, batch_size {self.batch_size}; both must be at least 1."
            )


@dataclass(frozen=True, kw_only=True)
class PrefillLevel:
    """
    What the model adds to a prefill of one length. Compare models at one length, not lengths of one model: what is
    left to say, and the rows that have something left, differ.

    Args:
        tokens (`int`):
            Response tokens that were given, k.
        rows (`tuple[int, ...]`):
            Numbers of the n rows that were scored: those with a letter or a digit after the prefill.
        continuations (`tuple[str, ...]`):
            n greedy continuations, without the prefill.
        references (`tuple[str, ...]`):
            What the rows say after the prefill.
        rouge (`tuple[float, ...]`):
            ROUGE-L recall of each continuation against its reference.
        probability (`tuple[float, ...]`):
            exp(-mean NLL) of the response tokens after the prefill, teacher-forced, those that end the answer
            included.
    """

    tokens: int
    rows: tuple[int, ...] = field(repr=False)
    continuations: tuple[str, ...] = field(repr=False)
    references: tuple[str, ...] = field(repr=False)
    rouge: tuple[float, ...] = field(repr=False)
    probability: tuple[float, ...] = field(repr=False)

    @property
    def mean_rouge(self) -> float:
        """Mean ROUGE-L recall over the scored rows."""
        return float(np.mean(self.rouge))

    @property
    def mean_probability(self) -> float:
        """Mean probability over the scored rows."""
        return float(np.mean(self.probability))


@dataclass(frozen=True, kw_only=True)
class PrefillResult:
    """
    One [`PrefillLevel`] for each number of given tokens, in the order of the config.

    Args:
        levels (`tuple[PrefillLevel, ...]`):
            What was added.
    """

    levels: tuple[PrefillLevel, ...]


def prefill(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    config: PrefillConfig | None = None,
    *,
    description: str | None = None,
) -> PrefillResult:
    """
    Gives the first k response tokens of each row, lets the model go on greedily, and scores what it adds.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The unlearned model, or the control; it is not changed.
        tokenizer (`PreTrainedTokenizerBase`):
            Its tokenizer.
        rows (`Sequence[Mapping]`):
            Rows with a prompt and a response, in any format of [`tokenize_example`]: `question` and `answer`, `prompt`
            and `completion`, or `input_ids` and `labels`.
        config ([`PrefillConfig`], *optional*):
            How much is given.
        description (`str`, *optional*):
            Text in front of the progress bars; no bars without it.

    Raises:
        ValueError: no rows, a row without prompt or response, one whose response is in several pieces, or a prefill
            that leaves no row anything to add.
    """
    config = config or PrefillConfig()
    encoded = [split_row(number, row) for number, row in enumerate(encode_rows(rows, tokenizer))]
    # all lengths before the first pass: a run must not fail after an hour of the others
    scored = {
        given: [number for number, (_, response) in enumerate(encoded) if _says(tokenizer, response[given:])]
        for given in config.tokens
    }
    for given, numbers in scored.items():
        if not numbers:
            longest = max(len(response) for _, response in encoded)
            raise ValueError(
                f"A prefill of {given} tokens leaves none of the {len(encoded)} rows anything to add (the longest "
                f"response has {longest} tokens, those that end it included). Lower the largest of `tokens`."
            )
    return PrefillResult(
        levels=tuple(
            _level(model, tokenizer, encoded, given, numbers, config, description) for given, numbers in scored.items()
        )
    )


def _level(
    model: Any,
    tokenizer: Any,
    encoded: Sequence[tuple[list[int], list[int]]],
    given: int,
    numbers: Sequence[int],
    config: PrefillConfig,
    description: str | None,
) -> PrefillLevel:
    chosen = [encoded[number] for number in numbers]
    starts = [prompt + response[:given] for prompt, response in chosen]
    rests = [response[given:] for _, response in chosen]
    label = None if description is None else f"{description}: {given} tokens given"
    nll = mean_nll(
        model,
        [
            {"input_ids": start + rest, "labels": [IGNORE_INDEX] * len(start) + rest}
            for start, rest in zip(starts, rests, strict=True)
        ],
        pad_token_id=padding_id(tokenizer),
        batch_size=config.batch_size,
        description=label,
    )
    continuations = greedy(
        model,
        tokenizer,
        starts,
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
        description=label,
    )
    references = [decoded(tokenizer, rest) for rest in rests]
    return PrefillLevel(
        tokens=given,
        rows=tuple(numbers),
        continuations=tuple(continuations),
        references=tuple(references),
        rouge=tuple(float(value) for value in rouge_l_recall(continuations, references)),
        probability=tuple(float(value) for value in np.exp(-nll)),
    )


def _says(tokenizer: Any, tokens: Sequence[int]) -> bool:
    return any(character.isalnum() for character in decoded(tokenizer, tokens))


run = prefill
"""The attack in the form that all attacks have: `run(model, tokenizer, rows, config)`."""


def outcome(
    result: PrefillResult,
    subject: Subject = "unlearned",
    *,
    settings: Mapping[str, Any] | None = None,
    seconds: float = math.nan,
) -> AttackOutcome:
    """
    The result in the form of attacks.json. Lengths that start with another number of rows are other rows: compare
    models at one length.

    Args:
        result ([`PrefillResult`]): what was found.
        subject (`"target"`, `"unlearned"` or `"control"`, *optional*, defaults to `"unlearned"`): the model.
        settings (`Mapping[str, Any]`, *optional*): what it was run with.
        seconds (`float`, *optional*): wall time.
    """
    levels = result.levels
    measures = [
        mean_measure(f"{name} of what follows, {level.tokens} tokens given", subject, values)
        for level in levels
        for name, values in (("ROUGE-L recall", level.rouge), ("probability", level.probability))
    ]
    curves = []
    for name in ("ROUGE-L recall", "probability"):
        means = [clustered_mean(level.rouge if name == "ROUGE-L recall" else level.probability) for level in levels]
        curves.append(
            Curve(
                name=f"{name} of what follows",
                subject=subject,
                x=tuple(float(level.tokens) for level in levels),
                y=tuple(mean.value for mean in means),
                x_label="response tokens given",
                y_label="share",
                standard_error=errors_of(means),
            )
        )
    last = levels[-1]
    examples = [
        Example(
            prompt=f"row {number}, {last.tokens} response tokens given",
            answer=shortened(text),
            subject=subject,
        )
        for number, text in list(zip(last.rows, last.continuations, strict=True))[:EXAMPLES]
    ]
    return AttackOutcome(
        attack="prefill",
        settings=settings or {},
        measures=tuple(measures),
        curves=tuple(curves),
        examples=tuple(examples),
        seconds=seconds,
    )
