"""AUC of the zlib attack as a module of `evaluate`."""

from __future__ import annotations

from typing import Any

from datasets import Features, Sequence, Value

from hf_unlearn.metrics import functional as f
from hf_unlearn.metrics.modules import base, citations

DESCRIPTION = """\
AUC of the zlib membership inference attack: the score of a row is its mean NLL over the length of its compressed
text. 0.5: the attack cannot tell members from non-members; 1: memorised; 0: over-forgotten.
"""

INPUTS = """
Args:
    predictions (`list[list[float]]`): of each row, the log-probability of every response token, in nats.
    texts (`list[str]`): of each row, the text of these tokens.
    references (`list[int]`): 1 for a member (a row to forget), 0 for a row that the model has never seen.

Returns:
    zlib_auc (`float`), in [0, 1].

Example:
    >>> from hf_unlearn.metrics import load_metric
    >>> metric = load_metric("zlib")
    >>> metric.compute(predictions=[[-0.1], [-3.0]], texts=["seen", "other"], references=[1, 0])
    {'zlib_auc': 1.0}
"""


class Zlib(base.UnlearningMetric):
    """[`mia_auc`] of [`zlib_scores`]."""

    def _info(self) -> Any:
        return base.metric_info(
            description=DESCRIPTION,
            inputs=INPUTS,
            citation=citations.EXTRACTION,
            features=Features(
                {"predictions": Sequence(Value("float64")), "texts": Value("string"), "references": Value("float64")}
            ),
        )

    def score(self, *, predictions: list[list[float]], texts: list[str], references: list[float]) -> dict[str, Any]:
        """AUC of members against non-members."""
        scores = f.zlib_scores(predictions, texts)
        return {"zlib_auc": f.mia_auc(*base.by_membership(scores, references))}
