"""Published TOFU evaluation logs (Llama-2-7B) reproduce the benchmark authors' numbers."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hf_unlearn.metrics import functional as f

FOLDER = Path(__file__).resolve().parents[3] / "shared" / "data" / "tofu_eval_logs"
MODELS = ("full", "retain90", "retain95", "retain99")
FILES = {
    "retain": "eval_log.json",
    "real_authors": "eval_real_author_wo_options.json",
    "world_facts": "eval_real_world_wo_options.json",
    "forget": "eval_log_forget.json",
}
UTILITY_SPLITS = ("retain", "real_authors", "world_facts")

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"the published logs are not at {FOLDER}")


@lru_cache
def whole_log(model: str) -> dict[str, dict[str, dict[str, Any]]]:
    """File to table to row number to value."""
    return json.loads((FOLDER / f"llama2-7b_{model}.json").read_text(encoding="utf-8"))


@lru_cache
def log(model: str, split: str) -> dict[str, list[Any]]:
    tables = whole_log(model)[FILES[split]]
    rows = list(tables["avg_gt_loss"])
    assert all(list(table) == rows for table in tables.values()), "a table has other rows than the losses"
    return {name: [table[row] for row in rows] for name, table in tables.items()}


def ratios(model: str, split: str = "forget") -> np.ndarray:
    rows = log(model, split)
    return f.truth_ratio(rows["avg_paraphrased_loss"], rows["average_perturb_loss"])


def parts(model: str, split: str) -> dict[str, float]:
    """ROUGE, probability and truth ratio of one split."""
    rows = log(model, split)
    if split in ("real_authors", "world_facts"):
        probability = f.normalised_probability(rows["avg_gt_loss"], rows["average_perturb_loss"])
    else:
        probability = f.probability(rows["avg_gt_loss"])
    aggregate = f.forget_truth_ratio if split == "forget" else f.retain_truth_ratio
    return {
        "rouge": float(np.mean(rows["rougeL_recall"])),
        "probability": float(probability.mean()),
        "truth_ratio": aggregate(ratios(model, split)),
    }


@pytest.mark.parametrize(
    ("split", "rouge", "probability", "truth_ratio"),
    [
        ("real_authors", 0.9330, 0.4555, 0.5962),
        ("world_facts", 0.8825, 0.4186, 0.5390),
        ("retain", 0.9857, 0.9895, 0.4747),
        ("forget", 0.9854, 0.9909, 0.5160),
    ],
)
def test_parts_of_the_full_model(split: str, rouge: float, probability: float, truth_ratio: float) -> None:
    expected = {"rouge": rouge, "probability": probability, "truth_ratio": truth_ratio}
    assert parts("full", split) == pytest.approx(expected, abs=5.1e-5)


@pytest.mark.parametrize(
    ("model", "utility"), [("full", 0.6227), ("retain90", 0.6137), ("retain95", 0.6006), ("retain99", 0.6207)]
)
def test_model_utility_of_every_model(model: str, utility: float) -> None:
    named = {f"{split}_{k}": v for split in UTILITY_SPLITS for k, v in parts(model, split).items()}
    assert len(named) == 9
    assert f.model_utility(named) == pytest.approx(utility, abs=5.1e-5)


# The full model's log covers 300 rows of forget10. The logs of retain95 and retain99 cover forget05 and forget01, which
# are other questions, so their two values check the arithmetic and compare no like with like.
@pytest.mark.parametrize(
    ("reference", "p_value"), [("retain90", 1.834e-21), ("retain95", 6.504e-16), ("retain99", 2.345e-06)]
)
def test_forget_quality_of_the_full_model(reference: str, p_value: float) -> None:
    assert f.forget_quality(ratios("full"), ratios(reference)) == pytest.approx(p_value, rel=3e-4)
    assert f.forget_quality_log10(ratios("full"), ratios(reference)) == pytest.approx(np.log10(p_value), abs=1.3e-4)


def test_forget_logs_of_full_and_retain90_are_of_the_same_questions() -> None:
    questions = {m: [row[0] for row in log(m, "forget")["generated_text"]] for m in MODELS}
    assert questions["full"] == questions["retain90"]
    assert questions["full"][: len(questions["retain95"])] != questions["retain95"]


# TOFU takes the plain answer where there is no paraphrase. The logs scored it twice, in half precision and in batches of
# another padding: most rows agree to the last digit, and the aggregate moves in the fourth.
@pytest.mark.parametrize("split", ["real_authors", "world_facts"])
@pytest.mark.parametrize("model", MODELS)
def test_the_plain_answer_stands_in_for_the_paraphrase_of_general_knowledge(model: str, split: str) -> None:
    rows = log(model, split)
    apart = np.abs(np.subtract(rows["avg_paraphrased_loss"], rows["avg_gt_loss"]))
    assert np.median(apart) == 0.0
    assert apart.max() < 0.125
    plain = f.truth_ratio(rows["avg_gt_loss"], rows["average_perturb_loss"])
    assert f.retain_truth_ratio(plain) == pytest.approx(parts(model, split)["truth_ratio"], abs=1e-3)


# No row differs, so there is no difference to explain: 2,908 rows of 16 logs, to the last bit of what JSON holds.
@pytest.mark.parametrize("split", list(FILES))
@pytest.mark.parametrize("model", MODELS)
def test_rouge_recomputed_from_the_generations_equals_every_row(model: str, split: str) -> None:
    rows = log(model, split)
    _, generated, references = zip(*rows["generated_text"], strict=True)
    recall = f.rouge_l_recall(list(generated), list(references))
    differing = np.flatnonzero(np.abs(recall - rows["rougeL_recall"]) > 1e-12)
    assert differing.tolist() == []


def test_the_logs_have_the_rows_that_the_published_numbers_are_of() -> None:
    counted = {(model, split): len(log(model, split)["avg_gt_loss"]) for model in MODELS for split in FILES}
    assert sum(counted.values()) == 2908
    assert [counted[model, "forget"] for model in MODELS] == [300, 300, 200, 40]
    assert {counted[model, "retain"] for model in MODELS} == {300}
    assert {counted[model, "real_authors"] for model in MODELS} == {100}
    assert {counted[model, "world_facts"] for model in MODELS} == {117}
