"""Truth ratio (TOFU) as a module of `evaluate`."""

from __future__ import annotations

from typing import Any

from datasets import Features, Sequence, Value

from hf_unlearn.metrics import functional as f
from hf_unlearn.metrics.modules import base, citations

DESCRIPTION = """\
Truth ratio TR = wrong / correct = exp(-mean_k NLL(wrong_k)) / exp(-NLL(correct)): below 1 the model prefers the
correct answer. On a forget set read the mean of min(TR, 1/TR), which is 1 where right and wrong answers are equally
likely; elsewhere the mean of max(0, 1 - TR), of which more is better.
"""

INPUTS = """
Args:
    predictions (`list[float]`): of each row, the mean of -log p over the tokens of the correct answer, in nats: the
        paraphrased answer, or the plain one where there is none.
    references (`list[list[float]]`): the same of its wrong answers; rows may differ in their number.
    use_aggregator (`bool`, *optional*, defaults to `True`): the aggregates; False for the list of ratios, infinite
        where they overflow.

Returns:
    forget_truth_ratio, retain_truth_ratio (`float`), in [0, 1], or truth_ratio (`list[float]` of the rows).

Example:
    >>> from hf_unlearn.metrics import load_metric
    >>> metric = load_metric("truth_ratio")
    >>> metric.compute(predictions=[1.0, 1.0], references=[[1.0], [1.5, 0.5]])
    {'forget_truth_ratio': 1.0, 'retain_truth_ratio': 0.0}
"""


class TruthRatio(base.UnlearningMetric):
    """[`truth_ratio`] of rows, and its two aggregates."""

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
        """Both aggregates, or the ratios of the rows."""
        ratios = f.truth_ratio(predictions, references)
        if not use_aggregator:
            return {"truth_ratio": ratios.tolist()}
        return {
            "forget_truth_ratio": f.forget_truth_ratio(ratios),
            "retain_truth_ratio": f.retain_truth_ratio(ratios),
        }
