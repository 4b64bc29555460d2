"""Probability of the answer, and its share among wrong answers (TOFU, arXiv 2401.06121).

Shapes: n rows, k wrong answers of a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from hf_unlearn.metrics.arrays import FloatArray, nll_groups, nll_rows


def probability(nll: ArrayLike) -> FloatArray:
    """Length-normalised probability `(n,)` of each answer: exp(-NLL), in [0, 1].

    Args:
        nll (`ArrayLike`): mean of -log p over the response tokens of each row `(n,)`, in nats.

    Raises:
        `ValueError`: on an empty, NaN or negative input.
    """
    # a loss that rounding took below 0 is a probability of 1: model_utility refuses a mean above
    return np.exp(-np.maximum(nll_rows("nll", nll), 0.0))


def normalised_probability(nll_true: ArrayLike, nll_wrong: ArrayLike | Sequence[ArrayLike]) -> FloatArray:
    """Share `(n,)` of the true answer: p_true / (p_true + sum_k p_wrong_k), with p = exp(-NLL).

    Computed from differences of losses, so that it stays defined where every probability underflows.

    Args:
        nll_true (`ArrayLike`): NLL of the true answers `(n,)`.
        nll_wrong (`ArrayLike` or `Sequence[ArrayLike]`): NLL of the wrong answers `(n, k)`, or a list of `(k_i,)`.

    Raises:
        `ValueError`: on empty, NaN or negative input, another number of rows, or a row without any finite NLL.
    """
    true = nll_rows("nll_true", nll_true)
    share = np.empty_like(true)
    for i, wrong in enumerate(nll_groups("nll_wrong", nll_wrong, len(true))):
        every = np.append(wrong, true[i])
        if not np.isfinite(every.min()):
            raise ValueError(f"Row {i}: no answer has a finite NLL, so there is no probability to share.")
        weights = np.exp(every.min() - every)
        share[i] = weights[-1] / weights.sum()
    return share
