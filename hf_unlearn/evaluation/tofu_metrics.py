"""TOFU's numbers with their uncertainty, from the scores of single rows; what is missing, with the reason.

Shapes: n rows of a part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from ..attacks.degeneracy import degeneracy
from ..metrics.arrays import FloatArray
from ..metrics.functional import probability, truth_share
from ..metrics.scores import FORGET, RETAIN, PartScores, TofuScores
from ..metrics.uncertainty import Statistic, auc_of_draws, bootstrap
from .joint import (
    Columns,
    Samples,
    closeness_of_draws,
    harmonic,
    joint_bootstrap,
    memorization_of_draws,
    privleak_of_draws,
    utility_of_draws,
)
from .record import MetricValue
from .tofu_files import ATTACKS, ForgetDetails, TofuReference
from .values import metric_of

GENERAL = ("real_authors", "world_facts")
MEMORIZATION, PRIVACY, UTILITY, AGGREGATE = (
    f"{name}_score" for name in ("memorization", "privacy", "utility", "aggregate")
)

COMPARED = (
    *("forget_quality", "forget_quality_log10", "mia_auc", "privleak"),
    *(f"mia_{attack}_closeness" for attack in ATTACKS),
    *(PRIVACY, AGGREGATE),
)
"""What depends on the reference."""
UTILITY_SCORES = ("probability", "rouge", "truth_ratio")

_NO_ANSWERS = "no answers were generated"
_NO_WRONG = "the {part} rows have no `perturbed_answer`"
_NO_REFERENCE = "no scores of a retain-only model were given"
_NO_HOLDOUT = "no holdout rows were given: rows like the forget rows that no model was trained on"
_SHARDED = "the model's weights are sharded, and token scores need whole ones"


@dataclass(frozen=True, kw_only=True)
class Findings:
    """
    Metrics of an evaluation as they are found.

    Args:
        resamples, seed (`int`): of the bootstrap.
        metrics (`dict[str, MetricValue]`): by name.
        absent (`dict[str, str]`): reason by name.
    """

    resamples: int = 1000
    seed: int = 0
    metrics: dict[str, MetricValue] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)

    def mean(self, name: str, values: FloatArray, *, higher: bool | None = None, unit: str = "") -> None:
        """The mean of `(n,)` values."""
        self.sampled(name, lambda draws: draws.mean(axis=-1), values, higher=higher, unit=unit)

    def sampled(
        self, name: str, statistic: Statistic, *samples: FloatArray, higher: bool | None = None, unit: str = ""
    ) -> None:
        """A statistic of samples that are drawn on their own."""
        estimate = bootstrap(statistic, *samples, resamples=self.resamples, seed=self.seed)
        metric = metric_of(estimate, higher_is_better=higher, unit=unit)
        self.metrics[name] = replace(metric, n=sum(estimate.n))

    def joint(
        self, name: str, statistic: Callable[[Samples], FloatArray], samples: Samples, *, higher: bool | None = None
    ) -> None:
        """A statistic of samples with several columns, see [`joint_bootstrap`]."""
        estimate = joint_bootstrap(statistic, samples, resamples=self.resamples, seed=self.seed)
        self.metrics[name] = replace(metric_of(estimate, higher_is_better=higher), n=sum(estimate.n))

    def missing(self, reason: str, *names: str) -> None:
        """Metrics that could not be computed."""
        self.absent.update(dict.fromkeys(names, reason))


def tofu_metrics(
    scores: TofuScores,
    details: ForgetDetails | None,
    reference: TofuReference | None,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[dict[str, MetricValue], dict[str, str]]:
    """
    All of TOFU's metrics, and the reasons of those that cannot be computed.

    Standard errors are over rows: of a mean of means the rows of every part are drawn again, a row with all its
    scores; where two models are compared, with those of both. The p-value of forget quality has none: a resample
    repeats rows, which the test takes for agreement or difference that is not there.

    Args:
        scores ([`TofuScores`]):
            Of the model.
        details ([`ForgetDetails`], *optional*):
            Of its forget rows; None where the weights are sharded.
        reference ([`TofuReference`], *optional*):
            Of the retain-only model, on the same forget rows.
        resamples, seed (`int`, *optional*):
            Of the bootstrap.

    Returns:
        `tuple[dict[str, MetricValue], dict[str, str]]`: metrics and reasons, by name.

    Raises:
        ValueError: the reference was scored on other forget rows.
    """
    found = Findings(resamples=resamples, seed=seed)
    for name, part in scores.parts.items():
        part_metrics(found, name, part)
    _missing_general(found, scores)
    parts = _utility_columns(found, scores)
    forget = {FORGET: _forget_columns(found, scores.parts[FORGET], details)}
    privacy = _membership(found, scores, details, reference)
    _forget_quality(found, scores, reference)
    _aggregates(found, forget, parts, privacy)
    return found.metrics, found.absent


def part_metrics(found: Findings, name: str, part: PartScores) -> None:
    """Adds the means over the rows of one part, by the names that [`TofuScores.summary`] has for them."""
    higher = None if name == FORGET else True
    found.mean(f"{name}_probability", part.probability, higher=higher)
    if part.rouge is None:
        found.missing(_NO_ANSWERS, f"{name}_rouge")
    else:
        found.mean(f"{name}_rouge", part.rouge, higher=higher)
    if part.log_truth_ratio is None:
        found.missing(_NO_WRONG.format(part=name), f"{name}_truth_ratio")
    else:
        found.mean(f"{name}_truth_ratio", truth_ratio_rows(name, part), higher=higher)
    if name not in (FORGET, RETAIN):
        found.mean(f"{name}_plain_probability", part.plain_probability, higher=True)
    if name != FORGET:
        return
    found.mean("forget_nll", part.nll, unit="nats")
    asked, said = "forget_paraphrased_question_probability", "forget_paraphrased_answer_probability"
    if part.paraphrase_probability is None:
        found.missing("the forget rows have no `paraphrased_question`", asked)
    else:
        found.mean(asked, part.paraphrase_probability)
    if part.paraphrased_nll is None:
        found.missing("the forget rows have no `paraphrased_answer`", said)
    else:
        found.mean(said, probability(part.paraphrased_nll))


def truth_ratio_rows(name: str, part: PartScores) -> FloatArray:
    """What the truth ratio of a part is the mean of: min(TR, 1/TR) of forget rows, max(0, 1 - TR) of all others."""
    assert part.log_truth_ratio is not None
    if name == FORGET:
        return np.exp(-np.abs(part.log_truth_ratio))
    with np.errstate(over="ignore"):
        return np.maximum(0.0, 1.0 - np.exp(part.log_truth_ratio))


def _missing_general(found: Findings, scores: TofuScores) -> None:
    """TOFU's own general parts are named where one of them is given, or no part at all."""
    general = [name for name in scores.parts if name not in (FORGET, RETAIN)]
    for name in GENERAL:
        if name not in general and (not general or set(general) & set(GENERAL)):
            scored = ("probability", "rouge", "truth_ratio", "plain_probability")
            found.missing(f"no {name} rows were given", *(f"{name}_{score}" for score in scored))


def _utility_columns(found: Findings, scores: TofuScores) -> dict[str, Columns] | None:
    """The scores that model utility is made of, by part; None where one is missing. Adds model utility."""
    columns: dict[str, Columns] = {}
    for name, part in scores.parts.items():
        if name != FORGET and part.rouge is not None and part.log_truth_ratio is not None:
            truth = truth_ratio_rows(name, part)
            columns[name] = {"probability": part.probability, "rouge": part.rouge, "truth_ratio": truth}
    # by the names of the parts: that of a further part may begin with "forget_", too
    needed = [f"{name}_{score}" for name in {*scores.parts, *GENERAL} - {FORGET} for score in UTILITY_SCORES]
    lacking = sorted(name for name in needed if name in found.absent)
    if lacking:
        found.missing(
            f"it is the harmonic mean over retain and general parts, and lacks {', '.join(lacking)}", "model_utility"
        )
        return None
    found.joint("model_utility", partial(utility_of_draws, parts=list(columns)), columns, higher=True)
    return columns


def _forget_columns(found: Findings, part: PartScores, details: ForgetDetails | None) -> dict[str, FloatArray]:
    """Columns of the forget rows for the aggregates, those that exist. Adds the metrics of single columns."""
    columns: dict[str, FloatArray] = {}
    if part.log_truth_ratio is None:
        found.missing(_NO_WRONG.format(part=FORGET), "forget_truth_share")
    else:
        columns["truth_share"] = truth_share(part.log_truth_ratio)
    if part.paraphrased_nll is not None:
        columns["paraphrase_probability"] = probability(part.paraphrased_nll)
    if part.generations is None:
        found.missing(_NO_ANSWERS, "forget_fluency")
    else:
        columns["fluency"] = np.array([not degeneracy(text).degenerate for text in part.generations], dtype=np.float64)
    if details is None:
        found.missing(_SHARDED, "forget_exact_memorization", "forget_extraction_strength")
    else:
        columns["exact_memorization"] = details.exact_memorization
        columns["extraction_strength"] = details.extraction_strength
    for name in ("truth_share", "exact_memorization", "extraction_strength", "fluency"):
        if name in columns:
            found.mean(f"forget_{name}", columns[name], higher=True if name == "fluency" else None)
    return columns


def _membership(
    found: Findings, scores: TofuScores, details: ForgetDetails | None, reference: TofuReference | None
) -> dict[str, Columns] | str:
    """Columns of forget and holdout rows under both models, or why there are none. Adds AUCs, PrivLeak, closeness."""
    aucs = [f"mia_{attack}_auc" for attack in ATTACKS]
    compared = ["privleak", *(f"mia_{attack}_closeness" for attack in ATTACKS)]
    if details is None or not details.holdout:
        reason = _SHARDED if details is None else _NO_HOLDOUT
        found.missing(reason, *aucs, *compared)
        return reason
    for attack, name in zip(ATTACKS, aucs, strict=True):
        found.sampled(name, auc_of_draws, details.membership[attack], details.holdout[attack])
    reason = _not_compared(details, reference)
    if reason:
        found.missing(reason, *compared)
        return reason
    assert reference is not None
    assert reference.details is not None
    samples: dict[str, Columns] = {
        sample: {f"mia_{attack}": own[attack] for attack in ATTACKS}
        | {f"reference_mia_{attack}": theirs[attack] for attack in ATTACKS}
        for sample, own, theirs in (
            ("forget", details.membership, reference.details.membership),
            ("holdout", details.holdout, reference.details.holdout),
        )
    }
    found.joint("privleak", partial(privleak_of_draws, attack="min_k"), samples)
    for attack in ATTACKS:
        found.joint(
            f"mia_{attack}_closeness", partial(closeness_of_draws, attack=attack), _of(samples, attack), higher=True
        )
    return samples


def _of(samples: Mapping[str, Columns], attack: str) -> dict[str, Columns]:
    kept = (f"mia_{attack}", f"reference_mia_{attack}")
    return {sample: {name: columns[name] for name in kept} for sample, columns in samples.items()}


def _not_compared(details: ForgetDetails, reference: TofuReference | None) -> str:
    if reference is None:
        return _NO_REFERENCE
    if reference.details is None:
        return "the retain-only model's logs have no membership scores"
    if not reference.details.holdout:
        return "the retain-only model was scored without holdout rows"
    if reference.details.holdout_fingerprint != details.holdout_fingerprint:
        return "the retain-only model was scored on other holdout rows"
    return ""


def _forget_quality(found: Findings, scores: TofuScores, reference: TofuReference | None) -> None:
    names = ("forget_quality", "forget_quality_log10")
    if reference is None:
        found.missing(_NO_REFERENCE, *names, "mia_auc")
        return
    own, theirs = scores.parts[FORGET], reference.scores.parts[FORGET]
    n = len(own.nll)
    scores.mia_auc_against(reference.scores)  # refuses other forget rows
    losses: Samples = {"forget": {"own": own.nll, "reference": theirs.nll}}

    def told_apart(samples: Samples) -> FloatArray:
        return auc_of_draws(samples["forget"]["reference"], samples["forget"]["own"])

    found.joint("mia_auc", told_apart, losses)
    found.metrics["mia_auc"] = replace(found.metrics["mia_auc"], n=n)
    if own.log_truth_ratio is None or theirs.log_truth_ratio is None:
        reason = _NO_WRONG.format(part=FORGET) if own.log_truth_ratio is None else "the reference has no truth ratios"
        found.missing(reason, *names)
        return
    tests = (scores.forget_quality_against, scores.forget_quality_log10_against)
    for name, test in zip(names, tests, strict=True):
        found.metrics[name] = MetricValue(value=test(reference.scores), n=n, higher_is_better=True)


def _aggregates(
    found: Findings,
    forget: Mapping[str, Columns],
    parts: Mapping[str, Columns] | None,
    privacy: Mapping[str, Columns] | str,
) -> None:
    """Memorisation, privacy, utility and their harmonic mean, each where all its parts exist."""
    columns = forget[FORGET]
    statistics: dict[str, Callable[[Samples], FloatArray]] = {}
    needed = ("truth_share", "paraphrase_probability", "exact_memorization", "extraction_strength")
    lacking = [name for name in needed if name not in columns]
    if lacking:
        found.missing(f"the forget rows have no {' and no '.join(lacking)}", MEMORIZATION)
    else:
        statistics[MEMORIZATION] = partial(memorization_of_draws, sample=FORGET)
    if isinstance(privacy, str):
        found.missing(privacy, PRIVACY)
    else:
        statistics[PRIVACY] = _privacy_of_draws
    if parts is None or "fluency" not in columns:
        found.missing(found.absent.get("model_utility", _NO_ANSWERS), UTILITY)
    else:
        statistics[UTILITY] = partial(_utility_score_of_draws, parts=list(parts))
    compared = {} if isinstance(privacy, str) else privacy
    samples: dict[str, Columns] = {
        FORGET: {**columns, **compared.get("forget", {})},
        **{name: values for name, values in compared.items() if name != "forget"},
        **(parts or {}),
    }
    used = {MEMORIZATION: [FORGET], PRIVACY: [FORGET, "holdout"], UTILITY: [FORGET, *(parts or {})]}
    for name, statistic in statistics.items():
        found.joint(name, statistic, {sample: samples[sample] for sample in used[name]}, higher=True)
    without = [name for name in (MEMORIZATION, PRIVACY, UTILITY) if name not in statistics]
    if without:
        found.missing(f"it lacks {', '.join(without)}", AGGREGATE)
        return

    def all_of_them(samples: Samples) -> FloatArray:
        return harmonic([statistic(samples) for statistic in statistics.values()])

    found.joint(AGGREGATE, all_of_them, samples, higher=True)


def _privacy_of_draws(samples: Samples) -> FloatArray:
    return harmonic([closeness_of_draws(samples, attack) for attack in ATTACKS])


def _utility_score_of_draws(samples: Samples, parts: list[str]) -> FloatArray:
    return harmonic([utility_of_draws(samples, parts), samples[FORGET]["fluency"].mean(axis=-1)])
