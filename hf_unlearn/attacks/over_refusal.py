"""Over-refusal: what a model refuses although it should not, read beside what it refuses and should."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_unlearn.attacks.judges import Judge, RefusalJudge
from hf_unlearn.attacks.prompts import JudgedAnswers, Perplexity, PromptConfig, answer_prompts, judged
from hf_unlearn.attacks.summary import judged_parts, mean_measure
from hf_unlearn.data.prompts_files import XSTestPrompts
from hf_unlearn.reports.outcomes import AttackOutcome, Example, JudgeRate, Measure, Subject

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class OverRefusalResult:
    """
    Answers to the two halves; a half without prompts is None.

    Args:
        safe ([`JudgedAnswers`], *optional*): prompts that should be answered.
        unsafe ([`JudgedAnswers`], *optional*): prompts that should be refused.
    """

    safe: JudgedAnswers | None
    unsafe: JudgedAnswers | None

    def halves(self) -> list[tuple[str, JudgedAnswers]]:
        """The halves that there are, by name."""
        both = [("safe prompts", self.safe), ("unsafe prompts", self.unsafe)]
        return [(name, half) for name, half in both if half is not None]


def over_refusal(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: XSTestPrompts,
    config: PromptConfig | None = None,
    *,
    judges: Mapping[str, Judge] | None = None,
    perplexity: Perplexity | None = None,
    description: str | None = None,
) -> OverRefusalResult:
    """
    Answers XSTest's safe and unsafe prompts (arXiv 2308.01263), each half for itself: a model that refuses everything
    has the best rate on one and the worst on the other.

    Args:
        model, tokenizer, config, perplexity, description:
            As in [`static`].
        rows ([`XSTestPrompts`]):
            What [`load_xstest`] reads.
        judges (`Mapping[str, Judge]`, *optional*):
            By name, such that tell refusals; by default key phrases at the beginning of an answer, and anywhere.

    Raises:
        ValueError: no prompts.
    """
    judges = (
        judges
        if judges is not None
        else {"refusal phrases": RefusalJudge(), "refusal phrases anywhere": RefusalJudge(anywhere=True)}
    )
    if not rows.safe and not rows.unsafe:
        raise ValueError("There are no prompts to answer; expected at least one.")
    found: dict[str, JudgedAnswers | None] = {}
    for name, half in (("safe", rows.safe), ("unsafe", rows.unsafe)):
        label = None if description is None else f"{description}: {name} prompts"
        prompts = [row.prompt for row in half]
        answers = answer_prompts(model, tokenizer, prompts, config, description=label) if prompts else []
        found[name] = judged(prompts, answers, judges, perplexity=perplexity) if prompts else None
    return OverRefusalResult(safe=found["safe"], unsafe=found["unsafe"])


run = over_refusal
"""The attack in the form that all attacks have: `run(model, tokenizer, rows, config)`."""


def outcome(
    result: OverRefusalResult,
    subject: Subject = "unlearned",
    *,
    settings: Mapping[str, Any] | None = None,
    seconds: float = math.nan,
) -> AttackOutcome:
    """
    The result in the form of attacks.json; arguments as in [`prefill.outcome`]. The measures are shares of refusals;
    the judges' `success` is the share that is answered.
    """
    measures: list[Measure] = []
    judges: list[JudgeRate] = []
    examples: list[Example] = []
    absent: dict[str, str] = {}
    for name, half in result.halves():
        for judge, verdicts in half.judgement.refusal.items():
            told = [float(value) for value in verdicts if value is not None]
            if told:
                measures.append(mean_measure(f"{name} refused, judge {judge}", subject, told))
        parts = judged_parts(half.judgement, subject)
        judges += [dataclasses.replace(rate, judge=f"{rate.judge}, {name}") for rate in parts["judges"]]
        absent.update({f"{key}, {name}": reason for key, reason in parts["absent"].items()})
        if name == "safe prompts":
            examples += half.examples(subject, refusals=True)
    return AttackOutcome(
        attack="over_refusal",
        settings=settings or {},
        measures=tuple(measures),
        judges=tuple(judges),
        examples=tuple(examples),
        seconds=seconds,
        absent=absent,
    )
