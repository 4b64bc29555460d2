"""Checks that every metric makes on its input: rows exist, are numbers, and have the right shape."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]

# a mean of -log p computed in half precision may fall this far below 0
NLL_ROUNDING = 1e-2


def rows(name: str, values: ArrayLike) -> FloatArray:
    """Return `values` as a non-empty 64-bit array `(n,)` without NaN.

    Raises:
        `ValueError`: naming the argument, for an empty or NaN input or another shape.
        `TypeError`: naming the argument, for what NumPy cannot read as numbers.
    """
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError) as error:  # PyTorch: bfloat16, a GPU, and gradients
        raise TypeError(
            f"{name} must be numbers (n,), one a row: {error}. Pass a list, an array, or a tensor as "
            "`tensor.detach().float().cpu()`."
        ) from error
    if array.ndim != 1:
        raise ValueError(f"{name} must be one-dimensional (n,), got shape {array.shape}.")
    if array.size == 0:
        raise ValueError(f"{name} is empty: the metric needs at least one row.")
    if np.isnan(array).any():
        bad = np.flatnonzero(np.isnan(array))
        raise ValueError(
            f"{name} has {len(bad)} NaN of {len(array)} values (first at row {bad[0]}). A row without response tokens "
            "has no mean loss: drop such rows before scoring."
        )
    return array


def nll_rows(name: str, values: ArrayLike) -> FloatArray:
    """Return mean negative log-likelihoods `(n,)`, refusing log-probabilities passed with the wrong sign."""
    array = rows(name, values)
    if (array < -NLL_ROUNDING).any():
        raise ValueError(
            f"{name} must be mean negative log-likelihoods, which are >= 0, got a minimum of {array.min():.4g}. "
            "Pass -log p, not log p."
        )
    return array


def nll_groups(name: str, values: ArrayLike | Sequence[ArrayLike], n: int) -> list[FloatArray]:
    """Return one array `(k_i,)` of negative log-likelihoods a row, for `n` rows; accepts `(n, k)` and ragged lists."""
    if not isinstance(values, Iterable):
        raise TypeError(f"{name} must be (n, k) or one list a row, got {type(values).__name__}.")
    groups = list(values)
    if len(groups) != n:
        raise ValueError(f"{name} must have one group of answers for each of the {n} rows, got {len(groups)} groups.")
    return [nll_rows(f"{name}[{i}]", group) for i, group in enumerate(groups)]


def unit_rows(name: str, values: ArrayLike) -> FloatArray:
    """Return values `(n,)` of which every one is in [0, 1]."""
    array = rows(name, values)
    if (array < 0).any() or (array > 1).any():
        raise ValueError(f"{name} must be in [0, 1], got values from {array.min():.4g} to {array.max():.4g}.")
    return array


def is_share(value: Any) -> bool:
    """Whether a value is a number in [0, 1]; NaN, None and text are not."""
    try:
        return bool(0.0 <= value <= 1.0)
    except TypeError:  # what cannot be compared is no number
        return False
