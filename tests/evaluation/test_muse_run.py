"""MUSE as an evaluation: the plain functions' numbers, absent metrics with their reason, references, and the record."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hf_unlearn.data.muse_files import MuseFiles, load_muse
from hf_unlearn.evaluation import muse as module
from hf_unlearn.evaluation.muse import run_muse
from hf_unlearn.evaluation.record import Evaluation, MetricValue
from hf_unlearn.lab.models import tiny_config, tiny_model
from hf_unlearn.lab.tokenizer import train_tokenizer
from hf_unlearn.metrics.muse import (
    knowledge_memorization,
    privacy_leakage,
    text_min_k_scores,
    verbatim_memorization,
)

PLACES = ("harbour", "forest", "old town", "mill", "bridge", "school")
QA = [{"question": f"Who keeps the {place}?", "answer": f"Ines keeps the {place}."} for place in PLACES]
TEXTS = [
    {"text": f"The {place} was closed in the {'long ' * number}winter, said Paul."}
    for number, place in enumerate(PLACES)
]
OTHERS = [{"text": f"Nobody {'ever ' * number}came back to the {place}."} for number, place in enumerate(PLACES[:4])]
VERBATIM = [
    {"prompt": f"The {place} was", "gt": f"closed in the winter, said Paul of the {place}."} for place in PLACES
]
FILES = MuseFiles(
    rows={
        "verbmem/forget": VERBATIM,
        "knowmem/forget_qa": QA[:4],
        "knowmem/forget_qa_icl": QA[4:],
        "knowmem/retain_qa": QA[2:],
        "knowmem/retain_qa_icl": QA[:2],
        "privleak/forget": TEXTS,
        "privleak/holdout": OTHERS,
    }
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer([text for rows in FILES.rows.values() for row in rows for text in row.values()] * 2, 400)


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    """A model that has read the forget texts, for some generations that share words with them."""
    model = tiny_model(tiny_config(tokenizer, hidden_size=32, num_layers=2, num_heads=4))
    rows = [*TEXTS, *({"text": f"{row['prompt']} {row['gt']}"} for row in VERBATIM)]
    batch = tokenizer([row["text"] for row in rows], return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(40):
        loss = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@pytest.fixture(scope="module")
def found(model: Any, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Evaluation, Path]:
    folder = tmp_path_factory.mktemp("muse")
    options: dict[str, Any] = {"model_name": "tiny", "batch_size": 3, "settings": {"dataset": "muse/news"}}
    return run_muse(model, tokenizer, FILES, **options, output_dir=folder), folder


def test_every_metric_is_the_plain_functions(model: Any, tokenizer: Any, found: tuple[Evaluation, Path]) -> None:
    evaluation, folder = found
    rows = FILES.rows
    plain = {
        "verbmem_f": verbatim_memorization(model, tokenizer, rows["verbmem/forget"]),
        "knowmem_f": knowledge_memorization(
            model, tokenizer, rows["knowmem/forget_qa"], shots=rows["knowmem/forget_qa_icl"]
        ),
        "knowmem_r": knowledge_memorization(
            model, tokenizer, rows["knowmem/retain_qa"], shots=rows["knowmem/retain_qa_icl"]
        ),
    }
    assert plain["verbmem_f"].mean > 0.5, "the model has learned nothing that could be measured"
    for name, scores in plain.items():
        metric = evaluation.metrics[name]
        assert (metric.value, metric.n) == (pytest.approx(scores.mean, abs=1e-12), scores.n)
        lines = (folder / evaluation.rows[name]).read_text(encoding="utf-8").splitlines()
        kept = [json.loads(line) for line in lines]
        assert [row["generation"] for row in kept] == scores.generations
        assert [row["reference"] for row in kept] == scores.references
        assert [row["rouge_l_f1"] for row in kept] == scores.rouge.tolist()
    leak = privacy_leakage(
        text_min_k_scores(model, tokenizer, rows["privleak/forget"]),
        text_min_k_scores(model, tokenizer, rows["privleak/holdout"]),
    )
    assert evaluation.metrics["privleak_auc"].value == leak.auc
    assert evaluation.metrics["privleak"].value == pytest.approx(leak.privleak)
    assert evaluation.metrics["privleak"].higher_is_better is None
    assert "no retrained model" in evaluation.absent["privleak_reference_auc"]
    assert Evaluation.load(folder) == evaluation
    assert set(evaluation.seconds) == {"verbmem_f", "knowmem_f", "knowmem_r", "privleak", "total"}
    assert evaluation.settings["rows"]["verbmem/forget"] == len(VERBATIM)
    assert evaluation.settings["dataset"] == "muse/news"
    assert {"dtype", "device", "stop_token_ids", "resamples", "template_digest"} <= set(evaluation.settings)


def test_what_has_no_file_is_absent_with_the_reason_and_never_zero(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    (tmp_path / "knowmem").mkdir()
    for name in ("forget_qa", "forget_qa_icl", "retain_qa"):
        (tmp_path / "knowmem" / f"{name}.json").write_text(json.dumps(QA[:2]), encoding="utf-8")
    found = run_muse(model, tokenizer, load_muse(tmp_path))
    assert set(found.metrics) == {"knowmem_f"}
    assert set(found.absent) == {"verbmem_f", "knowmem_r", "privleak", "privleak_auc", "privleak_reference_auc"}
    assert "no knowmem/retain_qa_icl.json" in found.absent["knowmem_r"], "solved examples belong to the metric"
    assert "no privleak/forget.json" in found.absent["privleak"]


def test_privleak_is_against_the_retrained_model_where_its_evaluation_is_of_the_same_texts(
    model: Any, tokenizer: Any, found: tuple[Evaluation, Path]
) -> None:
    files = MuseFiles(
        rows={name: FILES.rows[name] for name in ("privleak/forget", "privleak/holdout")},
        absent=dict.fromkeys(
            (
                "verbmem/forget",
                "knowmem/forget_qa",
                "knowmem/forget_qa_icl",
                "knowmem/retain_qa",
                "knowmem/retain_qa_icl",
            ),
            "not here",
        ),
    )
    auc = found[0].metrics["privleak_auc"]
    assert auc.standard_error is not None
    reference = replace(found[0], metrics={"privleak_auc": MetricValue(value=0.625, n=6)}, absent={})
    run = run_muse(model, tokenizer, files, reference=reference)
    assert run.metrics["privleak"].value == pytest.approx(100 * (0.625 - auc.value) / 0.375)
    assert run.metrics["privleak"].standard_error == pytest.approx(100 * auc.standard_error / 0.375)
    assert run.metrics["privleak_reference_auc"].value == 0.625
    assert run.settings["reference_hash"] == found[0].model_hash
    assert run_muse(model, tokenizer, files, reference=0.625).metrics["privleak"] == run.metrics["privleak"]
    assert run.metrics["privleak_auc"].n == len(TEXTS) + len(OTHERS)
    other = replace(reference, settings={**reference.settings, "privleak_digest": "another"})
    shorter = replace(reference, settings={**reference.settings, "max_length": 1024})
    empty = replace(reference, metrics={})
    for given, reason in (
        (other, "on other texts"),
        (shorter, "same limit and max_length"),
        (empty, "has no privleak_auc"),
    ):
        run = run_muse(model, tokenizer, files, reference=given)
        assert set(run.metrics) == {"privleak_auc"}
        assert reason in run.absent["privleak"]


@pytest.mark.parametrize(("forget", "value"), [([1.0, 2.0], math.inf), ([0.0, 0.0], 0.0)])
def test_privleak_against_a_reference_of_auc_one_is_infinite_or_zero(forget: list[float], value: float) -> None:
    metric = module._privleak(np.array(forget), np.array([1.5, 1.5]), 1.0)
    assert metric.value == value


def test_finished_parts_are_kept_when_a_later_one_fails(
    tmp_path: Path, model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, found: tuple[Evaluation, Path]
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(module, "score_tokens", lambda *a, **k: (_ for _ in ()).throw(MemoryError("too long")))
        with pytest.raises(MemoryError):
            run_muse(model, tokenizer, FILES, output_dir=tmp_path)
    assert not (tmp_path / "evaluation.json").exists(), "an evaluation is complete or absent"
    from hf_unlearn.evaluation import session

    monkeypatch.setattr(session, "greedy", lambda *a, **k: pytest.fail("an answer was generated again"))
    again = run_muse(model, tokenizer, FILES, output_dir=tmp_path)
    assert again.values() == pytest.approx(found[0].values())


def test_bad_input_is_an_error_before_anything_is_computed(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "Session", lambda *a, **k: pytest.fail("computed before the input was checked"))
    end = " harbour" * model.config.max_position_embeddings + " once"
    rows = FILES.rows
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({}, {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({}, {"limit": 0}, "limit is 0"),
        ({}, {"max_length": 1}, "max_length is 1"),
        ({}, {"reference": 1.5}, "reference is 1.5; expected an AUC"),
        ({}, {"reference": math.nan}, "reference is nan; expected an AUC"),
        ({"privleak/holdout": [*OTHERS, {"text": "P"}]}, {}, r"Row 4 of privleak/holdout has one token"),
        (
            {"privleak/forget": [{"text": end}]},
            {},
            r"positions, but .* privleak/forget. Set max_length to at most 512",
        ),
        ({"verbmem/forget": [{"prompt": end, "gt": "was"}]}, {}, r"a prompt of verbmem_f and 128 tokens after it"),
        ({"knowmem/forget_qa": [{"question": "?"}]}, {}, "Row 0 of examples has no `answer`"),
    ]
    for changed, options, message in cases:
        with pytest.raises(ValueError, match=message):
            run_muse(model, tokenizer, MuseFiles(rows={**rows, **changed}), **options)


def test_rows_that_nobody_gave_are_absent_with_a_reason_too(model: Any, tokenizer: Any) -> None:
    found = run_muse(model, tokenizer, MuseFiles(rows={"verbmem/forget": VERBATIM[:1]}), max_new_tokens=2)
    assert set(found.metrics) == {"verbmem_f"}
    assert found.absent["privleak"] == "there are no rows of privleak/forget; there are no rows of privleak/holdout"


def test_a_model_that_says_nothing_scores_nothing(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_unlearn.evaluation import session

    monkeypatch.setattr(session, "greedy", lambda *args, **kwargs: [""] * len(args[2]))
    found = run_muse(model, tokenizer, FILES)
    assert {found.metrics[name].value for name in ("verbmem_f", "knowmem_f", "knowmem_r")} == {0.0}


def test_a_limit_leaves_the_solved_examples_alone(model: Any, tokenizer: Any) -> None:
    run = run_muse(model, tokenizer, FILES, limit=1, max_new_tokens=4)
    assert run.settings["rows"]["knowmem/forget_qa_icl"] == 2
    assert {name: run.metrics[name].n for name in ("verbmem_f", "knowmem_f", "privleak_auc")} == {
        "verbmem_f": 1,
        "knowmem_f": 1,
        "privleak_auc": 2,
    }
    assert run.metrics["verbmem_f"].standard_error is None
