"""Probability of the answer (TOFU) as a module of `evaluate`."""

from __future__ import annotations

from typing import Any

from datasets import Features, Value

from hf_unlearn.metrics import functional as f
from hf_unlearn.metrics.modules import base, citations

DESCRIPTION = """\
Length-normalised probability of an answer: exp(-NLL), the geometric mean over its tokens. Lower is better on a forget
set, but compare with a model that never saw it: below that one is over-forgetting.
"""

INPUTS = """
Args:
    predictions (`list[float]`): of each row, the mean of -log p over the tokens of the answer, in nats.
    use_aggregator (`bool`, *optional*, defaults to `True`): the mean over rows; False for the list of rows.

Returns:
    probability (`float`, or `list[float]` of the rows), in [0, 1].

Example:
    >>> from hf_unlearn.metrics import load_metric
    >>> metric = load_metric("probability")
    >>> metric.compute(predictions=[0.0, 0.6931471805599453])
    {'probability': 0.75}
"""


class Probability(base.UnlearningMetric):
    """[`probability`] of rows."""

    def _info(self) -> Any:
        return base.metric_info(
            description=DESCRIPTION,
            inputs=INPUTS,
            citation=citations.TOFU,
            features=Features({"predictions": Value("float64")}),
        )

    def score(self, *, predictions: list[float], use_aggregator: bool = True) -> dict[str, Any]:
        """Mean over rows, or the rows."""
        return {"probability": base.mean_or_rows(f.probability(predictions), use_aggregator)}
