"""Exact memorisation as a module of `evaluate`."""

from __future__ import annotations

from typing import Any

from datasets import Features, Sequence, Value

from hf_unlearn.metrics import functional as f
from hf_unlearn.metrics.modules import base, citations

DESCRIPTION = """\
Exact memorisation: share of the response positions at which the most likely token is the label, with the true
response before it. 1 where the model would write every token of the row; lower is better on a forget set.
"""

INPUTS = """
Args:
    predictions (`list[list[int]]`): of each row, the token ids with the highest logit at the response positions.
    references (`list[list[int]]`): of each row, the token ids of the response, end of sequence included, without
        ignored positions (-100).
    drop_last (`bool`, *optional*, defaults to `False`): leave the last token out, as the public suite does.
    use_aggregator (`bool`, *optional*, defaults to `True`): the mean over rows; False for the list of rows.

Returns:
    exact_memorization (`float`, or `list[float]` of the rows), in [0, 1].

Example:
    >>> from hf_unlearn.metrics import load_metric
    >>> metric = load_metric("exact_memorization")
    >>> metric.compute(predictions=[[1, 2, 9, 4], [5, 6]], references=[[1, 2, 3, 4], [5, 6]])
    {'exact_memorization': 0.875}
"""


class ExactMemorization(base.UnlearningMetric):
    """[`exact_memorization`] of rows of token ids."""

    def _info(self) -> Any:
        return base.metric_info(
            description=DESCRIPTION,
            inputs=INPUTS,
            citation=citations.EXACT + citations.OPEN_UNLEARNING,
            features=Features({"predictions": Sequence(Value("int64")), "references": Sequence(Value("int64"))}),
        )

    def score(
        self,
        *,
        predictions: list[list[int]],
        references: list[list[int]],
        drop_last: bool = False,
        use_aggregator: bool = True,
    ) -> dict[str, Any]:
        """Mean over rows, or the rows."""
        values = base.each_row(f.exact_memorization, predictions, references, drop_last=drop_last)
        return {"exact_memorization": base.mean_or_rows(values, use_aggregator)}
