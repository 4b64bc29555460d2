"""TOFU on a model: what is refused before anything is computed, what is warned about, and what a failure leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tofu_kit import build, parts, run, tokenizer

from hf_unlearn.data import tokenize_example
from hf_unlearn.evaluation import session as session_module
from hf_unlearn.evaluation.tofu_files import TofuEvaluation, load_reference


def test_a_reference_of_other_forget_rows_is_an_error_before_anything_is_computed(
    untouched: Any, reference: TofuEvaluation, reference_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="different forget rows"):
        run(untouched, forget=parts()["forget"][::-1], reference=reference_folder)
    with pytest.raises(ValueError, match="different forget rows"):
        run(untouched, forget=parts()["forget"][:5], reference=reference)
    with pytest.raises(FileNotFoundError, match=r"no scores\.json"):
        run(untouched, reference=tmp_path)
    with pytest.raises(TypeError, match="reference is a int"):
        run(untouched, reference=3)


def test_files_that_are_something_else_are_named(tmp_path: Path, compared_folder: Path) -> None:
    for name in ("scores.json", "details.json", "evaluation.json"):
        (tmp_path / name).write_bytes((compared_folder / name).read_bytes())
    assert load_reference(tmp_path / "scores.json").details is not None
    (tmp_path / "details.json").write_text("{}")
    with pytest.raises(ValueError, match=r"details\.json holds no details"):
        load_reference(tmp_path)
    (tmp_path / "details.json").write_text("{")
    with pytest.raises(ValueError, match=r"details\.json is not JSON"):
        load_reference(tmp_path)


def test_rows_and_limits_are_checked_before_anything_is_computed(untouched: Any) -> None:
    indexed = [{**row, "index": number} for number, row in enumerate(parts()["forget"])]
    twice = [*indexed[:5], {**indexed[5], "index": 2}]
    for changes, message in (
        ({"forget": twice}, "forget part: Rows 2 and 5 both have index 2"),
        ({"holdout": twice}, "holdout rows: Rows 2 and 5 both have index 2"),
        ({"holdout": []}, "holdout rows: There are no rows"),
        ({"retain": [{"question": "?"}]}, "retain part: Row 0 has no `answer`"),
        ({"general": {"holdout": parts()["retain"]}}, "general has a part named 'holdout'"),
        (
            {"holdout": [*parts()["holdout"], parts()["forget"][2]]},
            r"1 of the 9 holdout rows \(first 8\) are rows of the f",
        ),
        ({"holdout": parts()["retain"][:2]}, r"2 of the 2 holdout rows \(first 0\) are rows of the retain part"),
        ({"limits": {"nothing": 3}}, r"limits names \['nothing'\]"),
        ({"limits": {"holdout": 3}}, "there are no holdout rows"),
        ({"limits": 0}, "limit is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"resamples": 1}, "resamples is 1 and seed 0; expected at least 2"),
        ({"seed": -1}, "seed -1"),
        ({"max_new_tokens": 250}, "do not fit into the 256 positions"),
        ({"holdout": [{"question": "?", "answer": "a b c " * 100}]}, "but LlamaForCausalLM has 256 positions"),
    ):
        with pytest.raises(ValueError, match=message):
            run(untouched, **changes)
    for holdout, message in (
        ({"question": ["?"]}, "holdout is a dict; expected a Dataset or a list of rows"),
        (iter([]), "holdout is a list_iterator"),
        (["text"], "Holdout row 0 is 'text'"),
    ):
        with pytest.raises(TypeError, match=message):
            run(untouched, holdout=holdout)


def longest_text() -> int:
    """Tokens of the longest paraphrase with its question."""
    given = [{"question": row["question"], "answer": row["paraphrased_answer"]} for row in parts()["forget"]]
    return max(len(tokenize_example(row, tokenizer())["labels"]) for row in given)


def test_texts_that_are_cut_say_so(untouched: Any) -> None:
    with pytest.raises(ValueError, match="is left within max_length=5"):
        run(untouched, max_length=5)
    longest = longest_text()
    with pytest.warns(UserWarning, match=f"is cut to max_length={longest - 3}"):
        run(max_length=longest - 3, generate=False)


def test_sharded_weights_are_scored_without_answers() -> None:
    model = build()
    model.model.norm.weight.ds_id = 0  # what ZeRO-3 marks a part of a weight with
    with pytest.raises(ValueError, match="generate=True needs whole weights"):
        run(model)
    found = run(model, generate=False, holdout=parts()["holdout"]).evaluation
    assert found.model_hash is None
    assert "sharded" in found.absent["model_hash"]
    assert "sharded" in found.absent["forget_exact_memorization"]
    assert "sharded" in found.absent["mia_loss_auc"]
    assert "forget_truth_ratio" in found.metrics


def test_finished_parts_are_kept_when_a_later_part_fails(tmp_path: Path, monkeypatch: Any) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(session_module, "greedy", lambda *args, **kwargs: [].pop())
        with pytest.raises(IndexError):
            run(output_dir=tmp_path, holdout=parts()["holdout"])
    assert not (tmp_path / "evaluation.json").exists(), "it is written last"
    for name in ("mean_nll", "score_tokens"):
        monkeypatch.setattr(session_module, name, lambda *args, **kwargs: pytest.fail("scored again"))
    found = run(output_dir=tmp_path, holdout=parts()["holdout"])
    assert TofuEvaluation.load(tmp_path).evaluation.values() == found.evaluation.values()


def test_a_reference_in_another_template_or_cut_elsewhere_is_warned_about_and_on_record(
    reference_folder: Path, tmp_path: Path, monkeypatch: Any, recwarn: Any
) -> None:
    same = run(generate=False, reference=reference_folder)
    assert same.evaluation.settings["reference_differs"] == []
    assert not [one for one in recwarn if "The reference" in str(one.message)]
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer(), "chat_template", template)
        with pytest.warns(UserWarning, match="another tokenizer or chat template"):
            found = run(generate=False, reference=reference_folder)
    assert found.evaluation.settings["reference_differs"] == ["template_digest"]
    assert "forget_quality" in found.evaluation.metrics, "models may have been trained on different templates"
    with pytest.warns(UserWarning, match="scored with max_length=1024"):
        cut = run(generate=False, reference=reference_folder, max_length=longest_text() - 3)
    assert cut.evaluation.settings["reference_differs"] == ["max_length"]
    (tmp_path / "logs.json").write_bytes((reference_folder / "scores.json").read_bytes())
    alone = run(generate=False, reference=tmp_path / "logs.json", max_length=100)
    assert alone.evaluation.settings["reference_differs"] == [], "nothing was cut, and nothing else is known"
