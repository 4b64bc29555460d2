"""Forget quality (TOFU) as a module of `evaluate`."""

from __future__ import annotations

from typing import Any

from datasets import Features, Value

from hf_unlearn.metrics import functional as f
from hf_unlearn.metrics.modules import base, citations

DESCRIPTION = """\
Forget quality: p-value of the two-sided two-sample Kolmogorov-Smirnov test between the truth ratios of the unlearned
model and those of a model that never saw the forget set. Above 0.05 the two cannot be told apart with this many rows.
A model that over-forgets fails it as surely as one that remembers.
"""

INPUTS = """
Args:
    predictions (`list[float]`): truth ratios of the unlearned model on the forget rows, or their logarithms.
    references (`list[float]`): the same of the retain-only model on the same rows.

Returns:
    forget_quality (`float`): p-value, in [0, 1]; 0 where it is too small for a float.
    forget_quality_log10 (`float`): its decimal logarithm, finite.

Example:
    >>> from hf_unlearn.metrics import load_metric
    >>> metric = load_metric("forget_quality")
    >>> metric.compute(predictions=[0.1, 0.4, 0.2], references=[0.2, 0.1, 0.4])
    {'forget_quality': 1.0, 'forget_quality_log10': 0.0}
"""


class ForgetQuality(base.UnlearningMetric):
    """[`forget_quality`] and its logarithm."""

    def _info(self) -> Any:
        return base.metric_info(
            description=DESCRIPTION,
            inputs=INPUTS,
            citation=citations.TOFU,
            features=Features({"predictions": Value("float64"), "references": Value("float64")}),
        )

    def score(self, *, predictions: list[float], references: list[float]) -> dict[str, Any]:
        """P-value and its decimal logarithm."""
        return {
            "forget_quality": f.forget_quality(predictions, references),
            "forget_quality_log10": f.forget_quality_log10(predictions, references),
        }
