"""Harmonic means: model utility (TOFU, arXiv 2401.06121)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike

from hf_unlearn.metrics.arrays import is_share, unit_rows


def harmonic_mean(values: ArrayLike) -> float:
    """Harmonic mean of scores in [0, 1], and 0 if any of them is 0.

    Args:
        values (`ArrayLike`): scores `(n,)`.

    Raises:
        `ValueError`: on an empty or NaN input, or a value outside [0, 1].
    """
    array = unit_rows("values", values)
    with np.errstate(divide="ignore", over="ignore"):  # 1 / 0 is infinite, and so is the sum: the mean is 0
        return float(len(array) / (1.0 / array).sum())


def model_utility(parts: Mapping[str, float]) -> float:
    """Model utility: harmonic mean of its parts, 0 if any is 0.

    TOFU's has nine: {probability, ROUGE-L recall, truth ratio} x {retain, real authors, world facts}, with
    [`probability`] on retain, [`normalised_probability`] on the other two, and [`retain_truth_ratio`].

    Args:
        parts (`Mapping[str, float]`): score in [0, 1] by name.

    Raises:
        `ValueError`: if there are no parts, or naming those outside [0, 1].
    """
    bad = {name: value for name, value in parts.items() if not is_share(value)}
    if bad:
        raise ValueError(f"Every part of the model utility must be in [0, 1], got {bad}.")
    if not parts:
        raise ValueError("Model utility needs at least one part, got none.")
    return harmonic_mean(list(parts.values()))
