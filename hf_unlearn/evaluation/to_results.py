"""From the evaluations of an unlearned model, its target and its reference to the results of a report."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..metrics.scores import FORGET
from ..reports.outcomes import AttackOutcome
from ..reports.plain import to_plain
from ..reports.schema import ConstraintOutcome, Generation, ModelScores, Part, Results, Subject
from .record import Evaluation
from .tofu_files import TofuEvaluation, TofuReference
from .tofu_metrics import COMPARED, tofu_metrics
from .training_run import TrainingRun, read_training_run

EvaluationLike = TofuEvaluation | str | os.PathLike[str]

_QUALITY = ("forget_quality", "forget_quality_log10")
_REQUIRED = ("forget_probability", "forget_rouge", "retain_probability", "retain_rouge")
GENERATIONS = 20


def results_of(
    unlearned: EvaluationLike,
    target: EvaluationLike | None = None,
    reference: EvaluationLike | None = None,
    *,
    run_folder: str | os.PathLike[str] | None = None,
    attacks: Sequence[AttackOutcome] = (),
    method: str = "",
    dataset: str = "",
    seed: int | None = None,
) -> Results:
    """
    Everything a report needs, from one to three evaluations.

    Where a reference is given, what compares models with it is computed now, from the scores of single rows: they may
    have been evaluated without one, or against another one.

    Args:
        unlearned ([`TofuEvaluation`], `str` or `os.PathLike`):
            The model after unlearning, or the folder of its evaluation.
        target ([`TofuEvaluation`], `str` or `os.PathLike`, *optional*):
            The model before it. Without one its scores are NaN, and `absent` says so.
        reference ([`TofuEvaluation`], `str` or `os.PathLike`, *optional*):
            The retain-only model.
        run_folder (`str` or `os.PathLike`, *optional*):
            Output folder of the trainer: log, limits, multipliers and forget level ([`read_training_run`]).
        attacks (`Sequence[AttackOutcome]`, *optional*):
            What attacks found, see [`read_attacks`].
        method (`str`, *optional*):
            Name of the method. Default: that of the run, else "unlearning".
        dataset (`str`, *optional*):
            Name of the data. Default: what the evaluation's settings call `dataset`.
        seed (`int`, *optional*):
            Seed of the run.

    Returns:
        [`Results`]: with `extra["evaluations"]` (by model) and `extra["attacks"]`, in plain values.

    Raises:
        FileNotFoundError, ValueError: a folder holds no evaluation, or no trainer's files.
        ValueError: the reference was scored on other forget rows.
    """
    given: dict[Subject, EvaluationLike | None] = {"target": target, "unlearned": unlearned, "reference": reference}
    found: dict[Subject, TofuEvaluation] = {
        name: one if isinstance(one, TofuEvaluation) else TofuEvaluation.load(one)
        for name, one in given.items()
        if one is not None
    }
    if "reference" in found:
        for name in found:
            found[name] = _compared(found[name], found["reference"])
    run = None if run_folder is None else read_training_run(run_folder)
    evaluation = found["unlearned"].evaluation
    values = evaluation.values()
    absent = {name: reason for name, reason in evaluation.absent.items() if name not in values}
    if "target" not in found:
        absent["target"] = "the model before unlearning was not evaluated"
    if "reference" not in found:
        absent["reference"] = "no retain-only model was evaluated"
    return Results(
        method=method or (run.method if run else "") or "unlearning",
        target=_scores(found["target"].evaluation) if "target" in found else _nothing(),
        unlearned=_scores(evaluation),
        reference=_scores(found["reference"].evaluation) if "reference" in found else None,
        forget_quality=values.get("forget_quality"),
        forget_quality_log10=values.get("forget_quality_log10"),
        constraints=tuple(ConstraintOutcome.from_dict(row) for row in run.constraints) if run else (),
        seconds=_seconds(found, run),
        versions=evaluation.versions,
        settings=evaluation.settings,
        seed=seed,
        generations=_generations(found),
        history=run.history if run else (),
        truth_ratios=_truth_ratios(found),
        forget_level=run.forget_level if run else None,
        model=evaluation.model,
        dataset=dataset or str(evaluation.settings.get("dataset") or ""),
        absent=absent,
        extra={
            "evaluations": {name: to_plain(one.evaluation) for name, one in found.items()},
            "attacks": [outcome.as_dict() for outcome in attacks],
        },
    )


def _compared(one: TofuEvaluation, reference: TofuEvaluation) -> TofuEvaluation:
    """An evaluation with what compares it with this reference; what compared it with another one is gone."""
    evaluation = one.evaluation
    own, theirs = one.scores.parts[FORGET], reference.scores.parts[FORGET]
    logs = TofuReference(scores=reference.scores, details=reference.details)
    # of some of the reference's rows, which the evaluation itself has chosen; or nothing would change
    some = "forget_quality" in evaluation.metrics and len(own.nll) != len(theirs.nll)
    if some or evaluation.settings.get("reference_digest") == logs.digest:
        return one
    drawn = ("resamples", "seed")
    options = {name: int(evaluation.settings[name]) for name in drawn if name in evaluation.settings}
    metrics, absent = tofu_metrics(one.scores, one.details, logs, **options)
    # of a benchmark with other rows (a user's own) some metrics have other names or reasons: what is there stays
    added = {name: value for name, value in metrics.items() if name in evaluation.absent or name in COMPARED}
    lost = {name: absent[name] for name in evaluation.metrics if name in absent and name in COMPARED}
    kept = {name: value for name, value in evaluation.metrics.items() if name not in lost}
    reasons = {name: absent.get(name, reason) for name, reason in evaluation.absent.items() if name not in added}
    return replace(one, evaluation=replace(evaluation, metrics={**kept, **added}, absent={**reasons, **lost}))


def _scores(evaluation: Evaluation) -> ModelScores:
    """The scores of one model; what compares whole models is no score of one."""
    values = {name: value for name, value in evaluation.values().items() if name not in _QUALITY}
    errors = {name: error for name, error in evaluation.standard_errors().items() if name in values}
    values |= {name: math.nan for name in _REQUIRED if name not in values}
    return ModelScores.from_dict({**values, "standard_error": errors})


def _nothing() -> ModelScores:
    return ModelScores.from_dict(dict.fromkeys(_REQUIRED, math.nan))


def _seconds(found: Mapping[Subject, TofuEvaluation], run: TrainingRun | None) -> dict[str, float]:
    """Training, and the evaluation of each model."""
    seconds = {} if run is None or run.seconds is None else {"unlearn": run.seconds}
    for name, one in found.items():
        total = one.evaluation.seconds.get("total")
        if total is not None:
            seconds[f"evaluate_{name}"] = total
    return {**seconds, "total": sum(seconds.values())}


def _truth_ratios(found: Mapping[Subject, TofuEvaluation]) -> dict[str, tuple[float, ...]]:
    ratios = {name: one.scores.parts[FORGET].truth_ratio for name, one in found.items()}
    return {str(name): tuple(values.tolist()) for name, values in ratios.items() if values is not None}


def _generations(found: Mapping[Subject, TofuEvaluation]) -> tuple[Generation, ...]:
    """Answers of the models side by side, to the questions that the unlearned model's evaluation shows."""
    answers = {
        name: {(row["part"], row["question"]): row["generated"] for row in one.examples} for name, one in found.items()
    }
    shown = []
    for row in found["unlearned"].examples[:GENERATIONS]:
        key = (row["part"], row["question"])
        part: Part = "forget" if row["part"] == FORGET else "retain"
        shown.append(
            Generation(
                question=row["question"],
                answer=row["answer"],
                target=answers.get("target", {}).get(key, ""),
                unlearned=row["generated"],
                reference=answers.get("reference", {}).get(key),
                part=part,
            )
        )
    return tuple(shown)
