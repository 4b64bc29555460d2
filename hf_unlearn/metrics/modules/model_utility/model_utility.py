"""Model utility (TOFU) as a module of `evaluate`."""

from __future__ import annotations

from typing import Any

from datasets import Features, Value

from hf_unlearn.metrics import functional as f
from hf_unlearn.metrics.modules import base, citations

DESCRIPTION = """\
Model utility: harmonic mean of its parts, 0 if any is 0. TOFU's has nine: {probability, ROUGE-L recall, truth ratio}
x {retain, real authors, world facts}. Higher is better; it hides single losses, so look at the parts.
"""

INPUTS = """
Args:
    predictions (`list[float]`): the parts, in [0, 1], each already averaged over its rows.
    references (`list[str]`): their names, all different.

Returns:
    model_utility (`float`), in [0, 1].

Example:
    >>> from hf_unlearn.metrics import load_metric
    >>> metric = load_metric("model_utility")
    >>> metric.compute(predictions=[0.5, 1.0], references=["retain_probability", "retain_rouge"])
    {'model_utility': 0.6666666666666666}
"""


class ModelUtility(base.UnlearningMetric):
    """[`model_utility`] of named parts."""

    def _info(self) -> Any:
        return base.metric_info(
            description=DESCRIPTION,
            inputs=INPUTS,
            citation=citations.TOFU,
            features=Features({"predictions": Value("float64"), "references": Value("string")}),
        )

    def score(self, *, predictions: list[float], references: list[str]) -> dict[str, Any]:
        """Harmonic mean of the parts."""
        repeated = sorted({name for name in references if references.count(name) > 1})
        if repeated:
            raise ValueError(f"Every part of the model utility counts once, got {', '.join(repeated)} more than once.")
        return {"model_utility": f.model_utility(dict(zip(references, predictions, strict=True)))}
