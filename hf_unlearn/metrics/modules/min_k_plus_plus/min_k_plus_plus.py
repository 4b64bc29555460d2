"""AUC of the Min-K%++ attack as a module of `evaluate`."""

from __future__ import annotations

from typing import Any

from datasets import Features, Sequence, Value

from hf_unlearn.metrics import functional as f
from hf_unlearn.metrics.modules import base, citations

DESCRIPTION = """\
AUC of the Min-K%++ membership inference attack: Min-K% of token log-probabilities from which the mean of log p under
the model at that position was taken, over its deviation. 0.5: the attack cannot tell members from non-members; 1:
memorised; 0: over-forgotten.
"""

INPUTS = """
Args:
    predictions (`list[list[float]]`): of each row, the log-probability of every response token, in nats.
    mu (`list[list[float]]`): of each row, the mean of log p under the model at every response position, in nats.
    sigma (`list[list[float]]`): of each row, the standard deviation of log p there, in nats.
    references (`list[int]`): 1 for a member (a row to forget), 0 for a row that the model has never seen.
    share (`float`, *optional*, defaults to `0.4`): of the tokens that count, in (0, 1].

Returns:
    min_k_plus_plus_auc (`float`), in [0, 1].

Example:
    >>> from hf_unlearn.metrics import load_metric
    >>> metric = load_metric("min_k_plus_plus")
    >>> metric.compute(predictions=[[-0.1], [-3.0]], mu=[[-1.0], [-1.0]], sigma=[[0.5], [0.5]], references=[1, 0])
    {'min_k_plus_plus_auc': 1.0}
"""


class MinKPlusPlus(base.UnlearningMetric):
    """[`mia_auc`] of [`min_k_plus_plus_scores`]."""

    def _info(self) -> Any:
        return base.metric_info(
            description=DESCRIPTION,
            inputs=INPUTS,
            citation=citations.MIN_K_PLUS_PLUS,
            features=Features(
                {
                    "predictions": Sequence(Value("float64")),
                    "mu": Sequence(Value("float64")),
                    "sigma": Sequence(Value("float64")),
                    "references": Value("float64"),
                }
            ),
        )

    def score(
        self,
        *,
        predictions: list[list[float]],
        mu: list[list[float]],
        sigma: list[list[float]],
        references: list[float],
        share: float = 0.4,
    ) -> dict[str, Any]:
        """AUC of members against non-members."""
        scores = f.min_k_plus_plus_scores(predictions, mu, sigma, share=share)
        return {"min_k_plus_plus_auc": f.mia_auc(*base.by_membership(scores, references))}
