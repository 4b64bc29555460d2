"""Modules of `evaluate`: the same numbers as the functions, offline, from a path, combined, in pieces, on bad input."""

from __future__ import annotations

import doctest
import importlib.util
import inspect
import math
import re
import socket
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import pytest

from hf_unlearn import metrics as f
from hf_unlearn.metrics import load_metric, module_path
from hf_unlearn.metrics.modules import MODULES

RNG = np.random.default_rng(0)
NLL = RNG.uniform(0, 4, 12).tolist()
WRONG = [RNG.uniform(0, 4, 1 + i % 3).tolist() for i in range(12)]
LABELS = [[int(x) for x in RNG.integers(0, 3, 1 + i)] for i in range(12)]
ARGMAX = [[int(x) for x in RNG.integers(0, 3, 1 + i)] for i in range(12)]
LOGPS = [(-RNG.exponential(1, 1 + i)).tolist() for i in range(12)]
MU = [(-RNG.uniform(1, 4, 1 + i)).tolist() for i in range(12)]
SIGMA = [RNG.uniform(0.1, 2, 1 + i).tolist() for i in range(12)]
MEMBER = [1, 0, 0, 1, 1, 0, 1, 0, 0, 0, 1, 0]
TEXTS = [f"the {i % 4} cats sat on {i % 3} mats" for i in range(12)]
ANSWERS = [f"{i % 3} cats sat on the mat" for i in range(12)]
PARTS = RNG.uniform(0.2, 1, 12).tolist()

ROW_NAMES = {"predictions": "prediction", "references": "reference"}
DOCS = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"


def members(scores: Any) -> tuple[np.ndarray, np.ndarray]:
    kinds = np.array(MEMBER, dtype=bool)
    return np.asarray(scores)[kinds], np.asarray(scores)[~kinds]


def mean_of(function: Any, **options: Any) -> float:
    return float(np.mean([function(p, l, **options) for p, l in zip(ARGMAX, LABELS, strict=True)]))


# name: (inputs, settings, what the plain functions say)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "exact_memorization": (
        {"predictions": ARGMAX[1:], "references": LABELS[1:]},
        {"drop_last": True, "use_aggregator": False},
        {
            "exact_memorization": [
                f.exact_memorization(p, l, drop_last=True) for p, l in zip(ARGMAX[1:], LABELS[1:], strict=True)
            ]
        },
    ),
    "extraction_strength": (
        {"predictions": ARGMAX, "references": LABELS},
        {"at_least_one": True},
        {"extraction_strength": mean_of(f.extraction_strength, at_least_one=True)},
    ),
    "forget_quality": (
        {"predictions": NLL, "references": PARTS},
        {},
        {
            "forget_quality": f.forget_quality(NLL, PARTS),
            "forget_quality_log10": f.forget_quality_log10(NLL, PARTS),
        },
    ),
    "mia_auc": ({"predictions": NLL, "references": MEMBER}, {}, {"mia_auc": f.mia_auc(*members(NLL))}),
    "min_k": (
        {"predictions": LOGPS, "references": MEMBER},
        {"share": 0.25},
        {"min_k_auc": f.mia_auc(*members(f.min_k_scores(LOGPS, share=0.25)))},
    ),
    "min_k_plus_plus": (
        {"predictions": LOGPS, "mu": MU, "sigma": SIGMA, "references": MEMBER},
        {"share": 0.5},
        {"min_k_plus_plus_auc": f.mia_auc(*members(f.min_k_plus_plus_scores(LOGPS, MU, SIGMA, share=0.5)))},
    ),
    "model_utility": (
        {"predictions": PARTS, "references": [f"part {i}" for i in range(12)]},
        {},
        {"model_utility": f.harmonic_mean(PARTS)},
    ),
    "normalised_probability": (
        {"predictions": NLL, "references": WRONG},
        {},
        {"normalised_probability": f.normalised_probability(NLL, WRONG).mean()},
    ),
    "privleak": (
        {"predictions": NLL, "references": MEMBER},
        {"reference_auc": 0.4},
        {
            "privleak": f.privleak(f.mia_auc(*members(NLL)), 0.4),
            "privleak_auc": f.mia_auc(*members(NLL)),
            "privleak_reference_auc": 0.4,
        },
    ),
    "probability": ({"predictions": NLL}, {}, {"probability": f.probability(NLL).mean()}),
    "rouge_l": (
        {"predictions": ANSWERS, "references": TEXTS},
        {"use_aggregator": False},
        {
            "rouge_l_recall": f.rouge_l_recall(ANSWERS, TEXTS).tolist(),
            "rouge_l_f1": f.rouge_l_f1(ANSWERS, TEXTS).tolist(),
        },
    ),
    "truth_ratio": (
        {"predictions": NLL, "references": WRONG},
        {},
        {
            "forget_truth_ratio": f.forget_truth_ratio(f.truth_ratio(NLL, WRONG)),
            "retain_truth_ratio": f.retain_truth_ratio(f.truth_ratio(NLL, WRONG)),
        },
    ),
    "zlib": (
        {"predictions": LOGPS, "texts": TEXTS, "references": MEMBER},
        {},
        {"zlib_auc": f.mia_auc(*members(f.zlib_scores(LOGPS, TEXTS)))},
    ),
}


@pytest.fixture(autouse=True, scope="module")
def nothing_of_the_user_s(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Caches in a temporary folder, one for all: Python remembers where modules were found. No network."""

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError(f"a metric went to the network: {arguments}")

    cache = tmp_path_factory.mktemp("evaluate")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.config, "HF_METRICS_CACHE", str(cache / "metrics"))
        patch.setattr(evaluate.config, "HF_MODULES_CACHE", str(cache / "modules"))
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        yield


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-12), name


def batches(inputs: dict[str, Any], sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    starts = np.cumsum([0, *sizes])
    return [{name: rows[start:stop] for name, rows in inputs.items()} for start, stop in pairwise(starts)]


def test_every_module_has_a_case() -> None:
    assert sorted(CASES) == sorted(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_gives_what_the_function_gives_in_one_call_in_pieces_and_row_by_row(name: Any) -> None:
    inputs, settings, expected = CASES[name]
    metric = load_metric(name)
    assert_equal(metric.compute(**inputs, **settings), expected)
    total = len(inputs["predictions"])
    for batch in batches(inputs, (1, 4, total - 5)):
        metric.add_batch(**batch)
    assert_equal(metric.compute(**settings), expected)
    for row in range(total):
        metric.add(**{ROW_NAMES.get(key, key): rows[row] for key, rows in inputs.items()})
    assert_equal(metric.compute(**settings), expected)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_loads_from_its_path_with_its_settings_and_from_memory(name: Any) -> None:
    inputs, settings, expected = CASES[name]
    loaded = evaluate.load(module_path(name), **settings)
    assert loaded.name == name
    assert_equal(loaded.compute(**inputs), expected)
    assert_equal(load_metric(name, keep_in_memory=True).compute(**inputs, **settings), expected)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_describes_itself_and_its_example_is_true(name: Any) -> None:
    metric = load_metric(name)
    for feature in metric.features:
        assert re.search(rf"^    {feature} \(`", metric.inputs_description, re.MULTILINE)
    assert "Returns:" in metric.inputs_description
    assert len(metric.description) > 80
    assert metric.citation.startswith("@")
    assert metric.citation.count("{") == metric.citation.count("}")
    assert metric.license == "Apache-2.0"
    example = doctest.DocTestParser().get_doctest(metric.inputs_description, {}, name, None, 0)
    shown: list[str] = []
    assert doctest.DocTestRunner(verbose=False).run(example, out=shown.append) == (0, 3), "".join(shown)


def test_modules_combine_in_one_call_and_in_pieces() -> None:
    inputs = {"predictions": NLL, "references": WRONG}
    names = ("truth_ratio", "normalised_probability")
    expected = {**CASES["truth_ratio"][2], **CASES["normalised_probability"][2]}
    combined = evaluate.combine([module_path(name) for name in names])  # type: ignore[arg-type]  # names, too, say its docs
    assert_equal(combined.compute(**inputs), expected)
    for batch in batches(inputs, (5, 7)):
        combined.add_batch(**batch)
    assert_equal(combined.compute(), expected)


def test_settings_of_one_module_in_a_combination_are_its_own() -> None:
    inputs = {"predictions": ARGMAX, "references": LABELS}
    combined = evaluate.combine(
        [load_metric("extraction_strength", at_least_one=True), load_metric("exact_memorization")]
    )
    assert combined.compute(**inputs) == pytest.approx(
        {
            "extraction_strength": mean_of(f.extraction_strength, at_least_one=True),
            "exact_memorization": mean_of(f.exact_memorization),
        },
        rel=1e-12,
    )
    strict = mean_of(f.extraction_strength)
    assert load_metric("extraction_strength").compute(**inputs)["extraction_strength"] == pytest.approx(strict)
    assert strict != pytest.approx(mean_of(f.extraction_strength, at_least_one=True))


def test_inputs_of_some_modules_reach_them_through_add_batch() -> None:
    names: tuple[Any, ...] = ("min_k", "min_k_plus_plus", "zlib")
    combined = evaluate.combine([load_metric(name, **CASES[name][1]) for name in names])
    combined.add_batch(predictions=LOGPS, references=MEMBER, mu=MU, sigma=SIGMA, texts=TEXTS)
    assert_equal(combined.compute(), {key: value for name in names for key, value in CASES[name][2].items()})
    with pytest.raises(
        TypeError, match=r"min_k has no setting mu.*pass inputs that only some modules take by `add_batch`"
    ):
        combined.compute(predictions=LOGPS, references=MEMBER, mu=MU)


def test_two_processes_score_the_rows_of_both_once() -> None:
    inputs, _, expected = CASES["mia_auc"]
    first, second = batches(inputs, (7, 5))
    ranks = [load_metric("mia_auc", num_process=2, process_id=i, experiment_id="both") for i in (1, 0)]

    def other_process() -> None:
        ranks[0].add_batch(**second)
        ranks[0].compute()

    # a process waits for the other one until both have opened their files
    waiting = threading.Thread(target=other_process)
    waiting.start()
    ranks[1].add_batch(**first)
    found = ranks[1].compute()
    waiting.join(30)
    assert_equal(found, expected)


def test_infinite_values_arrive_as_such() -> None:
    assert load_metric("probability").compute(predictions=[math.inf, 0.0]) == {"probability": 0.5}
    ratios = load_metric("truth_ratio", use_aggregator=False)
    assert ratios.compute(predictions=[2000.0], references=[[0.0]]) == {"truth_ratio": [math.inf]}
    sure = load_metric("privleak", reference_auc=1.0).compute(predictions=[1.0, 0.0], references=[1, 0])
    assert sure["privleak"] == math.inf


@pytest.mark.parametrize(
    ("name", "inputs", "message"),
    [
        ("exact_memorization", {"predictions": [[1], [1, 2]], "references": [[1], [1]]}, r"Row 1: Expected token ids"),
        ("exact_memorization", {"predictions": [[1]], "references": [[-100]]}, "Row 0: labels holds negative ids"),
        ("extraction_strength", {"predictions": [], "references": []}, "predictions is empty"),
        ("extraction_strength", {"predictions": [[1], [1]], "references": [[1]]}, r"Mismatch in the number"),
        ("forget_quality", {"predictions": [1.0]}, "forget_quality needs references"),
        ("forget_quality", {"predictions": [math.nan], "references": [1.0]}, "1 NaN of 1"),
        ("mia_auc", {"predictions": [1.0, 2.0], "references": [0, 2]}, "got 2 at row 1"),
        ("mia_auc", {"predictions": [1.0, 2.0], "references": [0.5, 1]}, "got 0.5 at row 0"),
        ("mia_auc", {"predictions": [1.0, 2.0], "references": [1, 1]}, r"All 2 rows are members \(1\)"),
        ("min_k", {"predictions": [[-1.0], []], "references": [1, 0]}, r"token_logps\[1\] is empty"),
        ("min_k", {"predictions": [[-1.0], [2.0]], "references": [1, 0]}, "Pass log p, not -log p"),
        ("min_k_plus_plus", {"predictions": [[-1.0]], "references": [1]}, r"inputs are missing: \['mu', 'sigma'\]"),
        (
            "zlib",
            {"predictions": [[-1.0], []], "texts": ["a", "b"], "references": [1, 0]},
            r"token_logps\[1\] is empty",
        ),
        ("model_utility", {"predictions": [0.5, 0.5], "references": ["a", "a"]}, "counts once, got a more than once"),
        ("model_utility", {"predictions": [1.5], "references": ["a"]}, "'a': 1.5"),
        ("normalised_probability", {"predictions": [1.0], "references": [[]]}, r"nll_wrong\[0\] is empty"),
        ("privleak", {"predictions": [1.0, 2.0], "references": [0, 0]}, r"All 2 rows are non-members \(0\)"),
        ("probability", {"predictions": [-3.0]}, "Pass -log p, not log p"),
        ("rouge_l", {"predictions": ["a"], "references": [["a"]]}, "don't match the expected format"),
        ("truth_ratio", {"predictions": [None], "references": [[1.0]]}, "correct_nll has 1 NaN"),
    ],
)
def test_bad_rows_are_refused_and_the_metric_serves_again(name: Any, inputs: dict[str, Any], message: str) -> None:
    metric = load_metric(name, keep_in_memory=True)  # evaluate leaves its file locked for a second
    with pytest.raises(ValueError, match=message):
        metric.compute(**inputs)
    good, settings, expected = CASES[name]
    assert_equal(metric.compute(**good, **settings), expected)


def test_unknown_names_and_settings_are_refused() -> None:
    nonsense: Any = "rouge"
    for function in (load_metric, module_path):
        with pytest.raises(
            ValueError, match=r"There is no metric 'rouge'; expected one of exact_memorization, .*rouge_l"
        ):
            function(nonsense)
    with pytest.raises(TypeError, match="rouge_l has no setting drop_last; expected use_aggregator"):
        load_metric("rouge_l", drop_last=True)
    with pytest.raises(TypeError, match="mia_auc has no setting share; expected none"):
        evaluate.load(module_path("mia_auc"), share=0.2)
    combined = evaluate.combine([load_metric("mia_auc"), load_metric("privleak")])
    with pytest.raises(TypeError, match=r"its own module, load_metric\(name, setting=...\)"):
        combined.compute(**CASES["privleak"][0], reference_auc=0.4)


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "hf_unlearn.metrics.modules.find_spec", lambda name: None if name == "evaluate" else found(name)
    )
    with pytest.raises(ImportError, match=r'pip install "hf-unlearn\[evaluate\]"'):
        load_metric("rouge_l")
    assert Path(module_path("rouge_l"), "rouge_l.py").is_file()


@pytest.mark.parametrize("name", MODULES)
def test_wheels_carry_the_module_and_the_loader_can_read_its_imports(name: Any) -> None:
    folder = Path(module_path(name))
    assert (folder / "__init__.py").is_file(), "setuptools packs folders that are packages"
    lines = (folder / f"{name}.py").read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if re.match(r"import .*,", line)], "the loader takes `import a, b` for one name"


def test_the_table_in_the_docs_lists_every_module_with_its_outputs_and_settings() -> None:
    section = DOCS.read_text(encoding="utf-8").split("## As modules of `evaluate`")[1].split("\n## ")[0]
    table = {
        cells[0].strip("` "): cells
        for cells in re.findall(r"^\| (.+?) \| (.+) \| (.+) \| (.*?) \| ?(.*?) ?\|$", section, re.M)
    }
    assert sorted(table.keys() - {"module", "---"}) == sorted(MODULES)
    for name in MODULES:
        metric = load_metric(name, keep_in_memory=True)
        outputs = set(metric.compute(**CASES[name][0]))
        settings = inspect.signature(metric.score).parameters.keys() - set(metric.features)
        assert set(re.findall(r"`(\w+)`", table[name][3])) == outputs
        assert set(re.findall(r"`(\w+)`", table[name][4])) == settings
