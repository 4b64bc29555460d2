"""ROUGE-L as a module of `evaluate`, without the hub."""

from __future__ import annotations

from typing import Any

from datasets import Features, Value

from hf_unlearn.metrics import functional as f
from hf_unlearn.metrics.modules import base, citations

DESCRIPTION = """\
ROUGE-L of stemmed words by the rouge-score package: recall, as TOFU reports it, and F1, as MUSE does. It keeps only
the letters a-z and digits: text in other scripts has no words and scores 0.
"""

INPUTS = """
Args:
    predictions (`list[str]`): generated text of each row.
    references (`list[str]`): expected text of each row.
    use_aggregator (`bool`, *optional*, defaults to `True`): the mean over rows; False for the list of rows.

Returns:
    rouge_l_recall, rouge_l_f1 (`float`, or `list[float]` of the rows), in [0, 1].

Example:
    >>> from hf_unlearn.metrics import load_metric
    >>> metric = load_metric("rouge_l")
    >>> metric.compute(predictions=["a cat sat"], references=["the cat sat on a mat"])
    {'rouge_l_recall': 0.3333333333333333, 'rouge_l_f1': 0.4444444444444444}
"""


class RougeL(base.UnlearningMetric):
    """[`rouge_l_recall`] and [`rouge_l_f1`] of rows."""

    def _info(self) -> Any:
        return base.metric_info(
            description=DESCRIPTION,
            inputs=INPUTS,
            citation=citations.ROUGE + citations.TOFU + citations.MUSE,
            features=Features({"predictions": Value("string"), "references": Value("string")}),
        )

    def score(self, *, predictions: list[str], references: list[str], use_aggregator: bool = True) -> dict[str, Any]:
        """Means over rows, or the rows."""
        return {
            "rouge_l_recall": base.mean_or_rows(f.rouge_l_recall(predictions, references), use_aggregator),
            "rouge_l_f1": base.mean_or_rows(f.rouge_l_f1(predictions, references), use_aggregator),
        }
