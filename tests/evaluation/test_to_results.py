"""From evaluations to the results of a report: what goes where, and what a run's folder adds."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tofu_kit import ANSWER, build, parts, tokenizer

from hf_unlearn.evaluation import to_results as module
from hf_unlearn.evaluation.to_results import results_of
from hf_unlearn.evaluation.tofu import run_tofu
from hf_unlearn.evaluation.tofu_files import TofuEvaluation
from hf_unlearn.evaluation.training_run import read_training_run
from hf_unlearn.reports import markdown_table, read_results, write_report, write_results
from hf_unlearn.reports.outcomes import AttackOutcome, Measure
from hf_unlearn.reports.verdict import judge

HISTORY = [{"step": 5, "loss": 1.5, "dual/retain": 0.3}, {"step": 10, "train_runtime": 12.5}]
FEASIBILITY = [
    {"name": "retain", "eps": 0.2, "loss": 0.1, "multiplier": 0.3, "feasible": True},
    {"name": "unmeasured", "eps": 0.2, "loss": None, "multiplier": 0.3, "feasible": None},
]


@pytest.fixture(scope="module")
def alone() -> TofuEvaluation:
    """The unlearned model, evaluated without a reference."""
    arguments: dict[str, Any] = {**parts(), "max_new_tokens": ANSWER, "resamples": 50}
    return run_tofu(build(2), tokenizer(), **arguments)


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    for name, history in (("checkpoint-9", []), ("checkpoint-10", HISTORY)):
        (folder / name).mkdir(parents=True)
        (folder / name / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    state = {"version": 1, "method": "primal-dual", "forget_level": 4.5, "feasibility": FEASIBILITY}
    (folder / "unlearning_state.json").write_text(json.dumps(state))
    return folder


def test_scores_and_errors_of_three_models_are_those_of_their_evaluations(
    compared: TofuEvaluation, reference: TofuEvaluation, alone: TofuEvaluation, tmp_path: Path
) -> None:
    results = results_of(alone, compared, reference)
    for scores, one in ((results.unlearned, alone), (results.target, compared), (results.reference, reference)):
        assert scores is not None
        for name in ("forget_probability", "forget_rouge", "retain_truth_ratio", "model_utility", "forget_nll"):
            assert scores.as_dict()[name] == one.evaluation.values()[name], name
            assert scores.standard_error[name] == one.evaluation.standard_errors()[name], name
        assert "forget_quality" not in scores.as_dict()
    assert results.truth_ratios["unlearned"] == pytest.approx(alone.scores.parts["forget"].truth_ratio)
    assert set(results.truth_ratios) == {"target", "unlearned", "reference"}
    assert results.seconds["total"] == pytest.approx(
        sum(one.evaluation.seconds["total"] for one in (compared, reference, alone))
    )
    assert set(results.extra["evaluations"]) == {"target", "unlearned", "reference"}
    assert results.extra["evaluations"]["target"]["model_hash"] == compared.evaluation.model_hash
    assert read_results(write_results(tmp_path / "results.json", results)).as_dict() == results.as_dict()
    assert "Model utility" in markdown_table(results)
    assert judge(results).headline
    write_report(tmp_path / "report.html", results)


def test_what_compares_with_the_reference_is_computed_where_it_was_not_yet(
    alone: TofuEvaluation, reference: TofuEvaluation
) -> None:
    assert "forget_quality" in alone.evaluation.absent
    results = results_of(alone, None, reference)
    assert results.forget_quality == alone.scores.forget_quality_against(reference.scores)
    again = run_tofu(
        build(2), tokenizer(), **parts(), reference=reference, max_new_tokens=ANSWER, resamples=50
    ).evaluation
    for name in ("privleak", "mia_auc", "privacy_score", "aggregate_score"):
        assert results.unlearned.as_dict()[name] == again.values()[name], name
        assert results.unlearned.standard_error[name] == again.standard_errors()[name], name
        assert name not in results.absent
    assert results.reference is not None
    assert results.reference.as_dict()["mia_auc"] == 0.5


def test_what_compares_is_of_the_reference_that_is_given_and_not_of_another_one(
    compared: TofuEvaluation, reference: TofuEvaluation, alone: TofuEvaluation
) -> None:
    assert compared.evaluation.values()["forget_quality"] == compared.scores.forget_quality_against(reference.scores)
    results = results_of(compared, None, alone)
    other = compared.scores.forget_quality_against(alone.scores)
    assert other != compared.evaluation.values()["forget_quality"]
    assert results.forget_quality == other
    assert results.unlearned.as_dict()["mia_auc"] == compared.scores.mia_auc_against(alone.scores)
    without = replace(alone, details=None)
    assert "membership scores" in results_of(compared, None, without).absent["privleak"], (
        "that of the other one is gone"
    )
    assert "privleak" not in results_of(compared, None, without).unlearned.as_dict()


def test_the_same_reference_is_not_compared_with_twice(
    compared: TofuEvaluation, reference_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = TofuEvaluation.load(reference_folder)
    calls: list[Any] = []

    def counted(scores: Any, *others: Any, **options: Any) -> Any:
        calls.append(scores)
        return {}, {}

    monkeypatch.setattr(module, "tofu_metrics", counted)
    results_of(compared, None, reference)
    assert calls == [reference.scores], "only the reference with itself"


def test_answers_stand_side_by_side(
    alone: TofuEvaluation, compared: TofuEvaluation, reference: TofuEvaluation
) -> None:
    shown = results_of(alone, compared, reference).generations
    assert [one.part for one in shown] == ["forget"] * 8 + ["retain"] * 7
    for number, one in enumerate(shown[:8]):
        row = parts()["forget"][number]
        assert (one.question, one.answer) == (row["question"], row["answer"])
        for text, model in ((one.target, compared), (one.unlearned, alone), (one.reference, reference)):
            answers = model.scores.parts["forget"].generations
            assert answers is not None
            assert text == answers[number]


def test_what_is_not_there_is_said_and_never_0(alone: TofuEvaluation) -> None:
    results = results_of(alone)
    assert math.isnan(results.target.forget_probability)
    assert results.reference is None
    assert results.forget_quality is None
    assert results.absent["target"] == "the model before unlearning was not evaluated"
    assert results.absent["reference"] == "no retain-only model was evaluated"
    assert results.absent["forget_quality"] == "no scores of a retain-only model were given"
    assert results.generations[0].target == ""
    assert results.generations[0].reference is None
    assert results.method == "unlearning"
    bare = run_tofu(build(2), tokenizer(), **{**parts(), "holdout": None}, generate=False, resamples=10)
    assert math.isnan(results_of(bare).unlearned.forget_rouge)
    assert results_of(bare).generations == ()


def test_a_run_brings_its_log_and_limits(alone: TofuEvaluation, run_folder: Path) -> None:
    results = results_of(alone, run_folder=run_folder, seed=3, dataset="world")
    assert [dict(entry) for entry in results.history] == HISTORY, "of the last checkpoint, 10 and not 9"
    assert [(row.name, row.multiplier, row.feasible) for row in results.constraints] == [("retain", 0.3, True)]
    assert (results.method, results.forget_level, results.seconds["unlearn"]) == ("primal-dual", 4.5, 12.5)
    assert (results.seed, results.dataset) == (3, "world")
    (run_folder / "trainer_state.json").write_text(json.dumps({"log_history": HISTORY[:1]}))
    assert read_training_run(run_folder).history == tuple(HISTORY[:1]), "its own file comes first"


def test_attacks_are_carried_along(alone: TofuEvaluation) -> None:
    outcome = AttackOutcome(
        attack="relearn", measures=(Measure(name="recovery", subject="unlearned", value=0.5, n=8),)
    )
    assert results_of(alone, attacks=[outcome]).extra["attacks"] == [outcome.as_dict()]


def test_folders_that_hold_something_else_are_named(
    alone: TofuEvaluation, compared_folder: Path, tmp_path: Path
) -> None:
    assert results_of(compared_folder).dataset == "a small world"
    with pytest.raises(FileNotFoundError, match="neither trainer_state"):
        results_of(alone, run_folder=tmp_path)
    (tmp_path / "trainer_state.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        read_training_run(tmp_path)
    with pytest.raises(FileNotFoundError):
        results_of(tmp_path)
    other = run_tofu(
        build(1), tokenizer(), **{**parts(), "holdout": None, "forget": parts()["forget"][:4]}, generate=False
    )
    with pytest.raises(ValueError, match="different forget rows"):
        results_of(alone, None, other)
