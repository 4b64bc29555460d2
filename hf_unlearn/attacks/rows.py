"""Rows with a prompt and a response, as attacks need them: split, scored, answered; and copies of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_unlearn.data import tokenize_example
from hf_unlearn.losses import IGNORE_INDEX
from hf_unlearn.metrics.generate import greedy, padding_id
from hf_unlearn.metrics.likelihood import mean_nll
from hf_unlearn.metrics.rouge import rouge_l_recall

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class RowScores:
    """
    How much of n rows a model gives.

    Args:
        probability (`tuple[float, ...]`): exp(-mean NLL) of the response, teacher-forced.
        rouge (`tuple[float, ...]`): ROUGE-L recall of the greedy answer.
        answers (`tuple[str, ...]`): the greedy answers.
        references (`tuple[str, ...]`): the responses as text.
    """

    probability: tuple[float, ...] = field(repr=False)
    rouge: tuple[float, ...] = field(repr=False)
    answers: tuple[str, ...] = field(repr=False)
    references: tuple[str, ...] = field(repr=False)


def score_rows(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    *,
    max_new_tokens: int = 200,
    batch_size: int = 64,
    description: str | None = None,
) -> RowScores:
    """
    Probability of each response, and ROUGE-L recall of what the model says by itself.

    Args:
        model, tokenizer:
            What is scored.
        rows (`Sequence[Mapping]`):
            n rows with a prompt and a response, in any format of [`tokenize_example`].
        max_new_tokens (`int`, *optional*, defaults to `200`):
            Longest answer.
        batch_size (`int`, *optional*, defaults to `64`):
            Rows a pass.
        description (`str`, *optional*):
            Text of the progress bars.

    Raises:
        ValueError: no rows, or one that is no prompt and response.
    """
    encoded = encode_rows(rows, tokenizer)
    parts = [split_row(number, row) for number, row in enumerate(encoded)]
    nll = mean_nll(model, encoded, pad_token_id=padding_id(tokenizer), batch_size=batch_size, description=description)
    answers = greedy(
        model,
        tokenizer,
        [prompt for prompt, _ in parts],
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        description=description,
    )
    references = [decoded(tokenizer, response) for _, response in parts]
    return RowScores(
        probability=tuple(float(value) for value in np.exp(-nll)),
        rouge=tuple(float(value) for value in rouge_l_recall(answers, references)),
        answers=tuple(answers),
        references=tuple(references),
    )


def encode_rows(rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, list[int]]]:
    """
    Rows as `input_ids` and `labels`; tokenised ones stay what they are.

    Raises:
        ValueError: no rows.
    """
    if not len(rows):
        raise ValueError("There are no rows to attack; expected at least one.")
    return [tokenize_example(row, tokenizer) for row in rows]


def split_row(number: int, row: Mapping[str, list[int]]) -> tuple[list[int], list[int]]:
    """
    Prompt and response of one tokenised row, as token ids.

    Raises:
        ValueError: no prompt, no response, or a response in pieces.
    """
    ids, labels = row["input_ids"], row["labels"]
    places = [place for place, label in enumerate(labels) if label != IGNORE_INDEX]
    if not places:
        raise ValueError(f"Row {number} has no response ({len(ids)} tokens, all labels -100); expected one to begin.")
    if places[0] == 0:
        raise ValueError(
            f"Row {number} has no prompt: its first token is already a label. Give `question` and `answer`, or "
            "`prompt` and `completion`."
        )
    if places != list(range(places[0], len(ids))):
        raise ValueError(
            f"The response of row {number} is in pieces, or something follows it; expected prompt tokens with label "
            "-100 and then response tokens only (of a conversation, the last turn)."
        )
    return list(ids[: places[0]]), list(ids[places[0] :])


def decoded(tokenizer: Any, tokens: Sequence[int]) -> str:
    """As [`greedy`] decodes an answer."""
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True)).strip()


def question_of(row: Mapping[str, Any], tokenizer: Any) -> str:
    """What a row asks, for an example that a person reads: its own text where it has one."""
    if isinstance(row.get("question"), str):
        return str(row["question"])
    if isinstance(row.get("prompt"), str):
        return str(row["prompt"])
    return decoded(tokenizer, split_row(0, tokenize_example(row, tokenizer))[0])


def own_copy(model: Any) -> Any:
    """A copy that shares no weight with `model`, also where TRL has left a `forward` bound to the original."""
    from hf_unlearn.trainers.frozen_copy import independent_copy

    return independent_copy(model)


def plain_copy(model: Any) -> Any:
    """
    [`own_copy`] with its adapters merged: what an attacker who changes weights starts from.

    Raises:
        TypeError: adapters on quantised weights, which cannot be merged without loss.
    """
    if hasattr(model, "peft_config") and (
        getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)
    ):
        raise TypeError(
            "The model has adapters on quantised weights, and an attack that changes weights needs them merged. Load "
            "it in bfloat16 or float32."
        )
    copied = own_copy(model)
    return copied.merge_and_unload() if hasattr(copied, "merge_and_unload") else copied
