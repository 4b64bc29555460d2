"""AUC of the Min-K% attack as a module of `evaluate`."""

from __future__ import annotations

from typing import Any

from datasets import Features, Sequence, Value

from hf_unlearn.metrics import functional as f
from hf_unlearn.metrics.modules import base, citations

DESCRIPTION = """\
AUC of the Min-K% membership inference attack: the score of a row is minus the mean of the lowest share of its token
log-probabilities. 0.5: the attack cannot tell members from non-members; 1: memorised; 0: over-forgotten.
"""

INPUTS = """
Args:
    predictions (`list[list[float]]`): of each row, the log-probability of every response token, in nats.
    references (`list[int]`): 1 for a member (a row to forget), 0 for a row that the model has never seen.
    share (`float`, *optional*, defaults to `0.4`): of the tokens that count, in (0, 1]; 1 is the loss attack.

Returns:
    min_k_auc (`float`), in [0, 1].

Example:
    >>> from hf_unlearn.metrics import load_metric
    >>> metric = load_metric("min_k")
    >>> metric.compute(predictions=[[-0.1, -0.2], [-3.0, -0.1, -0.1]], references=[1, 0])
    {'min_k_auc': 1.0}
"""


class MinK(base.UnlearningMetric):
    """[`mia_auc`] of [`min_k_scores`]."""

    def _info(self) -> Any:
        return base.metric_info(
            description=DESCRIPTION,
            inputs=INPUTS,
            citation=citations.MIN_K,
            features=Features({"predictions": Sequence(Value("float64")), "references": Value("float64")}),
        )

    def score(self, *, predictions: list[list[float]], references: list[float], share: float = 0.4) -> dict[str, Any]:
        """AUC of members against non-members."""
        scores = f.min_k_scores(predictions, share=share)
        return {"min_k_auc": f.mia_auc(*base.by_membership(scores, references))}
