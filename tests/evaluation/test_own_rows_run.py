"""A user's own rows on a model: the plain functions' numbers by part, what the columns allow, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hf_unlearn.data import pad_rows
from hf_unlearn.data.own_rows import OwnRows, load_own_rows
from hf_unlearn.editing.edit_rows import edit_rows
from hf_unlearn.evaluation.own_rows import RowsEvaluation, run_rows
from hf_unlearn.evaluation.record import Evaluation
from hf_unlearn.evaluation.tofu_files import TofuEvaluation
from hf_unlearn.lab.models import tiny_config, tiny_model
from hf_unlearn.lab.tokenizer import train_tokenizer
from hf_unlearn.metrics.memorization import exact_memorization, extraction_strength
from hf_unlearn.metrics.runner import evaluate_part
from hf_unlearn.metrics.scores import TofuScores

NAMES = ("Ines", "Paul", "Rosa", "Emil", "Ada")


def row(number: int, **further: Any) -> dict[str, Any]:
    name = NAMES[number % 5]
    return {
        "question": f"Who keeps boat {number}?",
        "answer": f"{name} keeps boat {number}{' with care' * (number % 3)}.",
        "index": f"b{number}",
        **further,
    }


def tofu_row(number: int) -> dict[str, Any]:
    name = NAMES[number % 5]
    wrong = [f"By {other} it is kept." for other in NAMES if other != name][: 2 + number % 2]
    return row(
        number,
        paraphrased_question=f"Boat {number} is kept by whom?",
        paraphrased_answer=f"By {name} it is kept.",
        perturbed_answer=wrong,
    )


PARTS: OwnRows = {
    "forget": [tofu_row(number) for number in range(5)],
    "retain": [tofu_row(number) for number in range(5, 11)],
    "neighbours": [row(number) for number in range(11, 15)],
}
HOLDOUT = [row(number) for number in range(15, 20)]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    texts = [text for rows in (*PARTS.values(), HOLDOUT) for one in rows for text in (one["question"], one["answer"])]
    return train_tokenizer([*texts, *(one["paraphrased_answer"] for one in PARTS["forget"])] * 2, 420)


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    """A model that has learned the forget rows and some of the others."""
    model = tiny_model(tiny_config(tokenizer, hidden_size=32, num_layers=2, num_heads=2))
    rows = [{key: one[key] for key in ("question", "answer")} for one in [*PARTS["forget"], *PARTS["retain"][:3]]]
    batch = pad_rows(edit_rows(rows, tokenizer, name="forget", max_length=64), pad_token_id=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(40):
        loss = model(**{key: batch[key] for key in ("input_ids", "attention_mask", "labels")}).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def found(model: Any, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[RowsEvaluation, Path]:
    folder = tmp_path_factory.mktemp("rows")
    options: dict[str, Any] = {"model_name": "tiny", "max_new_tokens": 12, "batch_size": 3}
    return run_rows(model, tokenizer, PARTS, holdout=HOLDOUT, output_dir=folder, **options), folder


def test_each_part_has_the_plain_functions_numbers(
    model: Any, tokenizer: Any, found: tuple[RowsEvaluation, Path]
) -> None:
    result, folder = found
    metrics = result.evaluation.metrics
    for name, rows in PARTS.items():
        plain = evaluate_part(model, tokenizer, rows, max_new_tokens=12)
        assert plain.rouge is not None
        assert metrics[f"{name}_probability"].value == pytest.approx(plain.probability.mean(), abs=1e-5)
        assert metrics[f"{name}_probability"].n == len(rows)
        assert metrics[f"{name}_rouge"].value == pytest.approx(plain.rouge.mean(), abs=1e-9)
        assert result.parts[name].generations == plain.generations
        if name != "neighbours":
            ratio = plain.truth_ratio
            assert ratio is not None
            wanted = np.minimum(ratio, 1 / ratio) if name == "forget" else np.maximum(0, 1 - ratio)
            assert metrics[f"{name}_truth_ratio"].value == pytest.approx(wanted.mean(), abs=1e-5)
    assert metrics["forget_probability"].value > 0.5, "the model has learned nothing that could be measured"
    assert "neighbours_truth_ratio" not in metrics
    assert "no `perturbed_answer`" in result.evaluation.absent["neighbours_truth_ratio"]
    assert "neighbours" in result.evaluation.absent["model_utility"]
    assert not [name for name in (*metrics, *result.evaluation.absent) if "world_facts" in name or "_plain_" in name]
    assert Evaluation.load(folder) == result.evaluation


@torch.no_grad()
def test_memorisation_of_single_rows_is_a_loop_over_tokens(
    model: Any, tokenizer: Any, found: tuple[RowsEvaluation, Path]
) -> None:
    result, folder = found
    lines = [json.loads(line) for line in (folder / result.evaluation.rows["rows"]).read_text("utf-8").splitlines()]
    assert [(line["part"], line["index"]) for line in lines] == [
        (name, one["index"]) for name, rows in PARTS.items() for one in rows
    ]
    generations = result.parts["forget"].generations
    assert generations is not None
    for line, one, generation in zip(lines, PARTS["forget"], generations, strict=False):
        given = [{key: one[key] for key in ("question", "answer")}]
        (encoded,) = edit_rows(given, tokenizer, name="forget", max_length=64)
        logits = model(torch.tensor([encoded["input_ids"]])).logits[0]
        pairs = [
            (int(logits[at - 1].argmax()), label) for at, label in enumerate(encoded["labels"]) if label != -100 and at
        ]
        predicted, wanted = zip(*pairs, strict=True)
        assert line["exact_memorization"] == exact_memorization(predicted, wanted)
        assert line["extraction_strength"] == extraction_strength(predicted, wanted)
        assert line["generation"] == generation
    assert result.evaluation.metrics["forget_exact_memorization"].value == pytest.approx(
        np.mean([line["exact_memorization"] for line in lines[:5]])
    )


def test_the_folder_is_a_reference_for_the_same_rows_and_refused_for_others(
    model: Any, tokenizer: Any, found: tuple[RowsEvaluation, Path]
) -> None:
    result, folder = found
    again = run_rows(model, tokenizer, PARTS, holdout=HOLDOUT, reference=folder, generate=False).evaluation
    assert again.metrics["forget_quality"].value == 1.0, "a model cannot be told from itself"
    assert again.metrics["privleak"].value == 0.0
    assert "no answers were generated" in again.absent["forget_rouge"]
    assert "scores of a retain-only model" in result.evaluation.absent["forget_quality"]
    assert TofuEvaluation.load(folder).evaluation == result.evaluation
    with pytest.raises(ValueError, match="different forget rows"):
        run_rows(model, tokenizer, {**PARTS, "forget": PARTS["forget"][:-1]}, reference=folder)


def test_without_a_retain_part_each_part_has_its_means_and_no_comparison(
    tmp_path: Path, model: Any, tokenizer: Any
) -> None:
    file = tmp_path / "own.jsonl"
    file.write_text("\n".join(json.dumps(one) for one in PARTS["forget"]), encoding="utf-8")
    result = run_rows(model, tokenizer, load_own_rows(file), max_new_tokens=4, output_dir=tmp_path / "out")
    assert result.tofu is None
    assert {name for name in result.evaluation.metrics if not name.startswith("forget_")} == set()
    assert {"forget_probability", "forget_truth_ratio", "forget_extraction_strength", "forget_nll"} <= set(
        result.evaluation.metrics
    )
    assert "no retain part" in result.evaluation.absent["forget_quality"]
    assert not (tmp_path / "out" / "scores.json").exists()
    with pytest.raises(ValueError, match="reference is given, but the rows have no retain part"):
        run_rows(
            model,
            tokenizer,
            load_own_rows(file),
            reference=TofuScores(parts={**result.parts, "retain": result.parts["forget"]}),
        )
    alone = run_rows(model, tokenizer, {"harbour": PARTS["neighbours"]}, generate=False).evaluation
    assert set(alone.metrics) == {"harbour_probability"}
    assert "no forget part" in alone.absent["forget_quality"]


def test_utility_of_own_parts_needs_one_beside_retain(model: Any, tokenizer: Any) -> None:
    two = {name: PARTS[name] for name in ("forget", "retain")}
    found = run_rows(model, tokenizer, two, max_new_tokens=4).evaluation
    assert "no further part" in found.absent["model_utility"]
    three = run_rows(model, tokenizer, {**two, "others": PARTS["retain"][:3]}, max_new_tokens=4).evaluation
    if "model_utility" in three.metrics:
        names = [
            f"{part}_{score}" for part in ("retain", "others") for score in ("probability", "rouge", "truth_ratio")
        ]
        values = [three.metrics[name].value for name in names]
        wanted = 0.0 if min(values) == 0 else 6 / sum(1 / value for value in values)
        assert three.metrics["model_utility"].value == pytest.approx(wanted)
    else:
        pytest.fail(three.absent["model_utility"])


def test_a_limit_keeps_the_indices_of_the_chosen_rows(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    result = run_rows(model, tokenizer, PARTS, limit=2, generate=False, output_dir=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text("utf-8").splitlines()]
    assert [line["index"] for line in lines] == ["b0", "b2", "b5", "b8", "b11", "b13"]
    assert result.evaluation.metrics["retain_probability"].n == 2


def test_bad_input_is_refused_before_anything_is_computed(model: Any, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="no parts to evaluate"):
        run_rows(model, tokenizer, {})
    twice = {**PARTS, "forget": [PARTS["forget"][0], PARTS["forget"][0]]}
    with pytest.raises(ValueError, match=r"The forget part: Rows 0 and 1 both have index 'b0'"):
        run_rows(model, tokenizer, twice)
    model.forward, forward = lambda *a, **k: pytest.fail("computed before the input was checked"), model.forward
    try:
        with pytest.raises(ValueError, match="max_new_tokens is 0"):
            run_rows(model, tokenizer, PARTS, max_new_tokens=0)
        with pytest.raises(ValueError, match=r"A part is named 'holdout'.*holdout_dataset"):
            run_rows(model, tokenizer, {**PARTS, "holdout": HOLDOUT})
        positions = model.config.max_position_embeddings
        long = [{"question": "?", "answer": "a boat " * positions}]
        with pytest.raises(ValueError, match=f"has {positions} positions"):
            run_rows(model, tokenizer, PARTS, holdout=long, generate=False, max_length=9 * positions)
    finally:
        model.forward = forward


def test_the_record_names_the_model_and_how_it_was_scored(found: tuple[RowsEvaluation, Path], model: Any) -> None:
    settings = found[0].evaluation.settings
    assert {"device", "stop_token_ids", "resamples", "seed", "template_digest"} <= set(settings)
    assert found[0].evaluation.model == "tiny"


def test_without_a_name_the_record_has_that_of_the_config_or_the_class(model: Any, tokenizer: Any) -> None:
    assert run_rows(model, tokenizer, {"harbour": PARTS["neighbours"]}, generate=False).evaluation.model == (
        model.config._name_or_path or "LlamaForCausalLM"
    )
