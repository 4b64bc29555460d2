"""Published TOFU logs (Llama-2-7B) through the evaluation's metrics: the benchmark authors' numbers, with errors."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hf_unlearn.evaluation.tofu_files import TofuReference
from hf_unlearn.evaluation.tofu_metrics import tofu_metrics
from hf_unlearn.metrics import functional as f
from hf_unlearn.metrics.scores import PartScores, TofuScores

FOLDER = Path(__file__).resolve().parents[3] / "shared" / "data" / "tofu_eval_logs"
FILES = {
    "forget": "eval_log_forget.json",
    "retain": "eval_log.json",
    "real_authors": "eval_real_author_wo_options.json",
    "world_facts": "eval_real_world_wo_options.json",
}

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"the published logs are not at {FOLDER}")


def scores(model: str) -> TofuScores:
    """The log of one of their models."""
    log = json.loads((FOLDER / f"llama2-7b_{model}.json").read_text(encoding="utf-8"))
    parts = {}
    for name, file in FILES.items():
        tables: dict[str, dict[str, Any]] = log[file]
        rows = {table: [values[row] for row in tables["avg_gt_loss"]] for table, values in tables.items()}
        nll, wrong = np.array(rows["avg_gt_loss"]), rows["average_perturb_loss"]
        general = name in ("real_authors", "world_facts")
        parts[name] = PartScores(
            nll=nll,
            probability=f.normalised_probability(nll, wrong) if general else f.probability(nll),
            log_truth_ratio=f.log_truth_ratio(rows["avg_paraphrased_loss"], wrong),
            paraphrased_nll=np.array(rows["avg_paraphrased_loss"]),
            rouge=np.array(rows["rougeL_recall"]),
            generations=[row[1] for row in rows["generated_text"]],
        )
    return TofuScores(parts=parts)


def test_the_full_model_against_retain90() -> None:
    found, absent = tofu_metrics(scores("full"), None, TofuReference(scores=scores("retain90")), resamples=200)
    expected = {
        "real_authors_rouge": 0.9330,
        "real_authors_probability": 0.4555,
        "real_authors_truth_ratio": 0.5962,
        "world_facts_rouge": 0.8825,
        "world_facts_probability": 0.4186,
        "world_facts_truth_ratio": 0.5390,
        "retain_rouge": 0.9857,
        "retain_probability": 0.9895,
        "retain_truth_ratio": 0.4747,
        "forget_rouge": 0.9854,
        "forget_probability": 0.9909,
        "forget_truth_ratio": 0.5160,
        "model_utility": 0.6227,
    }
    for name, value in expected.items():
        assert found[name].value == pytest.approx(value, abs=5.1e-5), name
        error = found[name].standard_error
        assert error is not None
        assert 0 < error < 0.05, name
    assert found["forget_quality"].value == pytest.approx(1.834e-21, rel=3e-4)
    assert found["forget_quality_log10"].value == pytest.approx(math.log10(1.834e-21), abs=1.3e-4)
    assert found["forget_fluency"].value > 0.97, "a fine-tuned Llama writes sentences"
    low, high = found["model_utility"].low, found["model_utility"].high
    assert low is not None
    assert high is not None
    assert low < 0.6137 < high, "the utility of retain90 is within the error of that of the full model"
    assert "privacy_score" in absent
    assert "memorization_score" in absent
