"""Files that are broken or hostile: an error that names the file, and nothing half written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attacked
import pytest

from hf_unlearn.cli.main import main
from hf_unlearn.reports import Results, read_results, render_report, write_results
from hf_unlearn.reports.compare import compare
from hf_unlearn.reports.compare_page import render_comparison
from hf_unlearn.reports.outcomes import AttackOutcome, Curve, JudgeRate, Measure, read_attacks, write_attacks
from hf_unlearn.reports.rebuild import write_all

Sample = dict[str, Any]
UGLY = "a\x00b\x1b[31m\ud800 $x^2$\n<script>"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: file.pop("attacks"), "has no list `attacks`"),
        (lambda file: file["attacks"][0]["curves"][0]["y"].__setitem__(0, "x"), "`y of a Curve` must be a number"),
        (lambda file: file["attacks"][0].pop("attack"), "needs `attack`"),
        (lambda file: file["attacks"].__setitem__(0, 3), "must be a mapping"),
    ],
)
def test_a_broken_file_of_attacks_is_named(tmp_path: Path, change: Any, message: str) -> None:
    file = write_attacks(tmp_path / "attacks.json", [attacked.relearning()])
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        read_attacks(file)
    assert str(file) in str(caught.value)


def test_broken_results_are_named_so_that_of_many_runs_one_knows_which(tmp_path: Path, sample: Sample) -> None:
    file = tmp_path / "results.json"
    file.write_text('{"method": "npo"}')
    with pytest.raises(ValueError, match="results lack target") as caught:
        read_results(file)
    assert str(file) in str(caught.value)
    file.write_text(json.dumps({**sample, "constraints": {}, "history": "text"}))
    with pytest.raises(TypeError, match="must be a list") as wrong:
        read_results(file)
    assert str(file) in str(wrong.value)


def test_null_is_no_number_and_no_crash(tmp_path: Path, sample: Sample) -> None:
    file = write_attacks(tmp_path / "attacks.json", [attacked.relearning(), attacked.jailbreaks()])
    content = json.loads(file.read_text())
    content["attacks"][0]["curves"][0]["y"][1] = None
    content["attacks"][1]["judges"][0]["success"] = None
    file.write_text(json.dumps(content))
    attacks = [outcome.as_dict() for outcome in read_attacks(file)]
    assert "Relearning" in render_report({**sample, "attacks": attacks})


def test_a_page_that_cannot_be_made_leaves_the_folder_as_it_was(tmp_path: Path, sample: Sample) -> None:
    write_results(tmp_path / "results.json", sample)
    before = (tmp_path / "results.json").read_bytes()
    with pytest.raises(ValueError, match="`attacks` of the results is a str"):
        write_all(tmp_path, Results.from_dict({**sample, "attacks": "none"}))
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    assert (tmp_path / "results.json").read_bytes() == before
    assert main(["report", str(tmp_path)]) == 0


def test_names_that_no_figure_can_draw_cost_no_page(sample: Sample) -> None:
    curve = Curve(
        name=UGLY, subject="unlearned", x=(0.0, 1.0), y=(0.1, 0.2), x_label=UGLY, y_label=f"probability {UGLY}"
    )
    outcome = AttackOutcome(
        attack=UGLY,
        curves=(curve,),
        measures=(Measure(name=UGLY, subject="unlearned", value=0.1, n=1),),
        judges=(JudgeRate(judge=UGLY, subject="unlearned", success=0.5, degenerate=0.0, n=2),),
    )
    sample["constraints"][0]["name"] = UGLY
    step = {f"loss/retain/{UGLY}": 0.1, f"dual/{UGLY}": 1.0, "step": 3}
    results = Results.from_dict(
        {**sample, "method": UGLY, "attacks": [outcome.as_dict()], "history": [*sample["history"], step]}
    )
    assert "<script" not in render_report(results)
    assert "<script" not in render_comparison(compare([results, results], [UGLY, "b"]))
