"""Truth ratio and forget quality (TOFU, arXiv 2401.06121).

Shapes: n rows, k perturbed (wrong) answers of a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from hf_unlearn.metrics.arrays import FloatArray, nll_groups, nll_rows, rows
from hf_unlearn.metrics.kolmogorov_smirnov import KolmogorovSmirnov, kolmogorov_smirnov


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
    # 1 / TR is infinite for TR = 0 and for the smallest floats, and TR the smaller of the two
    with np.errstate(divide="ignore", over="ignore"):
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
    return _test(ratios, reference_ratios).p_value


def forget_quality_log10(ratios: ArrayLike, reference_ratios: ArrayLike) -> float:
    """Decimal logarithm of the forget quality, 0 at best.

    Finite where the p-value itself is too small for a 64-bit float: exact up to 10,000 rows ([`log_p_value`]), by the
    leading term 2 exp(-2 D^2 nm / (n + m)) beyond. Arguments and errors are those of [`forget_quality`].
    """
    return _test(ratios, reference_ratios).log10_p_value


def _test(ratios: ArrayLike, reference_ratios: ArrayLike) -> KolmogorovSmirnov:
    return kolmogorov_smirnov(rows("ratios", ratios), rows("reference_ratios", reference_ratios))


def _ratios(values: ArrayLike) -> FloatArray:
    array = rows("ratios", values)
    if (array < 0).any():
        raise ValueError(f"Truth ratios are >= 0, got {array.min():.4g}: pass ratios, not their logarithms.")
    return array
