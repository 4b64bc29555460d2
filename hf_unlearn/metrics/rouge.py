"""ROUGE-L through the rouge-score package, with its Porter stemmer, as TOFU and MUSE report it.

rouge-score keeps only the letters a-z and digits: text in other scripts has no tokens and scores 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, overload

import numpy as np

from hf_unlearn.metrics.arrays import FloatArray

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer


@overload
def rouge_l_recall(predictions: str, references: str) -> float: ...  # type: ignore[overload-overlap]  # str is a Sequence[str]
@overload
def rouge_l_recall(predictions: Sequence[str], references: Sequence[str]) -> FloatArray: ...
def rouge_l_recall(predictions: str | Sequence[str], references: str | Sequence[str]) -> float | FloatArray:
    """ROUGE-L recall (TOFU): longest common subsequence / length of the reference, in stemmed words.

    Args:
        predictions (`str` or `Sequence[str]`): generated text, or n of them.
        references (`str` or `Sequence[str]`): expected text, or n of them.

    Returns:
        `float` for two strings, else an array `(n,)`. An empty prediction or reference scores 0.

    Raises:
        `ValueError`: on empty sequences or sequences of different lengths.
        `TypeError`: if one argument is a string and the other is not, or a row is something else than a string.
    """
    return _rouge_l(predictions, references, "recall")


@overload
def rouge_l_f1(predictions: str, references: str) -> float: ...  # type: ignore[overload-overlap]  # str is a Sequence[str]
@overload
def rouge_l_f1(predictions: Sequence[str], references: Sequence[str]) -> FloatArray: ...
def rouge_l_f1(predictions: str | Sequence[str], references: str | Sequence[str]) -> float | FloatArray:
    """ROUGE-L F1 (MUSE): harmonic mean of precision and recall. As [`rouge_l_recall`] otherwise."""
    return _rouge_l(predictions, references, "fmeasure")


@lru_cache(maxsize=1)
def _scorer() -> RougeScorer:
    from rouge_score.rouge_scorer import RougeScorer  # imports nltk: slow

    return RougeScorer(["rougeL"], use_stemmer=True)


def _rouge_l(
    predictions: str | Sequence[str], references: str | Sequence[str], field: Literal["recall", "fmeasure"]
) -> float | FloatArray:
    if isinstance(predictions, str) and isinstance(references, str):
        return float(getattr(_scorer().score(references, predictions)["rougeL"], field))
    if isinstance(predictions, str) or isinstance(references, str):
        raise TypeError(
            f"predictions and references must both be a string or both be sequences of strings, got "
            f"{type(predictions).__name__} and {type(references).__name__}."
        )
    if len(predictions) != len(references):
        raise ValueError(f"Got {len(predictions)} predictions for {len(references)} references.")
    if not len(predictions):
        raise ValueError("predictions is empty: ROUGE needs at least one row.")
    for name, texts in (("predictions", predictions), ("references", references)):
        bad = next((row for row, text in enumerate(texts) if not isinstance(text, str)), None)
        if bad is not None:
            raise TypeError(
                f"{name}[{bad}] must be a string, got {type(texts[bad]).__name__}. Pass decoded text, one reference a "
                "row."
            )
    scores = [_rouge_l(p, r, field) for p, r in zip(predictions, references, strict=True)]
    return np.asarray(scores, dtype=np.float64)
