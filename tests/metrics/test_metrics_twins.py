"""Each function over arrays against a slow, obvious twin on random rows; AUC against scikit-learn too."""

from __future__ import annotations

import math
import warnings
import zlib
from fractions import Fraction
from itertools import product
from typing import Any

import numpy as np
import pytest

from hf_unlearn.metrics import functional as f

RNG = np.random.default_rng(1)


# --- probability, truth ratio ---


def test_probability_equals_the_geometric_mean_of_token_probabilities() -> None:
    tokens = [RNG.uniform(0.01, 1, 1 + i) for i in range(12)]
    twin = []
    for row in tokens:
        whole = 1.0
        for p in row:
            whole *= p
        twin.append(whole ** (1 / len(row)))
    assert f.probability([-np.log(row).mean() for row in tokens]) == pytest.approx(twin, rel=1e-12)


def test_rounding_of_a_sure_answer_is_a_probability_that_utility_takes() -> None:
    sure = f.probability([-1e-4, -1e-9, 0.0])
    assert sure.tolist() == [1.0, 1.0, 1.0]
    assert f.model_utility({"retain_probability": float(sure.mean())}) == 1.0


@pytest.mark.parametrize("scale", [0.1, 3.0, 300.0])
def test_truth_ratio_aggregates_equal_slow_twins(scale: float) -> None:
    ratios = np.exp(RNG.normal(0, scale, 50).clip(-700, 700))
    forget = retain = 0.0
    for ratio in ratios:
        forget += ratio if ratio < 1 else 1 / ratio
        retain += 1 - ratio if ratio < 1 else 0.0
    assert f.forget_truth_ratio(ratios) == pytest.approx(forget / 50, rel=1e-12)
    assert f.retain_truth_ratio(ratios) == pytest.approx(retain / 50, rel=1e-12)


def test_truth_ratios_at_the_ends_of_floats_are_aggregated_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ratios = [0.0, 5e-324, 1e-310, 1.0, 1e308, math.inf]
        assert f.forget_truth_ratio(ratios) == pytest.approx(1 / 6)
        assert f.retain_truth_ratio(ratios) == pytest.approx(3 / 6)
        assert f.truth_ratio([0.0, 5000.0, 0.0], [[5000.0], [0.0], [math.inf]]).tolist() == [0.0, math.inf, 0.0]


def test_one_impossible_wrong_answer_makes_their_geometric_mean_zero() -> None:
    assert f.log_truth_ratio([1.0], [[2.0, math.inf]]).tolist() == [-math.inf]
    assert f.truth_share(f.log_truth_ratio([1.0], [[2.0, math.inf]])).tolist() == [1.0]


# --- utility ---


def test_harmonic_mean_equals_exact_fractions_and_is_within_its_parts() -> None:
    for values in RNG.uniform(0.001, 1, (20, 9)):
        exact = len(values) / sum(1 / Fraction(value) for value in values)
        assert f.harmonic_mean(values) == pytest.approx(float(exact), rel=1e-14)
        assert f.model_utility(dict(zip("abcdefghi", values, strict=True))) == f.harmonic_mean(values)
        assert values.min() <= f.harmonic_mean(values) <= values.mean()
    assert f.harmonic_mean([1.0] * 9) == 1.0
    with pytest.raises(ValueError, match=r"values must be in \[0, 1\], got values from 0.5 to 1.5"):
        f.harmonic_mean([0.5, 1.5])


# --- ROUGE ---


def slow_common(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence, from the table of all prefixes."""
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a, 1):
        for j, y in enumerate(b, 1):
            table[i][j] = table[i - 1][j - 1] + 1 if x == y else max(table[i - 1][j], table[i][j - 1])
    return table[-1][-1]


def test_rouge_equals_a_slow_twin_on_random_words() -> None:
    words = ["cat", "dog", "tree", "mat", "7"]  # the stemmer leaves them alone
    predictions = [[str(w) for w in RNG.choice(words, RNG.integers(0, 12))] for _ in range(40)]
    references = [[str(w) for w in RNG.choice(words, RNG.integers(1, 12))] for _ in range(40)]
    recall, f1 = [], []
    for p, r in zip(predictions, references, strict=True):
        common = slow_common(p, r)
        recall.append(common / len(r))
        f1.append(2 * common / (len(p) + len(r)))
    texts = [" ".join(p) for p in predictions], [" ".join(r) for r in references]
    assert f.rouge_l_recall(*texts) == pytest.approx(recall, rel=1e-12)
    assert f.rouge_l_f1(*texts) == pytest.approx(f1, rel=1e-12)
    assert f.rouge_l_f1(*texts) == pytest.approx(f.rouge_l_f1(*texts[::-1]), rel=1e-12)  # F1 is symmetric


def test_rouge_of_rows_that_are_no_text_is_refused() -> None:
    lists: Any = [["a"]]
    with pytest.raises(TypeError, match=r"predictions\[0\] must be a string, got list. Pass decoded text"):
        f.rouge_l_recall(lists, lists)
    several: Any = ["a", ["a", "b"]]
    with pytest.raises(TypeError, match=r"references\[1\] must be a string, got list"):
        f.rouge_l_f1(["a", "b"], several)
    missing: Any = ["a", None]
    with pytest.raises(TypeError, match=r"predictions\[1\] must be a string, got NoneType"):
        f.rouge_l_f1(missing, ["a", "b"])


def test_rouge_ignores_case_punctuation_and_other_scripts() -> None:
    assert f.rouge_l_f1("The Cat, sat!", "the cat sat") == 1.0
    assert f.rouge_l_recall("Привет", "Привет") == 0.0
    assert f.rouge_l_recall("", "") == 0.0


# --- membership ---


def slow_auc(members: np.ndarray, others: np.ndarray) -> float:
    return sum((b > a) + (b == a) / 2 for a, b in product(members, others)) / (len(members) * len(others))


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 9), (37, 20), (60, 60)])
def test_auc_equals_all_pairs_and_scikit_learn_with_ties(n: int, m: int) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    for round_to in (0, 8):
        a, b = np.round(RNG.normal(0, 1, n), round_to), np.round(RNG.normal(0.5, 1, m), round_to)
        known = metrics.roc_auc_score([0] * n + [1] * m, np.concatenate([a, b]))
        assert f.mia_auc(a, b) == pytest.approx(slow_auc(a, b), rel=1e-12) == pytest.approx(known, rel=1e-12)
        assert f.auc_of_draws(np.stack([a, -a]), np.stack([b, -b])) == pytest.approx([known, 1 - known], abs=1e-12)


def test_auc_of_infinite_scores_by_hand() -> None:
    assert f.mia_auc([-math.inf, 0.0], [math.inf, math.inf]) == 1.0
    assert f.mia_auc([math.inf], [math.inf, 1.0]) == 0.25


def test_privleak_equals_its_definition_in_exact_fractions() -> None:
    for auc, reference in RNG.uniform(0, 1, (30, 2)):
        own, other = 1 - Fraction(auc), 1 - Fraction(reference)
        assert f.privleak(auc, reference) == pytest.approx(float(100 * (own - other) / other), rel=1e-12)
    for bad in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="auc must be in"):
            f.privleak(bad)


def test_mia_closeness_and_privacy_equal_exact_fractions() -> None:
    for auc, reference in RNG.uniform(0, 1, (30, 2)):
        a, r = Fraction(auc), Fraction(reference)
        twin = 1 - abs(a - r) / max(r, 1 - r)
        assert f.mia_closeness(auc, reference) == pytest.approx(float(twin), rel=1e-12)
    first, second = RNG.uniform(0.2, 0.8, (2, 4))
    names = ("loss", "zlib", "min-k", "min-k++")
    pairs = [(Fraction(a), Fraction(r)) for a, r in zip(first, second, strict=True)]
    parts = [1 - abs(a - r) / max(r, 1 - r) for a, r in pairs]
    found = f.privacy_score(dict(zip(names, first, strict=True)), dict(zip(names, second, strict=True)))
    assert found == pytest.approx(float(4 / sum(1 / part for part in parts)), rel=1e-12)


def test_zlib_and_reference_scores_equal_slow_twins() -> None:
    own = [-RNG.exponential(1, 1 + i) for i in range(10)]
    other = [-RNG.exponential(1, 2 + i) for i in range(10)]  # another tokenizer
    texts = ["na" * (5 * i) + "é" * i for i in range(10)]
    by_size, difference = [], []
    for mine, theirs, text in zip(own, other, texts, strict=True):
        loss = -sum(mine) / len(mine)
        by_size.append(loss / len(zlib.compress(bytes(text, "utf-8"))))
        difference.append(loss + sum(theirs) / len(theirs))
    assert f.zlib_scores(own, texts) == pytest.approx(by_size, rel=1e-12)
    assert f.reference_scores(own, other) == pytest.approx(difference, rel=1e-12)


# --- memorisation ---


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("at_least_one", [False, True])
def test_memorisation_equals_slow_twins(drop_last: bool, at_least_one: bool) -> None:
    for _ in range(200):
        n = int(RNG.integers(2, 9))
        predictions, labels = RNG.integers(0, 2, n).tolist(), RNG.integers(0, 2, n).tolist()
        kept = n - 1 if drop_last else n
        p, l = predictions[:kept], labels[:kept]
        exact = sum(a == b for a, b in zip(p, l, strict=True)) / kept
        strength = 1 / kept if at_least_one else 0.0
        for k in range(kept):
            if p[k:] == l[k:]:
                strength = 1 - k / kept
                break
        assert f.exact_memorization(predictions, labels, drop_last=drop_last) == pytest.approx(exact, rel=1e-12)
        found = f.extraction_strength(predictions, labels, drop_last=drop_last, at_least_one=at_least_one)
        assert found == pytest.approx(strength, rel=1e-12)


def test_extraction_strength_of_the_public_suite_by_hand() -> None:
    # nothing right: theirs is 1/n of the tokens that are left, the right value is 0
    assert f.extraction_strength([9, 9, 9, 4], [1, 2, 3, 4], drop_last=True) == 0.0
    assert f.extraction_strength([9, 9, 9, 4], [1, 2, 3, 4], drop_last=True, at_least_one=True) == pytest.approx(1 / 3)
    assert f.extraction_strength([9, 2, 3, 4], [1, 2, 3, 4], drop_last=True, at_least_one=True) == pytest.approx(2 / 3)


# --- uncertainty ---


def test_statistics_of_draws_by_hand() -> None:
    assert f.mean_of_draws(np.array([[1.0, 3.0], [2.0, 2.0]])).tolist() == [2.0, 2.0]
    assert f.auc_of_draws(np.array([[0.0, 2.0]]), np.array([[1.0]])).tolist() == [0.5]
    both = f.each_draw(lambda a, b: float(a.sum() * b.sum()))
    assert np.asarray(both(np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[2.0], [10.0]]))).tolist() == [6.0, 70.0]
