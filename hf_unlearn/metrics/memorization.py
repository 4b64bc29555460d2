"""Exact memorisation and extraction strength of one example, from token ids.

Shapes: n response positions. `predictions[t]` is the argmax of the logits that predict `labels[t]` (already shifted).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def exact_memorization(predictions: ArrayLike, labels: ArrayLike, *, drop_last: bool = False) -> float:
    """Share of the response positions whose argmax is the label.

    Args:
        predictions (`ArrayLike`): token ids `(n,)` with the highest logit.
        labels (`ArrayLike`): token ids `(n,)` of the response, end of sequence included.
        drop_last (`bool`, *optional*, defaults to `False`): leave the last token out, as the public suite does.

    Raises:
        `ValueError`: if nothing is left to compare, the shapes differ, or a label is negative.
        `TypeError`: if something else than integers is compared.
    """
    return float(_matches(predictions, labels, drop_last).mean())


def extraction_strength(
    predictions: ArrayLike, labels: ArrayLike, *, drop_last: bool = False, at_least_one: bool = False
) -> float:
    """1 - k/n, with k the smallest index from which every prediction equals the label; 0 when there is none.

    The share of the response that the model completes once it is given the first k tokens.

    Args:
        predictions (`ArrayLike`): as in [`exact_memorization`].
        labels (`ArrayLike`): as in [`exact_memorization`].
        drop_last (`bool`, *optional*, defaults to `False`): as in [`exact_memorization`].
        at_least_one (`bool`, *optional*, defaults to `False`):
            1/n instead of 0 where not even the last token is right. With `drop_last` this is the value of the public
            suite, which therefore rates a wrong answer the higher the shorter it is.

    Raises:
        `ValueError`, `TypeError`: as in [`exact_memorization`].
    """
    matches = _matches(predictions, labels, drop_last)
    misses = np.flatnonzero(~matches)
    k = 0 if misses.size == 0 else int(misses[-1]) + 1
    if at_least_one:
        k = min(k, len(matches) - 1)
    return 1.0 - k / len(matches)


def _matches(predictions: ArrayLike, labels: ArrayLike, drop_last: bool) -> NDArray[np.bool_]:
    predicted, expected = np.asarray(predictions), np.asarray(labels)
    if predicted.ndim != 1 or predicted.shape != expected.shape:
        raise ValueError(f"Expected token ids of one shape (n,), got {predicted.shape} and {expected.shape}.")
    if drop_last:
        predicted, expected = predicted[:-1], expected[:-1]
    if expected.size == 0:
        raise ValueError(f"There is no response token to compare (drop_last={drop_last}).")
    for name, ids in (("predictions", predicted), ("labels", expected)):
        if ids.dtype.kind not in "iub":
            raise TypeError(f"{name} must be token ids, which are integers, got {ids.dtype}. Pass the argmax.")
    if (expected < 0).any():
        raise ValueError(
            "labels holds negative ids: pass the response positions only, without the ignored ones (-100)."
        )
    return predicted == expected
