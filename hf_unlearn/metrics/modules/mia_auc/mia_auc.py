"""AUC of a membership inference attack as a module of `evaluate`."""

from __future__ import annotations

from typing import Any

from datasets import Features, Value

from hf_unlearn.metrics import functional as f
from hf_unlearn.metrics.modules import base, citations

DESCRIPTION = """\
Area under the ROC curve of a membership inference attack: P(score of a non-member > score of a member) + P(equal) /
2. 0.5: the attack cannot tell the two apart; 1: memorised; 0: over-forgotten.
"""

INPUTS = """
Args:
    predictions (`list[float]`): of each row, a score that is high for non-members: the mean NLL, for example.
    references (`list[int]`): 1 for a member (a row to forget), 0 for a row that the model has never seen.

Returns:
    mia_auc (`float`), in [0, 1].

Example:
    >>> from hf_unlearn.metrics import load_metric
    >>> metric = load_metric("mia_auc")
    >>> metric.compute(predictions=[0.1, 0.4, 0.3, 2.0], references=[1, 1, 0, 0])
    {'mia_auc': 0.75}
"""


class MiaAuc(base.UnlearningMetric):
    """[`mia_auc`] of scores with their labels."""

    def _info(self) -> Any:
        return base.metric_info(
            description=DESCRIPTION,
            inputs=INPUTS,
            citation=citations.LOSS_ATTACK,
            features=Features({"predictions": Value("float64"), "references": Value("float64")}),
        )

    def score(self, *, predictions: list[float], references: list[float]) -> dict[str, Any]:
        """AUC of members against non-members."""
        return {"mia_auc": f.mia_auc(*base.by_membership(predictions, references))}
