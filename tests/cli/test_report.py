"""`hf-unlearn report` and `hf-unlearn compare`: what they read, write and refuse."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from hf_unlearn.cli.main import main
from hf_unlearn.evaluation.record import Evaluation, MetricValue
from hf_unlearn.evaluation.tofu_files import TofuEvaluation
from hf_unlearn.evaluation.tofu_metrics import tofu_metrics
from hf_unlearn.metrics.scores import PartScores, TofuScores
from hf_unlearn.reports import ConstraintOutcome, Generation, ModelScores, Results, read_results, write_results
from hf_unlearn.reports.outcomes import AttackOutcome, Curve, JudgeRate, Measure, write_attacks
from hf_unlearn.reports.rebuild import gather, markdown_attacks, markdown_report, merge

HISTORY = tuple({"step": step, "loss/forget": 5.0 / step, "forget_nll": 0.1 * step} for step in range(1, 9))


def scores(probability: float) -> ModelScores:
    return ModelScores(forget_probability=probability, forget_rouge=0.3, retain_probability=0.99, retain_rouge=0.98)


def results(**entries: Any) -> Results:
    basic: dict[str, Any] = {
        "method": "NPO",
        "target": scores(0.9),
        "unlearned": scores(0.02),
        "reference": None,
        "forget_quality": None,
        "seconds": {"total": 2.0},
        "versions": {},
        "history": HISTORY,
        "dataset": "rows",
        "settings": {"learning_rate": 1e-5},
    }
    return Results(**{**basic, **entries})


def attack(end: float = 0.6) -> AttackOutcome:
    ends: dict[Literal["unlearned", "control"], float] = {"unlearned": end, "control": 0.0}
    curves = tuple(
        Curve(
            name="rows never shown",
            subject=subject,
            x=(0.0, 9.0),
            y=(0.0, y),
            x_label="steps",
            y_label="probability",
        )
        for subject, y in ends.items()
    )
    return AttackOutcome(attack="relearn", curves=curves, settings={"fraction": 0.5})


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "npo"
    write_results(folder / "results.json", results())
    return folder


def test_a_folder_gets_its_page_table_plots_and_attacks(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_attacks(run_folder / "attacks.json", [attack()])
    assert main(["report", str(run_folder)]) == 0
    assert {"results.json", "report.html", "table.md", "plots"} <= {path.name for path in run_folder.iterdir()}
    assert "A little fine-tuning on half of the rows brings back" in (run_folder / "report.html").read_text()
    assert "### Under attack" in (run_folder / "table.md").read_text()
    assert read_results(run_folder / "results.json").extra["attacks"][0]["attack"] == "relearn"
    assert [path.name for path in (run_folder / "plots").iterdir()] == ["forget_loss.png"]
    assert "report.html" in capsys.readouterr().out.replace("\n", "")


def test_a_report_made_twice_is_the_same_and_named_attacks_replace_the_old(run_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    file = write_attacks(tmp_path / "mine" / "attacks.json", [attack(0.01)])
    assert main(["report", str(run_folder), "--attacks", str(file.parent), "--output_dir", str(out)]) == 0
    first = {name: (out / name).read_bytes() for name in ("results.json", "report.html", "table.md")}
    assert main(["report", str(out)]) == 0
    assert {name: (out / name).read_bytes() for name in first} == first
    assert not (run_folder / "report.html").exists()
    other = write_attacks(tmp_path / "other.json", [attack(), attack()])
    assert len(gather(out, attacks=[other]).extra["attacks"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "nothing is not there; expected a folder with a results.json or an evaluation.json"),
        (["."], "has no results.json and no evaluation.json; evaluate the model first"),
        (["npo", "--attacks", "a.json"], "a.json is not there; expected an attacks.json"),
        (["npo", "--attacks", "npo/results.json"], "holds no outcomes of attacks"),
        (["npo", "--target", "npo"], "has no evaluation.json of the unlearned model"),
        (["npo", "--unlearned", "npo"], "--unlearned npo has no evaluation.json"),
        (["npo", "--unlearned", "gone"], "--unlearned gone is not there"),
    ],
)
def test_what_is_missing_is_named_with_what_to_do(
    run_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(run_folder.parent)
    before = sorted(path for path in run_folder.rglob("*"))
    assert main(["report", *arguments]) == 1
    assert message in capsys.readouterr().err
    assert sorted(path for path in run_folder.rglob("*")) == before


def test_a_page_that_cannot_be_written_is_an_error_in_one_line(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["report", str(run_folder), "--output_dir", str(tmp_path / "file" / "out")]) == 1
    assert "error:" in capsys.readouterr().err


def evaluated(probability: float) -> dict[str, Any]:
    metrics = {"forget_probability": MetricValue(value=probability, n=40, standard_error=0.01, low=0.0, high=0.1)}
    return dataclasses.asdict(Evaluation(benchmark="tofu", model="m", metrics=metrics))


def evaluation_folder(folder: Path, shift: float) -> Path:
    """A saved evaluation of 12 forget and 12 retain rows, made without a model."""
    draws = np.random.default_rng(7)

    def part(nll: float) -> PartScores:
        losses = np.abs(draws.normal(nll, 0.01, 12))
        return PartScores(
            nll=losses,
            probability=np.exp(-losses),
            log_truth_ratio=draws.normal(shift, 0.3, 12),
            rouge=np.full(12, 0.5),
            fingerprint="the same rows",
        )

    scores = TofuScores(parts={"forget": part(0.05 + 2 * shift), "retain": part(0.02)})
    metrics, absent = tofu_metrics(scores, None, None, resamples=50, seed=0)
    example = {"part": "forget", "question": "q?", "answer": "a", "generated": f"shift {shift}"}
    record = Evaluation(benchmark="tofu", model=folder.name, metrics=metrics, absent=absent, model_hash="ab" * 32)
    TofuEvaluation(evaluation=record, scores=scores, examples=(example,)).save(folder)
    return folder


def test_folders_of_evaluations_and_a_trainers_output_become_a_report(tmp_path: Path) -> None:
    target, unlearned, reference = (
        evaluation_folder(tmp_path / name, shift) for name, shift in (("target", 0.0), ("mine", 3.0), ("never", 2.9))
    )
    trainer = tmp_path / "trainer"
    trainer.mkdir()
    (trainer / "trainer_state.json").write_text(json.dumps({"log_history": list(HISTORY)}))
    models = ["--target", str(target), "--reference", str(reference)]
    assert main(["report", str(unlearned), *models, "--run", str(trainer)]) == 0
    found = read_results(unlearned / "results.json")
    assert found.target.forget_probability > 0.9 > 0.01 > found.unlearned.forget_probability
    assert found.forget_quality is not None
    assert found.history == HISTORY
    page = (unlearned / "report.html").read_text()
    assert "ab" * 32 in page
    assert "n = 12" in page
    assert "shift 3.0" in page
    # attacks that come later need no evaluation again
    write_attacks(unlearned / "attacks.json", [attack()])
    assert main(["report", str(unlearned)]) == 0
    again = read_results(unlearned / "results.json")
    assert (again.history, again.forget_quality) == (HISTORY, found.forget_quality)
    assert again.extra["attacks"]
    # and a run that has results gets the evaluations into them
    write_results(trainer / "results.json", results())
    assert main(["report", str(trainer), "--unlearned", str(unlearned)]) == 0
    both = read_results(trainer / "results.json")
    assert (both.method, both.target.forget_probability) == ("NPO", 0.9)
    assert both.unlearned.forget_probability == found.unlearned.forget_probability


def test_evaluations_keep_what_only_the_runs_results_have() -> None:
    constraint = ConstraintOutcome(name="retain", eps=1.0, loss=0.5, multiplier=2.0, feasible=True)
    generation = Generation(question="q", answer="a", target="t", unlearned="u")
    known = results(constraints=(constraint,), generations=(generation,), seed=3, extra={"note": "kept"})
    made = results(
        method="unlearning",
        target=scores(float("nan")),
        unlearned=scores(0.05),
        settings={"max_new_tokens": 9},
        history=(),
        seconds={"evaluate_unlearned": 4.0, "total": 4.0},
        absent={"target": "was not evaluated", "mia_auc": "no reference"},
        extra={"evaluations": {"unlearned": evaluated(0.05)}, "attacks": []},
    )
    found = merge(known, made)
    assert (found.method, found.seed, found.history, found.settings) == ("NPO", 3, HISTORY, {"learning_rate": 1e-5})
    assert (found.constraints, found.generations) == ((constraint,), (generation,))
    assert (found.unlearned.forget_probability, found.target.forget_probability) == (0.05, 0.9)
    assert found.absent == {"mia_auc": "no reference"}
    assert found.seconds == {"evaluate_unlearned": 4.0, "total": 6.0}
    assert set(found.extra) == {"note", "evaluations", "attacks"}


def test_the_markdown_has_errors_rows_and_every_attack() -> None:
    outcomes = [
        attack(),
        AttackOutcome(
            attack="static",
            judges=(
                JudgeRate(judge="a|b", subject="unlearned", success=0.25, degenerate=0.0, n=8, standard_error=0.1),
            ),
            measures=(Measure(name="m", subject="control", value=0.5, n=2),),
        ),
    ]
    extra = {"attacks": [own.as_dict() for own in outcomes], "evaluations": {"unlearned": evaluated(0.02)}}
    found = results(extra=extra)
    assert markdown_attacks(found).splitlines()[2:] == [
        "| Relearning | probability, rows never shown, 9 steps | – | 0.600 | 0.000 | – |",
        "| Jailbreak prompts | m | – | – | 0.500 | 2 |",
        "| Jailbreak prompts | success, judge a\\|b | – | 0.250 ± 0.100 | – | 8 |",
    ]
    text = markdown_report(found)
    assert "Does it stay forgotten? A little fine-tuning on half of the rows brings back 66.7% of what was" in text
    assert "| Metric | Target | Unlearned | Reference | n | Should be |" in text
    assert "| Forget probability | 0.020 ± 0.010 (0.000 to 0.100, n = 40) |" in text
    assert markdown_attacks(results()) == ""
    assert "###" not in markdown_report(results())


def test_runs_are_compared_in_the_terminal_and_as_files(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_results(tmp_path / "b" / "npo" / "results.json", results(unlearned=scores(0.5), dataset="other rows"))
    out = tmp_path / "out"
    assert main(["compare", str(run_folder), str(tmp_path / "b" / "npo"), "--output_dir", str(out)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Warning: The runs are on different data (npo (1): rows; npo (2): other rows)." in shown
    assert "npo (2): The model did not forget but kept the rest." in shown
    assert sorted(path.name for path in out.iterdir()) == ["compare.html", "compare.json", "compare.md"]
    assert json.loads((out / "compare.json").read_text())["runs"][1]["name"] == "npo (2)"
    assert main(["compare", str(run_folder), "--output_dir", str(out)]) == 1
    assert "expected two runs or more" in capsys.readouterr().err
