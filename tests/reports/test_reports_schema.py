from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hf_unlearn.reports import ConstraintOutcome, ModelScores, Results, library_versions, read_results, write_results
from hf_unlearn.reports.plain import pull_non_finite, put_non_finite, to_number, to_plain


def _strict(path: Path) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def test_results_survive_the_file(sample: dict[str, Any], tmp_path: Path) -> None:
    path = write_results(tmp_path / "new" / "results.json", sample)
    results = read_results(path)
    assert results == Results.from_dict(sample)
    assert write_results(tmp_path / "again.json", results).read_text() == path.read_text()
    assert results.forget_quality_log10 == pytest.approx(math.log10(0.4216))
    assert results.target.extra["mia_auc"] == 0.998
    assert results.constraints[0] == ConstraintOutcome(
        name="retain", eps=0.022, loss=0.0131, multiplier=4.21, feasible=True
    )


def test_file_has_the_names_that_users_read(sample: dict[str, Any], tmp_path: Path) -> None:
    raw = _strict(write_results(tmp_path / "results.json", sample))
    for model in ("target", "unlearned", "reference"):
        for score in ("forget_probability", "forget_rouge", "retain_probability", "retain_rouge"):
            assert raw[model][score] == sample[model][score]
    assert raw["forget_quality"] == 0.4216
    assert set(raw["constraints"][0]) == {"name", "eps", "loss", "multiplier", "feasible"}
    assert raw["seconds"]["total"] == 194.0
    assert raw["schema_version"] == 1
    assert "non_finite" not in raw


def test_nan_and_infinity_become_null_and_come_back(sample: dict[str, Any], tmp_path: Path) -> None:
    sample["unlearned"]["mia_auc"] = math.nan
    sample["history"] = [{"step": 1, "loss/forget": math.inf, "a~b": -math.inf}]
    sample["forget_quality"] = 0.0
    path = write_results(tmp_path / "results.json", sample)
    raw = _strict(path)
    assert raw["unlearned"]["mia_auc"] is None
    assert raw["non_finite"] == {
        "/unlearned/mia_auc": "nan",
        "/forget_quality_log10": "-inf",
        "/history/0/loss~1forget": "inf",
        "/history/0/a~0b": "-inf",
    }
    results = read_results(path)
    assert math.isnan(results.unlearned.extra["mia_auc"])
    assert results.history[0] == {"step": 1, "loss/forget": math.inf, "a~b": -math.inf}
    assert results.forget_quality_log10 == -math.inf


def test_pointers_that_lead_nowhere_are_ignored() -> None:
    plain, found = pull_non_finite({"a": [math.nan, 1.0]})
    assert (plain, found) == ({"a": [None, 1.0]}, {"/a/0": "nan"})
    wrong = {"/a/7": "nan", "/b/c": "inf", "": "nan", "/a/0": "wat", "/a/1": "nan"}
    assert put_non_finite(plain, wrong) == {"a": [None, 1.0]}


def test_numpy_and_torch_numbers_are_taken(sample: dict[str, Any], tmp_path: Path) -> None:
    sample["target"]["forget_rouge"] = np.float32(0.5)
    sample["target"]["mia_auc"] = torch.tensor(0.25)
    sample["settings"]["betas"] = (np.float64(0.9), torch.tensor([1, 2]))
    results = read_results(write_results(tmp_path / "results.json", sample))
    assert (results.target.forget_rouge, results.target.extra["mia_auc"]) == (0.5, 0.25)
    assert results.settings["betas"] == [0.9, [1, 2]]


@pytest.mark.parametrize("value", [True, "0.5", [1.0], object()])
def test_what_is_no_number_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="`forget_rouge` must be a number"):
        ModelScores(forget_probability=0.1, forget_rouge=value, retain_probability=0.1, retain_rouge=0.1)


def test_to_plain_knows_paths_sets_and_enums() -> None:
    assert to_plain({"p": Path("a"), "s": {2, 1}, "t": (1, None), "d": torch.float32}) == {
        "p": "a",
        "s": [1, 2],
        "t": [1, None],
        "d": "torch.float32",
    }
    assert math.isnan(to_number(None, "x"))


def test_credentials_are_not_written_but_special_tokens_are(sample: dict[str, Any], tmp_path: Path) -> None:
    text = write_results(tmp_path / "results.json", sample).read_text()
    assert "hf_abcdef" not in text
    assert "<|end|>" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"forget_quality": 1.5}, "p-value"),
        ({"seconds": {"train": 1.0}}, "'total'"),
        ({"schema_version": 99}, "upgrade"),
        ({"truth_ratios": {"other": [1.0]}}, "'other'"),
        ({"constraints": [{"name": "retain", "eps": 1.0}]}, "loss, multiplier, feasible"),
        ({"generations": [{"question": "q"}]}, "answer, target, unlearned, part"),
        ({"generations": [{"question": "q", "answer": "a", "target": "", "unlearned": "", "part": "x"}]}, "'x'"),
        ({"target": {"forget_rouge": 1.0}}, "`target` lacks forget_probability"),
    ],
)
def test_bad_results_are_refused_with_the_reason(sample: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Results.from_dict({**sample, **change})


def test_missing_entries_and_wrong_types_are_named(sample: dict[str, Any]) -> None:
    del sample["versions"]
    with pytest.raises(ValueError, match="lack versions"):
        Results.from_dict(sample)
    with pytest.raises(TypeError, match="`target` must be a mapping"):
        Results.from_dict({**sample, "versions": {}, "target": 3})
    with pytest.raises(TypeError, match="`history` must be a list"):
        Results.from_dict({**sample, "versions": {}, "history": {"step": 1}})


def test_unknown_entries_are_kept(sample: dict[str, Any], tmp_path: Path) -> None:
    results = read_results(write_results(tmp_path / "r.json", {**sample, "relearning": {"steps": [1, 2]}}))
    assert results.extra == {"relearning": {"steps": [1, 2]}}


def test_a_failed_write_leaves_the_old_file(
    sample: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_results(tmp_path / "results.json", sample)
    before = path.read_text()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_results(path, {**sample, "seed": 1})
    assert path.read_text() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_reading_what_is_no_results_file_says_so(text: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"results\.json"):
        read_results(path)


def test_versions_name_every_library_and_no_machine() -> None:
    versions = library_versions()
    assert {"hf_unlearn", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "python"} <= set(versions)
    assert versions["torch"] == torch.__version__.split("+")[0] or versions["torch"] == torch.__version__
    assert os.uname().nodename not in versions["platform"] or not os.uname().nodename


def test_importing_reports_is_cheap() -> None:
    code = (
        "import sys, hf_unlearn.reports as r; r.write_results; r.library_versions; r.judge;"
        "print([m for m in ('torch', 'transformers', 'matplotlib', 'jinja2', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
