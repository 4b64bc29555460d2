"""Means with standard errors, and outcomes of several models joined into one: what all attacks report with."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from hf_unlearn.metrics.arrays import FloatArray
from hf_unlearn.metrics.uncertainty import Estimate, bootstrap, mean_of_draws
from hf_unlearn.reports.outcomes import AttackOutcome, Measure, Subject

if TYPE_CHECKING:
    from hf_unlearn.attacks.judges import Judgement

EXAMPLES = 3  # answers of each model that an outcome shows
SHOWN_CHARACTERS = 1000  # of a prompt or an answer


def clustered_mean(values: ArrayLike, clusters: Sequence[Hashable] | None = None) -> Estimate:
    """
    Mean of n values with its bootstrap standard error. Values of one cluster (wordings of one question, prompts for
    one behaviour, one row seen by several attackers) are drawn together: they are not n independent observations.

    Args:
        values (`ArrayLike`): `(n,)`, without NaN.
        clusters (`Sequence[Hashable]`, *optional*): n names; by default each value is its own.
    """
    array = np.asarray(values, dtype=np.float64)
    if clusters is None:
        return bootstrap(mean_of_draws, array)
    sums: dict[Hashable, list[float]] = {}
    for value, cluster in zip(array.tolist(), clusters, strict=True):
        entry = sums.setdefault(cluster, [0.0, 0.0])
        entry[0] += value
        entry[1] += 1.0
    return bootstrap(_ratio_of_draws, np.asarray(list(sums.values())))


def mean_measure(
    name: str, subject: Subject, values: ArrayLike, clusters: Sequence[Hashable] | None = None
) -> Measure:
    """The mean of some values as a [`Measure`]; its n is the number of values."""
    estimate = clustered_mean(values, clusters)
    return Measure(
        name=name,
        subject=subject,
        value=estimate.value,
        standard_error=estimate.standard_error,
        n=len(np.asarray(values)),
    )


def errors_of(estimates: Sequence[Estimate]) -> tuple[float, ...] | None:
    """Standard errors of the points of a curve; None if one has none."""
    found = [estimate.standard_error for estimate in estimates]
    return tuple(value for value in found if value is not None) if None not in found else None


def shortened(text: str) -> str:
    """Text of an example, cut where it is longer than a page should hold."""
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + " ..."


def joined(one: AttackOutcome, other: AttackOutcome) -> AttackOutcome:
    """
    What one attack found about two models, as one outcome. The settings are those of the second, whose `models` get
    those of the first added; seconds add up.

    Raises:
        ValueError: two different attacks.
    """
    if one.attack != other.attack:
        raise ValueError(f"The outcomes are of {one.attack!r} and {other.attack!r}; expected one attack.")
    models = {**(one.settings.get("models") or {}), **(other.settings.get("models") or {})}
    return dataclasses.replace(
        other,
        settings={**other.settings, "models": models} if models else other.settings,
        measures=(*one.measures, *other.measures),
        curves=(*one.curves, *other.curves),
        judges=(*one.judges, *other.judges),
        examples=(*one.examples, *other.examples),
        seconds=one.seconds + other.seconds,
        absent={**one.absent, **other.absent},
    )


def judged_parts(judgement: Judgement, subject: Subject) -> dict[str, Any]:
    """`judges` and `absent` of an [`AttackOutcome`]: the rates under the model's name, and why a judge failed."""
    return {
        "judges": tuple(dataclasses.replace(rate, subject=subject) for rate in judgement.rates),
        "absent": {f"judge {name}, {subject}": reason for name, reason in judgement.failures.items()},
    }


def _ratio_of_draws(pairs: FloatArray) -> FloatArray:
    """Sums over counts `(r,)` of draws `(r, clusters, 2)`."""
    totals = pairs.sum(axis=1)
    ratio: FloatArray = totals[:, 0] / totals[:, 1]
    return ratio
