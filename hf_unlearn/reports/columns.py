"""What runs are compared by: scores, forget quality, constraints, what attacks bring back, and which value is best."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from . import formats
from .attack_words import OVER_REFUSAL, outcomes_of
from .doubts import score_of
from .glossary import GOALS, Metric, metrics_of
from .schema import Results
from .stays import most_returned
from .verdict import INDISTINGUISHABLE

SIGNIFICANT = 2.0
"""Standard errors by which a run must be behind the best one not to count as best too."""
FIRST = (
    *("forget_probability", "forget_quality", "model_utility", "retain_probability", "returned_relearn"),
    *("returned_worst", "feasible"),
)
"""Columns that come first: what a choice between runs rests on. A phone shows two of them at a time."""
Kind = Literal["score", "p_value", "share", "count", "seconds"]


@dataclass(frozen=True, kw_only=True)
class Column:
    """
    A column of a comparison.

    Args:
        name (`str`): key. label (`str`): title. goal (`str`): where it should be, in words; may be empty.
        kind (`"score"`, `"p_value"`, `"share"`, `"count"` or `"seconds"`): how it is written.
        value (`Callable[[Results], float | None]`): of a run.
        ideal (`Callable[[Results], float | None]`): the score of a run's reference or target that a value should have.
        distance (`Callable[[float, float | None], float | None]`): how far a value is from the ideal, the first that
            a run knows; None where nothing says.
        error (`Callable[[Results], float | None]`): its standard error, where known.
        made (`Callable[[Results], str]`): how the value was made; values made in different ways have no best one.
        headline (`bool`): whether it stands in the first table of the page.
    """

    name: str
    label: str
    goal: str
    kind: Kind
    value: Callable[[Results], float | None]
    distance: Callable[[float, float | None], float | None]
    ideal: Callable[[Results], float | None] = lambda results: None
    error: Callable[[Results], float | None] = lambda results: None
    made: Callable[[Results], str] = lambda results: ""
    headline: bool = True

    def shown(self, results: Results) -> str:
        """The value of a run as text."""
        value = self.value(results)
        if self.kind == "p_value":
            return formats.p_value(value, results.forget_quality_log10)
        if self.kind == "share":
            return formats.percent(value)
        if self.kind == "seconds":
            return formats.duration(value)
        if self.kind == "count":
            if not results.constraints:
                return formats.MISSING
            return f"{sum(own.feasible for own in results.constraints)} of {len(results.constraints)}"
        return formats.with_error(value, self.error(results))

    def best(self, runs: Mapping[str, Results]) -> frozenset[str]:
        """Names of the runs that are best; none where nothing says what is best, or where all are alike."""
        # one ideal for all: runs that may be compared have the same target and reference, where they name them
        ideal = next((known for results in runs.values() if (known := self.ideal(results)) is not None), None)
        far: dict[str, float] = {}
        for name, results in runs.items():
            value = self.value(results)
            distance = None if value is None or math.isnan(value) else self.distance(value, ideal)
            if distance is not None and math.isfinite(distance):
                far[name] = distance
        if len(far) < 2 or len({self.made(runs[name]) for name in far}) > 1:
            return frozenset()
        first = min(far, key=lambda name: far[name])
        found = {
            name
            for name, distance in far.items()
            if distance <= far[first] or distance - far[first] <= SIGNIFICANT * self._error(runs[name], runs[first])
        }
        return frozenset() if len(found) == len(far) else frozenset(found)

    def _error(self, one: Results, other: Results) -> float:
        errors = [self.error(one), self.error(other)]
        known = [error for error in errors if error is not None and math.isfinite(error)]
        return math.hypot(*known) if len(known) == 2 else 0.0


def columns_of(runs: Sequence[Results]) -> tuple[Column, ...]:
    """The columns that at least one of the runs has a value for."""
    metrics = {metric.name: metric for results in runs for metric in metrics_of(results)}
    columns = [_score(metric) for metric in metrics.values()]
    columns += [
        Column(
            name="forget_quality",
            label="Forget quality (p)",
            goal=f"above {INDISTINGUISHABLE}",
            kind="p_value",
            value=lambda results: results.forget_quality,
            # above the limit the test tells nothing apart: a larger p is no better
            distance=lambda value, ideal: -min(value, INDISTINGUISHABLE),
        ),
        Column(
            name="feasible",
            label="Constraints satisfied",
            goal="all",
            kind="count",
            value=lambda results: (
                sum(own.feasible for own in results.constraints) / len(results.constraints)
                if results.constraints
                else None
            ),
            distance=lambda value, ideal: -value,
        ),
        _returned("relearn", "Brought back by relearning"),
        _returned(None, "Brought back by the worst attack"),
        Column(
            name="seconds",
            label="Time",
            goal="",
            kind="seconds",
            value=lambda results: results.seconds["total"],
            distance=lambda value, ideal: None,
        ),
    ]
    known = [column for column in columns if any(_known(column.value(results)) for results in runs)]
    places = {name: place for place, name in enumerate(FIRST)}
    return tuple(sorted(known, key=lambda column: (not column.headline, places.get(column.name, len(FIRST)))))


def _score(metric: Metric) -> Column:
    def value(results: Results) -> float | None:
        return score_of(results.unlearned, metric.name)

    def ideal(results: Results) -> float | None:
        models = {"reference": results.reference, "target": results.target}
        return score_of(models.get(metric.goal), metric.name)

    def distance(value: float, ideal: float | None) -> float | None:
        if metric.goal == "reference":
            return None if ideal is None else abs(value - ideal)
        if metric.goal == "target":
            return -value if ideal is None else max(0.0, ideal - value)
        return {"high": -value, "low": value}.get(metric.goal)

    return Column(
        name=metric.name,
        label=metric.label,
        goal=GOALS[metric.goal],
        kind="score",
        value=value,
        distance=distance,
        ideal=ideal,
        error=lambda results: results.unlearned.standard_error.get(metric.name),
        headline=metric.headline,
    )


def _returned(attack: str | None, label: str) -> Column:
    def value(results: Results) -> float | None:
        found = most_returned(results, attack)
        return None if found is None else found.share

    return Column(
        name=f"returned_{attack or 'worst'}",
        label=label,
        goal="low",
        kind="share",
        value=value,
        distance=lambda value, ideal: value,
        made=lambda results: attacks_made(results, attack),
    )


def attacks_made(results: Results, attack: str | None = None) -> str:
    """Which attacks were run, with which settings and whether with a control, as text; the models are left out."""
    found = []
    for outcome in outcomes_of(results):
        if outcome.attack != OVER_REFUSAL and attack in (None, outcome.attack):
            settings = {key: value for key, value in outcome.settings.items() if key != "models"}
            found.append([outcome.attack, settings, "control" in outcome.subjects()])
    return json.dumps(sorted(found, key=str), sort_keys=True, default=str)


def _known(value: float | None) -> bool:
    return isinstance(value, int | float) and not math.isnan(value)
