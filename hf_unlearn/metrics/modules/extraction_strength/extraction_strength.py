"""Extraction strength as a module of `evaluate`."""

from __future__ import annotations

from typing import Any

from datasets import Features, Sequence, Value

from hf_unlearn.metrics import functional as f
from hf_unlearn.metrics.modules import base, citations

DESCRIPTION = """\
Extraction strength: 1 - k/n, with k the smallest number of response tokens after which the model would write the rest
of the n tokens itself; 0 where there is no such k. Lower is better on a forget set.
"""

INPUTS = """
Args:
    predictions (`list[list[int]]`): of each row, the token ids with the highest logit at the response positions.
    references (`list[list[int]]`): of each row, the token ids of the response, end of sequence included, without
        ignored positions (-100).
    drop_last (`bool`, *optional*, defaults to `False`): leave the last token out, as the public suite does.
    at_least_one (`bool`, *optional*, defaults to `False`): 1/n instead of 0 where nothing can be extracted; with
        `drop_last` this is the value of the public suite.
    use_aggregator (`bool`, *optional*, defaults to `True`): the mean over rows; False for the list of rows.

Returns:
    extraction_strength (`float`, or `list[float]` of the rows), in [0, 1].

Example:
    >>> from hf_unlearn.metrics import load_metric
    >>> metric = load_metric("extraction_strength")
    >>> metric.compute(predictions=[[9, 2, 3, 4], [5, 9]], references=[[1, 2, 3, 4], [5, 6]])
    {'extraction_strength': 0.375}
"""


class ExtractionStrength(base.UnlearningMetric):
    """[`extraction_strength`] of rows of token ids."""

    def _info(self) -> Any:
        return base.metric_info(
            description=DESCRIPTION,
            inputs=INPUTS,
            citation=citations.EXTRACTION + citations.OPEN_UNLEARNING,
            features=Features({"predictions": Sequence(Value("int64")), "references": Sequence(Value("int64"))}),
        )

    def score(
        self,
        *,
        predictions: list[list[int]],
        references: list[list[int]],
        drop_last: bool = False,
        at_least_one: bool = False,
        use_aggregator: bool = True,
    ) -> dict[str, Any]:
        """Mean over rows, or the rows."""
        options = {"drop_last": drop_last, "at_least_one": at_least_one}
        values = base.each_row(f.extraction_strength, predictions, references, **options)
        return {"extraction_strength": base.mean_or_rows(values, use_aggregator)}
