"""P-values of the Kolmogorov-Smirnov test and their logarithms: by hand, against scipy and exact path counts."""

from __future__ import annotations

import math
import warnings
from itertools import pairwise

import numpy as np
import pytest
from scipy import stats

from hf_unlearn.metrics.functional import forget_quality, forget_quality_log10
from hf_unlearn.metrics.kolmogorov_smirnov import kolmogorov_smirnov, log_p_value

RNG = np.random.default_rng(0)


def slow_log_p_value(n: int, m: int, statistic: float) -> float:
    """Counts, in whole numbers of any size, the paths from (0, 0) to (n, m) that stay inside of D."""
    limit = round(statistic * n * m)
    paths = [[0] * (m + 1) for _ in range(n + 1)]
    for i in range(n + 1):
        for j in range(m + 1):
            if abs(i * m - j * n) < limit:
                paths[i][j] = 1 if i == j == 0 else (paths[i - 1][j] if i else 0) + (paths[i][j - 1] if j else 0)
    total = math.comb(n + m, n)
    return math.log(total - paths[n][m]) - math.log(total)


def shifted(n: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Two samples of n rows with D = k / n."""
    rows = np.arange(float(n))
    return rows, rows + k - 0.5


def test_p_values_by_hand() -> None:
    # one row against one: D is always 1. Two against two: D = 1 in 2 of the 6 orders, D >= 1/2 in all
    assert log_p_value(1, 1, 1.0) == pytest.approx(0.0, abs=1e-15)
    assert log_p_value(2, 2, 1.0) == pytest.approx(math.log(2 / 6))
    assert log_p_value(2, 2, 0.5) == pytest.approx(0.0, abs=1e-15)
    assert log_p_value(3, 2, 0.0) == 0.0
    # 1 against 3: D = 1 if the one is first or last, 2 of 4 orders
    assert log_p_value(1, 3, 1.0) == log_p_value(3, 1, 1.0) == pytest.approx(math.log(2 / 4))


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 7), (5, 4), (30, 30), (17, 23), (24, 36), (80, 60)])
def test_the_logarithm_equals_exact_path_counts_for_every_statistic(n: int, m: int) -> None:
    multiple = math.lcm(n, m)
    for limit in {1, multiple // 4, multiple // 3, multiple // 2, multiple - 1, multiple}:
        statistic = limit / multiple
        assert log_p_value(n, m, statistic) == pytest.approx(slow_log_p_value(n, m, statistic), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("n", "m"), [(40, 40), (400, 400), (400, 399), (300, 200)])
def test_p_values_equal_scipy_s_and_so_do_their_logarithms(n: int, m: int) -> None:
    for shift in (0.0, 0.3, 1.0, 3.0, 100.0):
        a, b = RNG.normal(0, 1, n), RNG.normal(shift, 1, m)
        known = stats.ks_2samp(a, b)
        found = kolmogorov_smirnov(a, b)
        assert (found.statistic, found.p_value) == (known.statistic, known.pvalue)
        assert forget_quality(a, b) == known.pvalue
        assert found.log10_p_value == forget_quality_log10(a, b) == pytest.approx(math.log10(known.pvalue), rel=1e-12)
        assert log_p_value(n, m, known.statistic) == pytest.approx(math.log(known.pvalue), rel=1e-9, abs=1e-12)


def test_a_larger_difference_has_the_smaller_logarithm_also_where_floats_end() -> None:
    # 1e-308 lies between: a stand-in that is not exact rises there, and a worse model looks better
    logarithms = [forget_quality_log10(*shifted(1000, k)) for k in range(700, 1001, 60)]
    assert logarithms[0] > -300
    assert logarithms[-1] == pytest.approx(math.log10(2) - math.log10(math.comb(2000, 1000)), rel=1e-9)
    assert all(later < earlier for earlier, later in pairwise(logarithms))
    assert forget_quality(*shifted(1000, 1000)) == 0.0


def test_the_logarithm_is_exact_below_the_smallest_float_for_unequal_samples() -> None:
    n, m = 620, 560
    assert log_p_value(n, m, 1.0) == pytest.approx(math.log(2) - math.log(math.comb(n + m, n)), rel=1e-9)
    statistic = 0.98
    limit = math.ceil(statistic * math.lcm(n, m)) / math.lcm(n, m)
    assert log_p_value(n, m, limit) == pytest.approx(slow_log_p_value(n, m, limit), rel=1e-9)
    assert log_p_value(n, m, limit) < math.log(1e-300)


def test_more_rows_than_scipy_s_exact_test_takes_have_the_asymptotic_logarithm() -> None:
    a, b = shifted(10_001, 10_001)
    assert forget_quality(a, b) == 0.0
    assert forget_quality_log10(a, b) == pytest.approx(math.log10(2) - 10_001 / math.log(10), rel=1e-9)


@pytest.mark.parametrize("n", [5, 7, 200])
def test_where_scipy_gives_up_its_exact_value_the_p_value_stays_exact_without_a_warning(n: int) -> None:
    first = np.arange(n, dtype=np.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = kolmogorov_smirnov(first, first + 1e-9)
    assert found.statistic == pytest.approx(1 / n)
    assert found.p_value == pytest.approx(1.0, abs=1e-12), "every pair of samples is at least this far apart"


def test_ties_and_infinite_rows_are_ranked_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert forget_quality([math.inf, 0.0, 1.0], [math.inf, 0.0, 1.0]) == 1.0
        assert forget_quality([-math.inf] * 4, [math.inf] * 4) == pytest.approx(2 / math.comb(8, 4))
        assert forget_quality([1.0] * 5, [1.0] * 3) == 1.0
        assert forget_quality_log10([0.0], [5.0]) == 0.0  # one row tells nothing
