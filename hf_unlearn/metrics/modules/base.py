"""
What the modules share: their settings, and how scores of members and non-members come apart.

Shapes: n rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import evaluate
import numpy as np
from datasets import Features
from numpy.typing import ArrayLike

from hf_unlearn.metrics.arrays import FloatArray, rows

_EVALUATE_OPTIONS = frozenset(inspect.signature(evaluate.Metric.__init__).parameters) - {"self", "kwargs"}


class UnlearningMetric(evaluate.Metric):
    """
    An `evaluate.Metric` whose settings can be given when it is made.

    `evaluate.combine` hands every keyword of `compute` to every module, so settings of single modules have no other
    place: `combine([load_metric("extraction_strength", drop_last=True), load_metric("rouge_l")])`. An unknown setting
    is refused in both places, where `evaluate` alone would ignore it when a metric is made.

    Args:
        config_name (`str`, *optional*): of `evaluate`.
        options (`Any`): settings, which are the keyword arguments of [`score`], and arguments of `evaluate.Metric`.

    Raises:
        `TypeError`: neither the metric nor `evaluate` knows an option.
    """

    def __init__(self, config_name: str | None = None, **options: Any) -> None:
        self.settings = {name: value for name, value in options.items() if name not in _EVALUATE_OPTIONS}
        super().__init__(config_name, **{name: value for name, value in options.items() if name in _EVALUATE_OPTIONS})
        self._refuse_unknown(self.settings)

    def score(self, *args: Any, **inputs: Any) -> dict[str, Any]:
        """Scores by name, of `predictions`, mostly `references`, and settings: each metric says which, by keyword."""
        raise NotImplementedError  # abstract: every module below has its own

    def add_batch(self, *, predictions: Any = None, references: Any = None, **inputs: Any) -> None:
        """Add a batch of rows, as `evaluate.Metric.add_batch` does.

        Raises:
            `ValueError`: an input is missing, or does not fit.
        """
        given = {"predictions": predictions, "references": references, **inputs}
        missing = [name for name in self._feature_names() if given.get(name) is None]
        if missing:
            raise ValueError(f"{self.name} needs {' and '.join(missing)}, one entry a row; got none.")
        super().add_batch(**given)

    def _compute(self, *, predictions: Any = None, references: Any = None, **others: Any) -> dict[str, Any]:
        given = {"predictions": predictions, "references": references, **others}
        inputs = {name: given[name] for name in self._feature_names()}
        settings = {name: value for name, value in others.items() if name not in inputs}
        self._refuse_unknown(settings)
        return self.score(**inputs, **{**self.settings, **settings})

    def _refuse_unknown(self, settings: dict[str, Any]) -> None:
        known = sorted(inspect.signature(self.score).parameters.keys() - set(self._feature_names()))
        unknown = sorted(settings.keys() - set(known))
        if unknown:
            raise TypeError(
                f"{self.name} has no setting {', '.join(unknown)}; expected {', '.join(known) or 'none'}. In "
                "`evaluate.combine`, give a setting to its own module, load_metric(name, setting=...), and pass "
                "inputs that only some modules take by `add_batch`."
            )


def metric_info(*, description: str, inputs: str, citation: str, features: Features) -> evaluate.MetricInfo:
    """What `evaluate` shows of a metric, with what is the same for all of them."""
    return evaluate.MetricInfo(
        description=description,
        inputs_description=inputs,
        citation=citation,
        features=features,
        homepage="https://github.com/hf-unlearn/hf-unlearn",
        license="Apache-2.0",
        reference_urls=["https://github.com/hf-unlearn/hf-unlearn/blob/main/docs/metrics.md"],
    )


def mean_or_rows(values: FloatArray, use_aggregator: bool) -> float | list[float]:
    """Mean over rows, or the rows `(n,)` as a list."""
    return float(values.mean()) if use_aggregator else values.tolist()


def each_row(
    function: Callable[..., float], predictions: Sequence[Any], references: Sequence[Any], **options: Any
) -> FloatArray:
    """A function of one row, of each of them: `(n,)`.

    Raises:
        `ValueError`: what the function raises, with the number of the row; no rows.
    """
    if not len(predictions):
        raise ValueError("predictions is empty: the metric needs at least one row.")
    values = np.empty(len(predictions), dtype=np.float64)
    for number, pair in enumerate(zip(predictions, references, strict=True)):
        try:
            values[number] = function(*pair, **options)
        except ValueError as error:
            raise ValueError(f"Row {number}: {error}") from error
    return values


def by_membership(scores: ArrayLike, labels: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Scores of the members (label 1) and of the non-members (label 0), as [`mia_auc`] takes them.

    Raises:
        `ValueError`: another label, or rows of one kind only.
    """
    values, kinds = rows("predictions", scores), rows("references", labels)
    bad = np.flatnonzero((kinds != 0) & (kinds != 1))
    if bad.size:
        raise ValueError(
            f"references must be 1 (member: a row to forget) or 0 (never seen), got {kinds[bad[0]]:g} at row {bad[0]}."
        )
    members = kinds == 1
    if members.all() or not members.any():
        raise ValueError(
            f"All {len(kinds)} rows are {'members (1)' if members[0] else 'non-members (0)'}; membership inference "
            "needs rows of both kinds."
        )
    return values[members], values[~members]
