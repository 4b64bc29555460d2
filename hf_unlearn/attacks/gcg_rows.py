"""GCG on the questions of some rows: a suffix for each, and what the model then says."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hf_unlearn.attacks.gcg import GCGConfig, GCGResult, gcg
from hf_unlearn.attacks.judges import Judge, Judgement, RefusalJudge, TargetJudge, judge_answers
from hf_unlearn.attacks.summary import EXAMPLES, judged_parts, mean_measure, shortened
from hf_unlearn.data import tokenize_prompt
from hf_unlearn.metrics.generate import greedy
from hf_unlearn.metrics.rouge import rouge_l_recall
from hf_unlearn.reports.outcomes import AttackOutcome, Example, Measure, Subject

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class GCGRowsResult:
    """
    One search for each of n rows.

    Args:
        searches (`tuple[GCGResult, ...]`): n suffixes, with the target's probability without and with them.
        questions (`tuple[str, ...]`): n questions.
        answers (`tuple[str, ...]`): n greedy answers to question and suffix.
        rouge (`tuple[float, ...]`): ROUGE-L recall of these against the targets.
        judgement ([`Judgement`]): whether they say the target, and whether they refuse.
    """

    searches: tuple[GCGResult, ...]
    questions: tuple[str, ...] = field(repr=False)
    answers: tuple[str, ...] = field(repr=False)
    rouge: tuple[float, ...] = field(repr=False)
    judgement: Judgement = field(repr=False)


def gcg_rows(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    config: GCGConfig | None = None,
    *,
    max_new_tokens: int = 200,
    description: str | None = None,
) -> GCGRowsResult:
    """
    [`gcg`] with the question of each row as prompt and its answer as target, and the model's greedy answer under it.

    A probability that rises tells little by itself: that of a model that never saw the rows rises tenfold too, from
    a lower start. Read the probability itself beside the control's, and what the model then says.

    Args:
        model, tokenizer:
            The unlearned model, or the control; it is not changed.
        rows (`Sequence[Mapping]`):
            n rows with `question` and `answer`.
        config ([`GCGConfig`], *optional*):
            The attacker's means.
        max_new_tokens (`int`, *optional*, defaults to `200`):
            Longest answer.
        description (`str`, *optional*):
            Text of the progress bars.

    Raises:
        ValueError: no rows, a row without question and answer, or what [`gcg`] refuses.
    """
    if not len(rows):
        raise ValueError("There are no rows to attack; expected at least one.")
    for number, row in enumerate(rows):
        if not isinstance(row.get("question"), str) or not isinstance(row.get("answer"), str):
            raise ValueError(
                f"Row {number} has the columns {sorted(row)}; GCG needs `question` and `answer`, strings."
            )
    searches = tuple(
        gcg(
            model,
            tokenizer,
            row["question"],
            row["answer"],
            config,
            description=None if description is None else f"{description}, row {number + 1} of {len(rows)}",
        )
        for number, row in enumerate(rows)
    )
    questions = tuple(str(row["question"]) for row in rows)
    targets = [str(row["answer"]) for row in rows]
    prompts = [
        tokenize_prompt({"question": question + found.suffix, "answer": ""}, tokenizer)
        for question, found in zip(questions, searches, strict=True)
    ]
    answers = greedy(model, tokenizer, prompts, max_new_tokens=max_new_tokens, description=description)
    # numbers, not questions, name the targets: two rows may ask the same
    numbers = [str(number) for number in range(len(rows))]
    judges: dict[str, Judge] = {
        "whole target": TargetJudge(targets={n: [target] for n, target in zip(numbers, targets, strict=True)}),
        "refusal phrases": RefusalJudge(),
    }
    return GCGRowsResult(
        searches=searches,
        questions=questions,
        answers=tuple(answers),
        rouge=tuple(float(value) for value in rouge_l_recall(answers, targets)),
        judgement=judge_answers(numbers, answers, judges),
    )


def outcome(
    result: GCGRowsResult,
    subject: Subject = "unlearned",
    *,
    settings: Mapping[str, Any] | None = None,
    seconds: float = math.nan,
) -> AttackOutcome:
    """The result in the form of attacks.json; arguments as in [`prefill.outcome`]."""
    measures: list[Measure] = [
        mean_measure("probability of the target, plain prompt", subject, [s.before for s in result.searches]),
        mean_measure("probability of the target, with the suffix", subject, [s.after for s in result.searches]),
        mean_measure("ROUGE-L recall of the answer, with the suffix", subject, result.rouge),
    ]
    examples = [
        Example(
            prompt=shortened(question + search.suffix),
            answer=shortened(answer),
            subject=subject,
            success={name: bool(found[number]) for name, found in result.judgement.success.items()},
        )
        for number, (question, search, answer) in enumerate(
            list(zip(result.questions, result.searches, result.answers, strict=True))[:EXAMPLES]
        )
    ]
    return AttackOutcome(
        attack="gcg",
        settings=settings or {},
        measures=tuple(measures),
        examples=tuple(examples),
        seconds=seconds,
        **judged_parts(result.judgement, subject),
    )
