"""evaluation.json: comes back as it was written, and what is no evaluation is named."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from tofu_kit import build, tokenizer

from hf_unlearn.evaluation.record import Evaluation, MetricValue
from hf_unlearn.evaluation.session import Session
from hf_unlearn.evaluation.values import how_scored, save_rows, template_digest

FOUND = Evaluation(
    benchmark="muse",
    model="tiny",
    metrics={
        "privleak": MetricValue(value=math.inf, n=3, standard_error=math.inf, low=-1.5, high=math.inf),
        "verbmem_f": MetricValue(value=0.25, n=1, higher_is_better=True, unit="nats"),
    },
    absent={"knowmem_f": "no file"},
    settings={"limit": None, "hub_token": "hf_secret"},
    rows={"privleak": "privleak.jsonl"},
)


def test_what_was_written_is_read_in_strict_json_and_without_credentials(tmp_path: Path) -> None:
    path = FOUND.save(tmp_path)
    assert Evaluation.load(path) == Evaluation.load(tmp_path) == FOUND
    json.loads(path.read_text(), parse_constant=pytest.fail)
    assert "hf_secret" not in path.read_text()
    assert FOUND.values() == {"privleak": math.inf, "verbmem_f": 0.25}
    assert FOUND.standard_errors() == {"privleak": math.inf}


def test_fields_that_later_code_adds_are_no_error(tmp_path: Path) -> None:
    path = FOUND.save(tmp_path)
    content = json.loads(path.read_text())
    content["later"] = 1
    content["metrics"]["verbmem_f"]["later"] = 2
    path.write_text(json.dumps(content))
    assert Evaluation.load(path) == FOUND


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.pop("metrics"), "is no complete evaluation"),
        (lambda content: content["metrics"]["verbmem_f"].pop("n"), "is no complete evaluation"),
        (lambda content: content.update(metrics=[]), "is no complete evaluation"),
        (lambda content: content.update(version=2), "has version 2; this code reads 1"),
        (lambda content: content.update(format="other"), "holds no evaluation"),
    ],
)
def test_a_file_that_is_no_evaluation_is_named(tmp_path: Path, change: Any, message: str) -> None:
    path = FOUND.save(tmp_path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        Evaluation.load(tmp_path)


def test_nan_and_a_metric_that_is_there_and_absent_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="leave the metric out"):
        MetricValue(value=math.nan, n=1)
    with pytest.raises(ValueError, match="among the metrics and absent"):
        Evaluation(benchmark="rows", model="", metrics={"a": MetricValue(value=0.0, n=1)}, absent={"a": "why"})
    (tmp_path / "evaluation.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        Evaluation.load(tmp_path)


def test_an_evaluation_of_a_run_before_is_gone_while_new_rows_are_written(tmp_path: Path) -> None:
    FOUND.save(tmp_path)

    def lines() -> Any:
        assert not (tmp_path / "evaluation.json").exists(), "a kill here leaves rows of one model, numbers of another"
        yield {"row": 0}

    save_rows(Session(build(), tokenizer()), FOUND, tmp_path, {"privleak": lines()})
    assert Evaluation.load(tmp_path) == FOUND


def test_the_record_has_what_moves_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    plain = how_scored(Session(model, tokenizer(), batch_size=3))
    assert (plain["dtype"], plain["device"], plain["batch_size"], plain["processes"]) == ("float32", "cpu", 3, 1)
    assert plain["quantization"] is None
    model.config.quantization_config = {"load_in_4bit": True}
    assert how_scored(Session(model, tokenizer()))["quantization"] == {"load_in_4bit": True}
    before = template_digest(tokenizer())
    monkeypatch.setattr(tokenizer(), "chat_template", "{% for m in messages %}<{{ m.content }}>{% endfor %}")
    assert template_digest(tokenizer()) != before
