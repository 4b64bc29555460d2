"""Metrics on hand-computed cases, against slow twins, scipy and scikit-learn, and on bad input."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy import stats

from hf_unlearn.metrics import functional as f

RNG = np.random.default_rng(0)
EXTREME = 2000.0  # an NLL at which exp underflows


# --- probability ---


def test_probability_by_hand() -> None:
    assert f.probability([0.0, math.log(4), math.inf]).tolist() == [1.0, pytest.approx(0.25), 0.0]
    assert f.probability([-1e-4])[0] == pytest.approx(1.0, abs=1e-3)  # rounding of half precision is no error


def test_normalised_probability_by_hand_and_ragged() -> None:
    # p_true .2 against .1 + .1, and .5 against .5
    got = f.normalised_probability([-math.log(0.2), -math.log(0.5)], [[-math.log(0.1)] * 2, [-math.log(0.5)]])
    assert got == pytest.approx([0.5, 0.5])


def test_normalised_probability_equals_a_slow_twin_and_survives_underflow() -> None:
    true, wrong = RNG.uniform(0, 9, 30), RNG.uniform(0, 9, (30, 5))
    twin = [math.exp(-t) / (math.exp(-t) + sum(math.exp(-x) for x in w)) for t, w in zip(true, wrong, strict=True)]
    assert f.normalised_probability(true, wrong) == pytest.approx(twin, rel=1e-12)
    assert f.normalised_probability(true + EXTREME, wrong + EXTREME) == pytest.approx(twin, rel=1e-9)
    assert f.normalised_probability([math.inf], [[1.0]]).tolist() == [0.0]


# --- truth ratio, forget quality ---


def test_truth_ratio_by_hand() -> None:
    # wrong: geometric mean of .1 and .4 is .2; correct .4
    correct, wrong = [-math.log(0.4)], [[-math.log(0.1), -math.log(0.4)]]
    assert f.truth_ratio(correct, wrong) == pytest.approx([0.5])
    assert f.log_truth_ratio(correct, wrong) == pytest.approx([math.log(0.5)])


def test_truth_ratio_equals_a_slow_twin_on_ragged_rows() -> None:
    correct = RNG.uniform(0, 5, 20)
    wrong = [RNG.uniform(0, 5, 1 + i % 4).tolist() for i in range(20)]
    twin = []
    for c, group in zip(correct, wrong, strict=True):
        product = 1.0
        for x in group:
            product *= math.exp(-x)
        twin.append(product ** (1 / len(group)) / math.exp(-c))
    assert f.truth_ratio(correct, wrong) == pytest.approx(twin, rel=1e-12)


def test_truth_ratio_aggregates_by_hand_and_at_the_extremes() -> None:
    assert f.forget_truth_ratio([0.5, 2.0, 1.0]) == pytest.approx((0.5 + 0.5 + 1) / 3)
    assert f.retain_truth_ratio([0.5, 2.0, 1.0]) == pytest.approx(0.5 / 3)
    extremes = f.truth_ratio([EXTREME, 0.0], [[0.0], [EXTREME]])
    assert extremes.tolist() == [math.inf, 0.0]
    assert f.forget_truth_ratio(extremes) == 0.0
    assert f.retain_truth_ratio(extremes) == 0.5


def test_forget_quality_is_one_for_the_same_rows_and_ignores_the_scale() -> None:
    a, b = RNG.lognormal(0, 1, 80), RNG.lognormal(0.4, 1, 60)
    assert f.forget_quality(a, a) == 1.0
    assert f.forget_quality_log10(a, a) == 0.0
    assert f.forget_quality(a, b) == pytest.approx(f.forget_quality(np.log(a), np.log(b)), rel=1e-12)
    assert f.forget_quality(a, b) == pytest.approx(f.forget_quality(b, a), rel=1e-9)


def test_forget_quality_equals_the_exact_distribution_by_enumeration() -> None:
    from itertools import combinations

    a, b = [0.1, 0.2, 0.5, 0.3], [0.4, 0.6, 0.7, 0.8, 0.35]

    def statistic(x: list[float], y: list[float]) -> float:
        return max(abs(sum(v <= t for v in x) / len(x) - sum(v <= t for v in y) / len(y)) for t in x + y)

    pooled, seen = a + b, statistic(a, b)
    splits = list(combinations(range(len(pooled)), len(a)))
    at_least = 0
    for split in splits:
        chosen = [pooled[i] for i in split]
        rest = [pooled[i] for i in range(len(pooled)) if i not in split]
        at_least += statistic(chosen, rest) >= seen - 1e-12
    assert f.forget_quality(a, b) == pytest.approx(at_least / len(splits))


def test_log_forget_quality_reaches_below_the_smallest_float() -> None:
    # two disjoint samples of 400 rows: p = 2 / C(800, 400)
    exact = math.log10(2) - math.log10(math.comb(800, 400))
    low, high = np.arange(400.0), np.arange(400.0) + 1e6
    assert f.forget_quality_log10(low, high) == pytest.approx(exact, rel=1e-6)
    assert exact < -238
    low, high = np.arange(2000.0), np.arange(2000.0) + 1e6
    assert f.forget_quality(low, high) == 0.0
    exact = math.log10(2) - math.log10(math.comb(4000, 2000))
    assert f.forget_quality_log10(low, high) == pytest.approx(exact, rel=1e-9)


# --- utility ---


def test_model_utility_by_hand() -> None:
    assert f.model_utility({"a": 0.5, "b": 1.0}) == pytest.approx(2 / 3)
    assert f.model_utility({"a": 0.5, "b": 0.0}) == 0.0
    values = RNG.uniform(0.1, 1, 9)
    assert f.harmonic_mean(values) == pytest.approx(stats.hmean(values))
    assert f.harmonic_mean([1e-320, 1.0]) == 0.0  # 1 / x overflows


# --- ROUGE ---


def lcs(a: list[str], b: list[str]) -> int:
    if not a or not b:
        return 0
    if a[-1] == b[-1]:
        return 1 + lcs(a[:-1], b[:-1])
    return max(lcs(a[:-1], b), lcs(a, b[:-1]))


def test_rouge_equals_a_slow_twin() -> None:
    prediction, reference = "the red cat sat on a mat", "red cat on the big mat today"
    common, n, m = lcs(prediction.split(), reference.split()), 7, 7
    assert common == 4
    assert f.rouge_l_recall(prediction, reference) == pytest.approx(common / m)
    assert f.rouge_l_recall("cat", reference) == pytest.approx(1 / m)
    assert f.rouge_l_recall(reference, "cat") == 1.0  # recall is over the reference, never the prediction
    assert f.rouge_l_f1("cat", reference) == pytest.approx(2 * 1 / (1 + m))
    assert f.rouge_l_f1(prediction, reference) == pytest.approx(2 * common / (n + m))


def test_rouge_stems_and_scores_empty_text_zero() -> None:
    assert f.rouge_l_recall("She was writing novels.", "she was write novel") == 1.0
    got = f.rouge_l_recall(["", "a b", "a b"], ["a", "", "a c"])
    assert got.tolist() == [0.0, 0.0, 0.5]
    assert f.rouge_l_f1(["a b"], ["a b"]).tolist() == [1.0]


# --- membership ---


def test_auc_by_hand_and_equal_to_scikit_learn_with_ties() -> None:
    assert f.mia_auc([0, 1], [2, 3]) == 1.0
    assert f.mia_auc([2, 3], [0, 1]) == 0.0
    assert f.mia_auc([1, 1], [1, 1]) == 0.5
    assert f.mia_auc([0, 2], [1]) == 0.5
    metrics = pytest.importorskip("sklearn.metrics")
    members, others = RNG.integers(0, 8, 60), RNG.integers(2, 10, 45)
    expected = metrics.roc_auc_score([0] * 60 + [1] * 45, np.concatenate([members, others]))
    assert f.mia_auc(members, others) == pytest.approx(expected, rel=1e-12)


def test_privleak_has_the_sign_of_over_forgetting() -> None:
    assert f.privleak(0.5) == 0.0
    assert f.privleak(1.0) == -100.0  # memorised
    assert f.privleak(0.0) == 100.0
    assert f.privleak(0.0, 0.4) == pytest.approx(100 * (1 - 0.6) / 0.6)
    assert f.privleak(0.9, 1.0) == math.inf
    assert f.privleak(1.0, 1.0) == 0.0


# --- memorisation ---


def test_exact_memorization_by_hand() -> None:
    assert f.exact_memorization([1, 2, 9, 4], [1, 2, 3, 4]) == 0.75
    assert f.exact_memorization([1, 2, 3, 9], [1, 2, 3, 4], drop_last=True) == 1.0


@pytest.mark.parametrize(
    ("predictions", "strength"),
    [([1, 2, 3, 4], 1.0), ([9, 2, 3, 4], 0.75), ([1, 9, 3, 4], 0.5), ([9, 9, 9, 4], 0.25), ([1, 2, 3, 9], 0.0)],
)
def test_extraction_strength_by_hand_and_zero_when_the_end_is_wrong(predictions: list[int], strength: float) -> None:
    labels = [1, 2, 3, 4]
    assert f.extraction_strength(predictions, labels) == strength
    slow = next((1 - k / 4 for k in range(4) if predictions[k:] == labels[k:]), 0.0)
    assert slow == strength


# --- bad input ---

PAIRS: list[Callable[..., object]] = [f.forget_quality, f.forget_quality_log10, f.mia_auc]
SINGLES: list[Callable[..., object]] = [f.probability, f.forget_truth_ratio, f.retain_truth_ratio, f.harmonic_mean]


@pytest.mark.parametrize("function", SINGLES)
def test_empty_or_nan_rows_are_refused(function: Callable[..., object]) -> None:
    with pytest.raises(ValueError, match="is empty"):
        function([])
    with pytest.raises(ValueError, match=r"1 NaN of 2 values \(first at row 1\)"):
        function([0.5, math.nan])
    with pytest.raises(ValueError, match=r"one-dimensional \(n,\), got shape \(1, 1\)"):
        function([[0.5]])


@pytest.mark.parametrize("function", PAIRS)
def test_empty_or_nan_samples_are_refused(function: Callable[..., object]) -> None:
    for first, second in (([], [0.5]), ([0.5], [])):
        with pytest.raises(ValueError, match="is empty"):
            function(first, second)
    with pytest.raises(ValueError, match="1 NaN of 1"):
        function([0.5], [math.nan])


def test_wrong_signs_counts_and_ranges_are_refused() -> None:
    with pytest.raises(ValueError, match="Pass -log p, not log p"):
        f.probability([-3.0])
    with pytest.raises(ValueError, match="one group of answers for each of the 2 rows, got 1"):
        f.truth_ratio([1.0, 1.0], [[1.0]])
    with pytest.raises(ValueError, match=r"perturbed_nll\[1\] is empty"):
        f.truth_ratio([1.0, 1.0], [[1.0], []])
    with pytest.raises(ValueError, match="both sides have an infinite NLL"):
        f.truth_ratio([math.inf], [[math.inf]])
    with pytest.raises(ValueError, match="no answer has a finite NLL"):
        f.normalised_probability([math.inf], [[math.inf]])
    with pytest.raises(ValueError, match="pass ratios, not their logarithms"):
        f.forget_truth_ratio([-0.5])
    with pytest.raises(ValueError, match=r"must be in \[0, 1\], got \{'b': 1.5\}"):
        f.model_utility({"a": 0.5, "b": 1.5})
    with pytest.raises(ValueError, match="'a': nan"):
        f.model_utility({"a": math.nan})
    with pytest.raises(ValueError, match="at least one part"):
        f.model_utility({})
    with pytest.raises(ValueError, match="reference_auc must be in"):
        f.privleak(0.5, 1.2)


@pytest.mark.parametrize("function", SINGLES)
def test_what_is_no_number_is_refused_with_the_name_of_the_argument(function: Callable[..., object]) -> None:
    for bad in (["a"], "abc", [1j], [[1.0], [1.0, 2.0]], [object()]):
        with pytest.raises(TypeError, match=r"^(nll|ratios|values) must be numbers \(n,\), one a row: "):
            function(bad)


def test_tensors_that_numpy_cannot_read_are_refused_with_what_to_do() -> None:
    torch = pytest.importorskip("torch")
    for bad in (torch.ones(2, dtype=torch.bfloat16), torch.ones(2, requires_grad=True)):
        with pytest.raises(TypeError, match=r"Pass a list, an array, or a tensor as `tensor.detach\(\).float\(\).cpu"):
            f.probability(bad)
        assert f.probability(bad.detach().float().cpu()) == pytest.approx(math.exp(-1))


def test_parts_and_groups_that_are_missing_are_named() -> None:
    nothing: Any = None
    with pytest.raises(ValueError, match=r"must be in \[0, 1\], got \{'b': None\}"):
        f.model_utility({"a": 0.5, "b": nothing})
    with pytest.raises(ValueError, match=r"utility_score must be in \[0, 1\], got \{'fluency': None\}"):
        f.utility_score(model_utility=0.5, fluency=nothing)
    with pytest.raises(ValueError, match=r"reference_auc must be in \[0, 1\], got None"):
        f.privleak(0.5, nothing)
    for wrong in (nothing, 3.0):
        with pytest.raises(TypeError, match=r"perturbed_nll must be \(n, k\) or one list a row, got"):
            f.truth_ratio([1.0], wrong)


def test_bad_text_and_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="2 predictions for 1 references"):
        f.rouge_l_recall(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="predictions is empty"):
        f.rouge_l_f1([], [])
    with pytest.raises(TypeError, match="got str and list"):
        f.rouge_l_recall("a", ["a"])
    for function in (f.exact_memorization, f.extraction_strength):
        with pytest.raises(ValueError, match="no response token"):
            function([], [])
        with pytest.raises(ValueError, match=r"no response token to compare \(drop_last=True\)"):
            function([1], [1], drop_last=True)
        with pytest.raises(ValueError, match=r"got \(2,\) and \(1,\)"):
            function([1, 2], [1])
        with pytest.raises(ValueError, match="without the ignored ones"):
            function([1, 2], [1, -100])
        with pytest.raises(TypeError, match="predictions must be token ids, which are integers, got float64"):
            function([0.3, math.nan], [1, 2])
        with pytest.raises(TypeError, match="labels must be token ids, which are integers, got <U1"):
            function([1, 2], ["a", "b"])


def test_importing_the_metrics_loads_nothing_heavy() -> None:
    code = (
        "import sys, hf_unlearn.metrics as m; heavy = {'torch', 'scipy', 'sklearn', 'transformers', 'rouge_score'}; "
        "print(sorted(heavy & set(sys.modules))); assert m.__all__ and callable(m.probability)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
