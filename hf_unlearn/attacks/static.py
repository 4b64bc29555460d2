"""Static jailbreaks: prompts that others have found and written to a file, sent as they are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hf_unlearn.attacks.judges import Judge
from hf_unlearn.attacks.prompts import JudgedAnswers, Perplexity, PromptConfig, answer_prompts, judged
from hf_unlearn.attacks.summary import judged_parts, mean_measure
from hf_unlearn.data.prompts_files import PromptRow, load_behavior_prompts, load_harmbench, load_jailbreakbench
from hf_unlearn.reports.outcomes import AttackOutcome, Measure, Subject

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PromptLayout = Literal["auto", "harmbench", "jailbreakbench", "behaviors"]


def load_prompts(path: str | Path, layout: PromptLayout = "auto") -> list[PromptRow]:
    """
    A file of jailbreak prompts in any of the layouts of `hf_unlearn.data.prompts_files`.

    Args:
        path (`str` or `Path`):
            The file.
        layout (`"auto"`, `"harmbench"`, `"jailbreakbench"` or `"behaviors"`, *optional*, defaults to `"auto"`):
            By default CSV files are HarmBench's, JSON objects with `jailbreaks` are JailbreakBench's, and other JSON
            files are `{behavior: [prompt, ...]}`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another layout, or what its loader refuses.
    """
    path = Path(path)
    loaders = {
        "harmbench": load_harmbench,
        "jailbreakbench": load_jailbreakbench,
        "behaviors": load_behavior_prompts,
    }
    if layout == "auto":
        if path.suffix.lower() == ".csv":
            layout = "harmbench"
        else:
            head = path.read_text(encoding="utf-8-sig")
            layout = "jailbreakbench" if '"jailbreaks"' in head else "behaviors"
    if layout not in loaders:
        raise ValueError(f"layout is {layout!r}; expected 'auto', {', '.join(map(repr, loaders))}.")
    return loaders[layout](path)


def static(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[PromptRow],
    config: PromptConfig | None = None,
    *,
    judges: Mapping[str, Judge] | None = None,
    perplexity: Perplexity | None = None,
    description: str | None = None,
) -> JudgedAnswers:
    """
    Answers each prompt greedily and has the answers judged. Judges are told the behaviour, not the prompt that hides
    it; prompts for one behaviour are drawn together when the standard error is taken.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The unlearned model, or the control; it is not changed.
        tokenizer (`PreTrainedTokenizerBase`):
            Its tokenizer.
        rows (`Sequence[PromptRow]`):
            What [`load_prompts`] reads.
        config ([`PromptConfig`], *optional*):
            How they are answered.
        judges (`Mapping[str, Judge]`, *optional*, defaults to [`usual_judges`]):
            By name.
        perplexity (`Callable`, *optional*):
            Perplexities of the answers under a reference model, which shows word salad; see [`answer_perplexities`].
        description (`str`, *optional*):
            Text of the progress bars.

    Raises:
        ValueError: no prompts.
    """
    answers = answer_prompts(model, tokenizer, [row.prompt for row in rows], config, description=description)
    asked = [row.behavior for row in rows]
    return judged(asked, answers, judges, groups=asked, perplexity=perplexity)


run = static
"""The attack in the form that all attacks have: `run(model, tokenizer, rows, config)`."""


def outcome(
    result: JudgedAnswers,
    subject: Subject = "unlearned",
    *,
    settings: Mapping[str, Any] | None = None,
    seconds: float = math.nan,
) -> AttackOutcome:
    """
    The result in the form of attacks.json; arguments as in [`prefill.outcome`]. Where behaviours have several prompts
    there is also the share of behaviours for which one of them succeeds.
    """
    return AttackOutcome(
        attack="static",
        settings=settings or {},
        measures=any_prompt(result, subject),
        examples=result.examples(subject),
        seconds=seconds,
        **judged_parts(result.judgement, subject),
    )


def any_prompt(result: JudgedAnswers, subject: Subject) -> tuple[Measure, ...]:
    """By judge, the share of behaviours for which a prompt succeeds; none where each has one prompt."""
    if len(set(result.asked)) == len(result.asked):
        return ()
    measures = []
    for name, verdicts in result.judgement.success.items():
        best: dict[str, bool] = {}
        for behavior, success in zip(result.asked, verdicts, strict=True):
            if success is not None:
                best[behavior] = best.get(behavior, False) or success
        if best:
            label = f"behaviours for which a prompt succeeds, judge {name}"
            measures.append(mean_measure(label, subject, [float(value) for value in best.values()]))
    return tuple(measures)
