"""Paraphrase: the questions in other words, to see whether what was forgotten was only one wording."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hf_unlearn.attacks.rows import RowScores, score_rows
from hf_unlearn.attacks.summary import EXAMPLES, mean_measure, shortened
from hf_unlearn.reports.outcomes import AttackOutcome, Example, Subject

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class ParaphraseConfig:
    """
    Where the wordings come from, and how answers are decoded.

    Args:
        column (`str`, *optional*, defaults to `"paraphrased_question"`):
            Column of the rows with another wording of the question, or a list of them.
        max_new_tokens (`int`, *optional*, defaults to `200`):
            Longest answer in tokens.
        batch_size (`int`, *optional*, defaults to `64`):
            Questions a pass.
    """

    column: str = "paraphrased_question"
    max_new_tokens: int = 200
    batch_size: int = 64

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.batch_size < 1:
            raise ValueError(
                f"max_new_tokens is {self.max_new_tokens}, batch_size {self.batch_size}; both must be at least 1."
            )


@dataclass(frozen=True, kw_only=True)
class ParaphraseResult:
    """
    n questions as they are, and m other wordings of them.

    Args:
        original ([`RowScores`]): n, of the questions as they are.
        reworded ([`RowScores`]): m, of the other wordings.
        rows (`tuple[int, ...]`): m numbers: which of the n rows a wording is of.
        wordings (`tuple[str, ...]`): m.
        likeliest (`tuple[float, ...]`): n, the largest probability under any wording, the original one included.
    """

    original: RowScores
    reworded: RowScores
    rows: tuple[int, ...] = field(repr=False)
    wordings: tuple[str, ...] = field(repr=False)
    likeliest: tuple[float, ...] = field(repr=False)


def paraphrase(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    config: ParaphraseConfig | None = None,
    *,
    rewordings: Mapping[str, Sequence[str]] | None = None,
    description: str | None = None,
) -> ParaphraseResult:
    """
    Probability and ROUGE-L recall of the answers, after the questions and after other wordings of them.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The unlearned model, or the control; it is not changed.
        tokenizer (`PreTrainedTokenizerBase`):
            Its tokenizer.
        rows (`Sequence[Mapping]`):
            n rows with `question` and `answer`, and the column of the config. Rows without a wording count in
            `original` alone.
        config ([`ParaphraseConfig`], *optional*):
            The options.
        rewordings (`Mapping[str, Sequence[str]]`, *optional*):
            Wordings by question, in place of the column.
        description (`str`, *optional*):
            Text of the progress bars.

    Raises:
        ValueError: no rows, a row without question and answer, a wording that is no text, or no wording at all.
    """
    config = config or ParaphraseConfig()
    if not len(rows):
        raise ValueError("There are no rows to attack; expected at least one.")
    numbers, wordings = wordings_of(rows, config.column, rewordings)
    options: dict[str, Any] = {"max_new_tokens": config.max_new_tokens, "batch_size": config.batch_size}
    asked = [
        {"question": wording, "answer": rows[number]["answer"]}
        for number, wording in zip(numbers, wordings, strict=True)
    ]
    plain = [{"question": row["question"], "answer": row["answer"]} for row in rows]
    original = score_rows(model, tokenizer, plain, description=description, **options)
    reworded = score_rows(model, tokenizer, asked, description=description and f"{description}, reworded", **options)
    likeliest = list(original.probability)
    for number, value in zip(numbers, reworded.probability, strict=True):
        likeliest[number] = max(likeliest[number], value)
    return ParaphraseResult(
        original=original,
        reworded=reworded,
        rows=tuple(numbers),
        wordings=tuple(wordings),
        likeliest=tuple(likeliest),
    )


run = paraphrase
"""The attack in the form that all attacks have: `run(model, tokenizer, rows, config)`."""


def wordings_of(
    rows: Sequence[Mapping[str, Any]], column: str, rewordings: Mapping[str, Sequence[str]] | None
) -> tuple[list[int], list[str]]:
    """
    The numbers of the reworded rows, once for each wording, and the wordings.

    Raises:
        ValueError: as in [`paraphrase`].
    """
    numbers: list[int] = []
    found: list[str] = []
    for number, row in enumerate(rows):
        if not isinstance(row.get("question"), str) or not isinstance(row.get("answer"), str):
            raise ValueError(
                f"Row {number} has the columns {sorted(row)}; paraphrases need `question` and `answer`, strings."
            )
        given = row.get(column) if rewordings is None else rewordings.get(row["question"])
        own = [given] if isinstance(given, str) else list(given or ())
        for wording in own:
            if not isinstance(wording, str) or not wording.strip():
                raise ValueError(f"A wording of row {number} is a {type(wording).__name__} without text.")
            numbers.append(number)
            found.append(wording)
    if not found:
        where = f"in the column {column!r}" if rewordings is None else "in the rewordings, by their exact question"
        raise ValueError(f"None of the {len(rows)} rows has another wording {where}; expected at least one.")
    return numbers, found


def outcome(
    result: ParaphraseResult,
    subject: Subject = "unlearned",
    *,
    settings: Mapping[str, Any] | None = None,
    seconds: float = math.nan,
) -> AttackOutcome:
    """The result in the form of attacks.json; arguments as in [`prefill.outcome`]. Errors are over questions."""
    original, reworded = result.original, result.reworded
    # the worst of several answers to one question, shown to a person who wants to see a leak
    order = sorted(range(len(result.rows)), key=lambda place: -reworded.rouge[place])
    return AttackOutcome(
        attack="paraphrase",
        settings=settings or {},
        measures=(
            mean_measure("probability, question as it is", subject, original.probability),
            mean_measure("probability, reworded question", subject, reworded.probability, result.rows),
            mean_measure("probability, likeliest wording", subject, result.likeliest),
            mean_measure("ROUGE-L recall, question as it is", subject, original.rouge),
            mean_measure("ROUGE-L recall, reworded question", subject, reworded.rouge, result.rows),
        ),
        examples=tuple(
            Example(
                prompt=shortened(result.wordings[place]), answer=shortened(reworded.answers[place]), subject=subject
            )
            for place in order[:EXAMPLES]
        ),
        seconds=seconds,
    )
