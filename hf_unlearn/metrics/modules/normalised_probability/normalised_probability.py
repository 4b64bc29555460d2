"""Normalised probability (TOFU) as a module of `evaluate`."""

from __future__ import annotations

from typing import Any

from datasets import Features, Sequence, Value

from hf_unlearn.metrics import functional as f
from hf_unlearn.metrics.modules import base, citations

DESCRIPTION = """\
Share of the true answer among the answers offered: p_true / (p_true + sum of p_wrong), with p = exp(-NLL). TOFU's
probability for real authors and world facts; higher is better.
"""

INPUTS = """
Args:
    predictions (`list[float]`): of each row, the mean of -log p over the tokens of the true answer, in nats.
    references (`list[list[float]]`): the same of its wrong answers; rows may differ in their number.
    use_aggregator (`bool`, *optional*, defaults to `True`): the mean over rows; False for the list of rows.

Returns:
    normalised_probability (`float`, or `list[float]` of the rows), in [0, 1].

Example:
    >>> from hf_unlearn.metrics import load_metric
    >>> metric = load_metric("normalised_probability")
    >>> metric.compute(predictions=[1.0, 2.0], references=[[1.0], [2.0, 2.0, 2.0]])
    {'normalised_probability': 0.375}
"""


class NormalisedProbability(base.UnlearningMetric):
    """[`normalised_probability`] of rows."""

    def _info(self) -> Any:
        return base.metric_info(
            description=DESCRIPTION,
            inputs=INPUTS,
            citation=citations.TOFU,
            features=Features({"predictions": Value("float64"), "references": Sequence(Value("float64"))}),
        )

    def score(
        self, *, predictions: list[float], references: list[list[float]], use_aggregator: bool = True
    ) -> dict[str, Any]:
        """Mean over rows, or the rows."""
        values = f.normalised_probability(predictions, references)
        return {"normalised_probability": base.mean_or_rows(values, use_aggregator)}
