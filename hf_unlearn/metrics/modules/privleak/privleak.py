"""PrivLeak (MUSE) as a module of `evaluate`."""

from __future__ import annotations

from typing import Any

from datasets import Features, Value

from hf_unlearn.metrics import functional as f
from hf_unlearn.metrics.modules import base, citations

DESCRIPTION = """\
PrivLeak: 100 (AUC_ref - AUC) / (1 - AUC_ref), in percent, of the AUC of a membership inference attack (MUSE: Min-K%
with 40% of the tokens). 0 is ideal, negative is under-unlearned, positive over-unlearned. It diverges as AUC_ref goes
to 1: read the AUCs beside it.
"""

INPUTS = """
Args:
    predictions (`list[float]`): of each row, a score that is high for non-members ([`min_k_scores`]).
    references (`list[int]`): 1 for a member (a row to forget), 0 for a row that the model has never seen.
    reference_auc (`float`, *optional*, defaults to `0.5`): AUC of the same attack on the retrained model.

Returns:
    privleak (`float`): in percent; infinite where only `reference_auc` is 1.
    privleak_auc (`float`): AUC of these scores, in [0, 1].
    privleak_reference_auc (`float`): as given.

Example:
    >>> from hf_unlearn.metrics import load_metric
    >>> metric = load_metric("privleak")
    >>> metric.compute(predictions=[0.1, 0.4, 0.3, 2.0], references=[1, 1, 0, 0])
    {'privleak': -50.0, 'privleak_auc': 0.75, 'privleak_reference_auc': 0.5}
"""


class Privleak(base.UnlearningMetric):
    """[`privleak`] of scores with their labels."""

    def _info(self) -> Any:
        return base.metric_info(
            description=DESCRIPTION,
            inputs=INPUTS,
            citation=citations.MUSE,
            features=Features({"predictions": Value("float64"), "references": Value("float64")}),
        )

    def score(
        self, *, predictions: list[float], references: list[float], reference_auc: float = 0.5
    ) -> dict[str, Any]:
        """PrivLeak and the two AUCs that it is made of."""
        auc = f.mia_auc(*base.by_membership(predictions, references))
        return {
            "privleak": f.privleak(auc, reference_auc),
            "privleak_auc": auc,
            "privleak_reference_auc": reference_auc,
        }
