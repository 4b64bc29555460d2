"""Multiple choice as an evaluation: the plain functions' numbers, on record, resumable, and from the harness's report."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hf_unlearn.data.multiple_choice_files import ChoiceRow, load_multiple_choice
from hf_unlearn.evaluation import choices as module
from hf_unlearn.evaluation.choices import choice_metrics, run_choices, run_harness
from hf_unlearn.evaluation.record import Evaluation
from hf_unlearn.lab.models import tiny_config, tiny_model
from hf_unlearn.lab.tokenizer import train_tokenizer
from hf_unlearn.metrics.multiple_choice import Accuracy, choice_prompt, choice_scores, evaluate_multiple_choice

WORDS = ("Rain", "Sand", "A ferry in the harbour of the old town", "Tea")
ROWS = [
    ChoiceRow(
        question=f"Which of these is number {number}{', by and large' * (number % 4)}?",
        choices=WORDS[: 2 + number % 3],
        answer=number % 2,
        subject=("Sea & sky", "kitchen", "")[number % 3],
    )
    for number in range(11)
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer([choice_prompt(row) + f" {letter}" for row in ROWS for letter in "ABCD"] * 2, 400)


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    model = tiny_model(tiny_config(tokenizer, hidden_size=32, num_layers=2, num_heads=4))
    with torch.no_grad():  # a fresh model is nearly uniform: sharpen it, so that order and masks matter
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
    return model


def test_metrics_of_a_hand_computed_case() -> None:
    scores = choice_scores(
        [[-1.0, -2.0], [-3.0, -1.0, -2.0], [-1.0, -0.5], [-2.0, -2.0]], [0, 1, 0, 1], subjects=["b c", "a", "b-c", ""]
    )
    found = choice_metrics(scores, "mmlu")
    assert {name: metric.value for name, metric in found.items() if name.startswith("accuracy")} == {
        "accuracy": 0.5,
        "accuracy_without_subject": 0.0,
        "accuracy_a": 1.0,
        "accuracy_b_c": 1.0,
        "accuracy_b_c_2": 0.0,
    }
    assert found["accuracy"].n == 4
    # resamples of n rows have a variance of s^2 (n - 1) / n^2
    assert found["accuracy"].standard_error == pytest.approx(0.25, abs=0.02)
    assert found["accuracy_a"].standard_error is None, "one row does not tell how much rows differ"
    assert found["ties"].value == 0.25
    assert found["chance"].value == pytest.approx((1 / 2 + 1 / 3 + 1 / 2 + 1 / 2) / 4)
    assert found["letter_mass"].value == pytest.approx(
        np.mean([sum(map(math.exp, row)) for row in ([-1, -2], [-3, -1, -2], [-1, -0.5], [-2, -2])])
    )
    assert found["accuracy"].higher_is_better is True
    assert choice_metrics(scores, "wmdp")["accuracy"].higher_is_better is None, (
        "below chance is not better than chance"
    )


def test_one_subject_needs_no_breakdown() -> None:
    scores = choice_scores([[-1.0, -2.0]], [0], subjects=["a"])
    assert set(choice_metrics(scores, "wmdp")) == {"accuracy", "letter_mass", "ties", "chance"}


def test_the_evaluation_says_what_the_plain_function_says_and_comes_back_from_its_file(
    tmp_path: Path, model: Any, tokenizer: Any
) -> None:
    plain = evaluate_multiple_choice(model, tokenizer, ROWS, batch_size=4)
    assert 0 < plain.accuracy().value < 1, "a model that is always right would hide mistakes"
    found = run_choices(
        model, tokenizer, ROWS, benchmark="wmdp", model_name="tiny", batch_size=3, output_dir=tmp_path / "out"
    )
    assert found.metrics["accuracy"].value == plain.accuracy().value
    assert found.metrics["accuracy"].n == len(ROWS)
    for subject, name in (("Sea & sky", "sea_sky"), ("kitchen", "kitchen"), ("", "without_subject")):
        assert found.metrics[f"accuracy_{name}"].value == plain.by_subject()[subject].value
    assert found.metrics["letter_mass"].value == pytest.approx(plain.letter_mass.mean(), abs=1e-6)
    assert Evaluation.load(tmp_path / "out") == found
    assert found.model_hash
    lines = (tmp_path / "out" / found.rows["choices"]).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert ["ABCD".index(row["prediction"]) for row in rows] == plain.predictions.tolist()
    for row, expected, count in zip(rows, plain.log_probs, plain.counts, strict=True):
        np.testing.assert_allclose(row["log_probs"], expected[:count], atol=1e-5)
    assert not any(question.question in lines[at] for at, question in enumerate(ROWS)), "questions may be hazardous"


def test_a_second_run_computes_nothing_and_a_changed_question_everything(
    tmp_path: Path, model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    original = module.letter_log_probs

    def counted(model: Any, encoded: Any, **options: Any) -> Any:
        seen.append(len(encoded))
        return original(model, encoded, **options)

    monkeypatch.setattr(module, "letter_log_probs", counted)
    first = run_choices(model, tokenizer, ROWS, output_dir=tmp_path)
    assert sum(seen) == len(ROWS)
    assert run_choices(model, tokenizer, ROWS, batch_size=2, output_dir=tmp_path).metrics == first.metrics
    assert sum(seen) == len(ROWS), "finished pieces are read, at any batch size"
    changed = [*ROWS[:-1], ChoiceRow(question="Another?", choices=WORDS[:2], answer=0)]
    run_choices(model, tokenizer, changed, output_dir=tmp_path)
    assert sum(seen) == 2 * len(ROWS)


def test_a_limit_takes_evenly_spaced_rows_and_is_on_record(model: Any, tokenizer: Any) -> None:
    found = run_choices(model, tokenizer, ROWS, limit=3)
    assert found.metrics["accuracy"].n == 3
    assert found.settings["limit"] == 3
    plain = evaluate_multiple_choice(model, tokenizer, [ROWS[0], ROWS[3], ROWS[7]])
    assert found.metrics["accuracy"].value == plain.accuracy().value
    assert found.settings["rows_digest"] != run_choices(model, tokenizer, ROWS).settings["rows_digest"]


def test_a_question_that_does_not_fit_is_refused_and_the_record_says_how(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = run_choices(model, tokenizer, ROWS[:2], settings={"dataset": "sea.json"})
    assert found.settings["dataset"] == "sea.json"
    assert {"dtype", "device", "resamples", "template_digest"} <= set(found.settings)
    monkeypatch.setattr(module, "Session", lambda *a, **k: pytest.fail("computed before the input was checked"))
    positions = model.config.max_position_embeddings
    long = ChoiceRow(question="Rain " * (positions + 1), choices=WORDS, answer=0, subject="")
    with pytest.raises(ValueError, match=f"has {positions} positions, .*Set max_length to at most {positions}"):
        run_choices(model, tokenizer, [*ROWS, long])


def test_an_output_folder_that_is_a_file_is_an_error_before_anything_is_computed(
    tmp_path: Path, model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "letter_log_probs", lambda *a, **k: pytest.fail("something was computed"))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="file"):
        run_choices(model, tokenizer, ROWS, output_dir=tmp_path / "file")
    with pytest.raises(ValueError, match="no rows to score"):
        run_choices(model, tokenizer, [])


def test_accuracies_of_the_harness_become_an_evaluation(
    tmp_path: Path, model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def report(model: Any, tokenizer: Any, tasks: Any, **options: Any) -> dict[str, Accuracy]:
        asked.update(options, tasks=tasks)
        return {
            "wmdp": Accuracy(value=0.5, n=10, standard_error=0.1),
            "wmdp_bio": Accuracy(value=0.4, n=4, standard_error=None),
        }

    monkeypatch.setattr(module, "evaluate_with_harness", report)
    found = run_harness(model, tokenizer, ["wmdp"], benchmark="wmdp", limit=6, output_dir=tmp_path)
    assert {name: (one.value, one.n, one.standard_error) for name, one in found.metrics.items()} == {
        "accuracy": (0.5, 10, 0.1),
        "accuracy_wmdp": (0.5, 10, 0.1),
        "accuracy_wmdp_bio": (0.4, 4, None),
    }
    assert asked["tasks"] == ["wmdp"]
    assert asked["limit"] == 6
    assert Evaluation.load(tmp_path) == found
    other = run_harness(model, tokenizer, ["poem"], benchmark="wmdp")
    assert "accuracy" not in other.metrics
    assert "the harness reports none for poem" in other.absent["accuracy"]


def test_parquet_files_are_read_like_json(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    entries = [{"question": "Wet?", "choices": ["Rain", "Sand"], "answer": 0, "subject": "sky"}]
    pq.write_table(pa.Table.from_pylist(entries), tmp_path / "a.parquet")
    (tmp_path / "b.json").write_text(json.dumps(entries), encoding="utf-8")
    assert load_multiple_choice(tmp_path / "a.parquet") == load_multiple_choice(tmp_path / "b.json")
    (tmp_path / "c.parquet").write_text("no")
    with pytest.raises(ValueError, match=r"c\.parquet is not Parquet"):
        load_multiple_choice(tmp_path / "c.parquet")
