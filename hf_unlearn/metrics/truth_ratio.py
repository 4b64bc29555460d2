"""Truth ratio and forget quality (TOFU, arXiv 2401.06121).

Shapes: n rows, k perturbed (wrong) answers of a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from hf_unlearn.metrics.arrays import FloatArray, nll_groups, nll_rows, rows


def log_truth_ratio(correct_nll: ArrayLike, perturbed_nll: ArrayLike | Sequence[ArrayLike]) -> FloatArray:
    """Natural logarithm `(n,)` of the truth ratio: NLL(correct) - mean_k NLL(perturbed_k).

    It does not overflow where a destroyed model has an NLL of hundreds, and any rank statistic of it (forget quality)
    is the same as of the ratio itself.

    Args:
        correct_nll (`ArrayLike`):
            NLL of the paraphrased answer `(n,)`; of the plain answer for real authors and world facts.
        perturbed_nll (`ArrayLike` or `Sequence[ArrayLike]`): NLL of the wrong answers `(n, k)`, or a list of `(k_i,)`.

    Raises:
        `ValueError`: on empty, NaN or negative input, another number of rows, or a row with both sides infinite.
    """
    correct = nll_rows("correct_nll", correct_nll)
    wrong = np.array([group.mean() for group in nll_groups("perturbed_nll", perturbed_nll, len(correct))])
    undefined = np.isinf(correct) & np.isinf(wrong)
    if undefined.any():
        raise ValueError(
            f"Row {np.flatnonzero(undefined)[0]}: both sides have an infinite NLL, the ratio is undefined."
        )
    return correct - wrong


def truth_ratio(correct_nll: ArrayLike, perturbed_nll: ArrayLike | Sequence[ArrayLike]) -> FloatArray:
    """Truth ratio TR `(n,)` = wrong / correct = exp(-mean_k NLL(perturbed_k)) / exp(-NLL(correct)).

    Below 1 the model prefers the correct answer. The mean of the losses is the geometric mean of the probabilities.
    Arguments and errors are those of [`log_truth_ratio`].
    """
    with np.errstate(over="ignore"):  # an infinite ratio is a valid extreme: both aggregates map it to 0
        return np.exp(log_truth_ratio(correct_nll, perturbed_nll))


def forget_truth_ratio(ratios: ArrayLike) -> float:
    """Aggregate of the forget set: mean of min(TR, 1 / TR), in [0, 1].

    It is 1 where right and wrong answers are equally likely.

    Args:
        ratios (`ArrayLike`): truth ratios `(n,)`.
    """
    values = _ratios(ratios)
    with np.errstate(divide="ignore"):
        return float(np.minimum(values, 1.0 / values).mean())


def retain_truth_ratio(ratios: ArrayLike) -> float:
    """Aggregate of retain sets, real authors and world facts: mean of max(0, 1 - TR), in [0, 1]; higher is better.

    Args:
        ratios (`ArrayLike`): truth ratios `(n,)`.
    """
    return float(np.maximum(0.0, 1.0 - _ratios(ratios)).mean())


def forget_quality(ratios: ArrayLike, reference_ratios: ArrayLike) -> float:
    """P-value of the two-sided two-sample Kolmogorov-Smirnov test between two models' truth ratios on the forget set.

    High (above 0.05) means that the unlearned model cannot be told from one that never saw the forget set. The test
    compares ranks only, so truth ratios and their logarithms give the same value; pass the logarithms if any overflow.
    Score both models on the same questions: the test compares distributions, and questions differ in difficulty.

    Args:
        ratios (`ArrayLike`): per-row truth ratios `(n,)` of the unlearned model.
        reference_ratios (`ArrayLike`): per-row truth ratios `(m,)` of the retain-only model, on the same questions.

    Raises:
        `ValueError`: on an empty or NaN input.
    """
    return _kolmogorov_smirnov(ratios, reference_ratios)[1]


def forget_quality_log10(ratios: ArrayLike, reference_ratios: ArrayLike) -> float:
    """Decimal logarithm of the forget quality, 0 at best.

    Where the p-value is too small for a 64-bit float, the leading term of its asymptotic form
    2 exp(-2 D^2 nm / (n + m)) stands in. Arguments and errors are those of [`forget_quality`].
    """
    statistic, p_value, effective = _kolmogorov_smirnov(ratios, reference_ratios)
    if p_value > 0:
        return math.log10(p_value)
    return math.log10(2.0) - 2.0 * effective * statistic**2 / math.log(10.0)


def _kolmogorov_smirnov(first: ArrayLike, second: ArrayLike) -> tuple[float, float, float]:
    """Statistic D, p-value, and effective sample size nm / (n + m)."""
    from scipy.stats import ks_2samp  # half a second to import

    a, b = rows("ratios", first), rows("reference_ratios", second)
    result = ks_2samp(a, b, alternative="two-sided", method="auto")
    return float(result.statistic), float(result.pvalue), len(a) * len(b) / (len(a) + len(b))


def _ratios(values: ArrayLike) -> FloatArray:
    array = rows("ratios", values)
    if (array < 0).any():
        raise ValueError(f"Truth ratios are >= 0, got {array.min():.4g}: pass ratios, not their logarithms.")
    return array
