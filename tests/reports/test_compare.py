"""Runs side by side: names, what is best, warnings, settings that differ, and the files."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import attacked
import pytest
from rich.console import Console

from hf_unlearn.reports import Results, write_results
from hf_unlearn.reports.compare import compare, numbered, read_runs
from hf_unlearn.reports.compare_page import render_comparison, write_comparison
from hf_unlearn.reports.compare_plot import quality_figure, returned_figure, scatter_figure, utility_of
from hf_unlearn.reports.compare_tables import comparison_markdown, comparison_table
from hf_unlearn.reports.outcomes import AttackOutcome

Make = Callable[..., Results]


@pytest.fixture
def make(sample_factory: Callable[[], dict[str, Any]]) -> Make:
    """A run like the sample, with other scores of the unlearned model and other entries."""

    def made(entries: dict[str, Any] | None = None, **scores: Any) -> Results:
        values = sample_factory()
        values["unlearned"] |= scores
        return Results.from_dict({**values, **(entries or {})})

    return made


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a", "b"], ["a", "b"]),
        (["a", "b", "a"], ["a (1)", "b", "a (2)"]),
        (["a (1)", "a", "a"], ["a (1)", "a (2)", "a (3)"]),
        (["a", "a", "a (2)"], ["a (1)", "a (3)", "a (2)"]),
    ],
)
def test_equal_names_get_numbers_and_all_are_different(names: list[str], expected: list[str]) -> None:
    assert numbered(names) == expected


def best(*runs: Results) -> dict[str, list[str]]:
    names = [chr(ord("a") + position) for position in range(len(runs))]
    return {name: sorted(found) for name, found in compare(runs, names).best.items()}


def test_best_is_nearest_to_the_reference_and_not_lowest(make: Make) -> None:
    # the reference has 0.297
    found = best(make(forget_rouge=0.28), make(forget_rouge=0.0), make(forget_rouge=0.5))
    assert found["forget_rouge"] == ["a"]


def test_best_in_what_is_kept_is_nearest_to_the_target_from_below(make: Make) -> None:
    # the target has 0.9978: above it there is nothing to gain
    found = best(make(retain_probability=0.9978), make(retain_probability=0.999), make(retain_probability=0.9))
    assert found["retain_probability"] == ["a", "b"]


def test_a_run_that_names_no_target_is_measured_by_the_others_target(make: Make, sample: dict[str, Any]) -> None:
    unknown = {"target": {**dict.fromkeys(sample["target"], math.nan)}, "reference": None}
    found = best(make(retain_probability=0.95), make(unknown, retain_probability=0.9), make(retain_probability=0.8))
    assert found["retain_probability"] == ["a"]
    assert best(make(), make(unknown))["retain_probability"] == []


def test_runs_within_two_standard_errors_are_best_together(make: Make) -> None:
    def run(value: float, error: float) -> Results:
        return make(model_utility=value, standard_error={"model_utility": error})

    assert best(run(0.80, 0.01), run(0.79, 0.01), run(0.5, 0.01))["model_utility"] == ["a", "b"]
    assert best(run(0.80, 0.001), run(0.79, 0.001), run(0.5, 0.001))["model_utility"] == ["a"]


def test_p_values_above_the_limit_are_equally_good(make: Make) -> None:
    runs = [make({"forget_quality": p, "forget_quality_log10": None}) for p in (0.06, 0.9, 1e-9)]
    assert best(*runs)["forget_quality"] == ["a", "b"]


def test_nothing_is_best_where_all_are_alike_or_nothing_says_what_is(make: Make) -> None:
    alike = best(make(), make())
    assert alike["forget_rouge"] == []
    bare = [make({"reference": None, "forget_quality": None}, forget_rouge=value) for value in (0.1, 0.2)]
    assert best(*bare)["forget_rouge"] == []
    assert best(make(), make({"seconds": {"total": 1.0}}))["seconds"] == []
    assert best(make(forget_rouge=math.nan), make())["forget_rouge"] == []


def test_what_attacks_bring_back_is_a_column_and_less_is_better(make: Make) -> None:
    weak = attacked.relearning({**attacked.UNSEEN, "unlearned": (0.0, 0.0, 0.0, 0.0, 0.1)})
    runs = [make({"attacks": [own.as_dict()]}) for own in (weak, attacked.relearning())]
    comparison = compare([*runs, make()], ["a", "b", "c"])
    column = {own.name: own for own in comparison.columns}["returned_relearn"]
    # (0.1 - 0.024) / (0.997 - 0.024), and (0.55 - 0.024) / (0.997 - 0.024)
    assert [column.shown(run.results) for run in comparison.runs] == ["7.8%", "54.1%", "–"]
    assert comparison.best["returned_relearn"] == {"a"}
    assert "returned_relearn" not in {own.name for own in compare([make(), make()], ["a", "b"]).columns}


def test_runs_under_other_attacks_or_other_settings_have_no_best(make: Make) -> None:
    def run(*outcomes: AttackOutcome) -> Results:
        return make({"attacks": [own.as_dict() for own in outcomes]})

    # fewer attacks find less: a run that was only rounded is not the more robust one
    assert best(run(attacked.rounding()), run(attacked.rounding(), attacked.relearning()))["returned_worst"] == []
    weak = attacked.relearning({**attacked.UNSEEN, "unlearned": (0.0,) * 5})
    gentle = dataclasses.replace(weak, settings={**weak.settings, "learning_rate": 1e-9})
    assert best(run(weak), run(attacked.relearning()))["returned_relearn"] == ["a"]
    assert best(run(gentle), run(attacked.relearning()))["returned_relearn"] == []
    uncontrolled = attacked.relearning({key: attacked.UNSEEN[key] for key in ("target", "unlearned")})
    alone = dataclasses.replace(
        uncontrolled, curves=tuple(own for own in uncontrolled.curves if own.subject != "control")
    )
    assert best(run(weak), run(alone))["returned_relearn"] == []
    models = {"models": {"unlearned": {"path": "x"}}}
    named = dataclasses.replace(weak, settings={**weak.settings, **models})
    assert best(run(named), run(attacked.relearning()))["returned_relearn"] == ["a"]


def test_what_a_choice_rests_on_comes_first_and_the_rest_folds_away(make: Make) -> None:
    runs = [make({"attacks": [attacked.relearning().as_dict()]}), make(mia_zlib_auc=0.4, own_score=3.0)]
    comparison = compare(runs, ["a", "b"])
    assert [column.name for column in comparison.columns][:5] == [
        *("forget_probability", "forget_quality", "model_utility", "retain_probability", "returned_relearn"),
    ]
    page = render_comparison(comparison)
    first, folded = page.split("<summary>2 further scores</summary>")
    assert "Own score" not in first
    assert "Own score" in folded


def test_names_of_runs_break_between_words_alone(make: Make) -> None:
    page = render_comparison(compare([make(), make(forget_rouge=0.9)], ["quickstart_primal_dual", "<b>_x"]))
    assert '<th scope="row">quickstart_<wbr>primal_<wbr>dual</th>' in page
    assert '<th scope="row">&lt;b&gt;_<wbr>x</th>' in page


@pytest.mark.parametrize(
    ("entries", "warning"),
    [
        ({"dataset": "other authors"}, "The runs are on different data (a: 40 fictional authors; b: other authors)."),
        ({"truth_ratios": {"unlearned": [1.0] * 7}}, "different numbers of forget rows (a: 80; b: 7)"),
        (
            {"target": {"forget_probability": 0.5}},
            "the target's forget probability is not the same (a: 0.998; b: 0.500)",
        ),
        ({"reference": {"forget_probability": 0.5}}, "They have different references"),
    ],
)
def test_runs_that_cannot_be_compared_are_warned_of_and_nothing_is_best(
    make: Make, sample: dict[str, Any], entries: dict[str, Any], warning: str
) -> None:
    for subject in ("target", "reference"):
        if subject in entries:
            entries = {subject: {**sample[subject], **entries[subject]}}
    comparison = compare([make(), make(entries, forget_rouge=0.9)], ["a", "b"])
    assert len(comparison.warnings) == 1
    assert warning in comparison.warnings[0]
    assert not any(comparison.best.values())
    assert warning in unescape(render_comparison(comparison))
    assert comparison_markdown(comparison).startswith("**Warning.** The")


def test_other_settings_of_the_evaluation_are_warned_of_and_the_model_is_not(make: Make) -> None:
    one, other = (
        {"unlearned": {**attacked.evaluation(name, 0.0, "aa"), "settings": {"max_new_tokens": tokens, "model": name}}}
        for name, tokens in (("x", 200), ("y", 32))
    )
    runs = [make({"evaluations": entry}) for entry in (one, other)]
    assert compare(runs, ["a", "b"]).warnings == ("They were evaluated with different settings: max_new_tokens.",)
    same = {"unlearned": {**one["unlearned"], "settings": {"max_new_tokens": 200, "model": "z", "batch_size": 3}}}
    assert compare([runs[0], make({"evaluations": same})], ["a", "b"]).warnings == ()


def test_settings_that_differ_are_listed_and_those_alike_are_not(make: Make, sample: dict[str, Any]) -> None:
    other = {"settings": {**sample["settings"], "learning_rate": 1e-5, "new": [1]}, "seed": 3}
    settings = compare([make(), make(other)], ["a", "b"]).settings
    assert settings == {
        "seed": {"a": "0", "b": "3"},
        "learning_rate": {"a": "0.0002", "b": "1e-05"},
        "new": {"a": "–", "b": "[1]"},
    }


def test_the_figures_draw_what_the_runs_have(make: Make) -> None:
    runs = [
        make(forget_probability=x, model_utility=y, standard_error={"model_utility": 0.05})
        for x, y in ((0.2, 0.5), (0.4, 0.7))
    ]
    comparison = compare(runs, ["one", "two"])
    figure: Any = scatter_figure(comparison)
    assert figure is not None
    (axis,) = figure.axes
    drawn = [container.lines[0].get_xydata()[0].tolist() for container in axis.containers]
    assert drawn == [[0.2, 0.5], [0.4, 0.7], [0.9981, 0.82], [0.0021, 0.82]]  # the runs, target, reference
    bar = axis.containers[0].lines[2][0].get_segments()[0]
    assert bar[:, 1].tolist() == pytest.approx([0.45, 0.55])
    assert [text.get_text() for text in axis.texts] == ["one", "two", "target", "reference"]
    assert returned_figure(comparison) is None
    assert quality_figure(comparison) is not None


def test_labels_of_points_that_lie_together_do_not_cover_one_another(make: Make) -> None:
    runs = [make(forget_probability=0.2 + 0.002 * step, model_utility=0.5 + 0.001 * step) for step in range(5)]
    figure: Any = scatter_figure(compare(runs, [f"a run called {step}" for step in range(5)]))
    renderer = figure.canvas.get_renderer()
    boxes = [text.get_window_extent(renderer) for text in figure.axes[0].texts]
    covered = [(a, b) for a in range(5) for b in range(a) if boxes[a].overlaps(boxes[b])]
    assert covered == []


def test_utility_falls_back_where_a_run_lacks_it(make: Make) -> None:
    runs = compare([make(), make(model_utility=math.nan)], ["a", "b"]).runs
    assert utility_of(runs) == "retain_probability"
    assert utility_of(runs[:1]) == "model_utility"


def test_the_files_are_complete_and_hostile_names_stay_text(make: Make, tmp_path: Path) -> None:
    hostile = "<script>alert('x')</script>|[a](https://evil.example)"
    comparison = compare([make(forget_rouge=math.inf), make({"settings": {hostile: hostile}})], [hostile, "b"])
    files = write_comparison(tmp_path / "out", comparison)
    assert [file.name for file in files] == ["compare.json", "compare.md", "compare.html"]
    saved = json.loads(files[0].read_text(encoding="utf-8"))
    assert saved["format"] == "hf_unlearn.comparison"
    assert saved["runs"][0]["values"]["forget_rouge"] is None
    assert saved["non_finite"] == {"/runs/0/values/forget_rouge": "inf"}
    assert {column["name"]: column["best"] for column in saved["columns"]}["forget_rouge"] == []
    page = files[2].read_text(encoding="utf-8")
    assert not re.search(r"<script|<a\b|\shref=\"(?!#)|src=", page)
    assert hostile in unescape(re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL))
    table = files[1].read_text(encoding="utf-8")
    assert "<script" not in table
    assert "](https" not in table.replace("\\[a](https", "")


def test_the_best_are_marked_by_a_sign_and_not_by_colour_alone(make: Make) -> None:
    comparison = compare([make(forget_rouge=0.28), make(forget_rouge=0.9)], ["a", "b"])
    best = '<b><span role="img" aria-label="best">★</span> <span class="whole">0.280</span></b>'
    assert best in render_comparison(comparison)
    assert "★ 0.280" in comparison_markdown(comparison)
    stream = io.StringIO()
    Console(file=stream, width=160, no_color=True).print(comparison_table(comparison))
    assert "★ 0.280" in stream.getvalue()


def test_scores_alike_in_all_runs_leave_the_pages_table(make: Make) -> None:
    text = render_comparison(compare([make(), make(forget_rouge=0.9)], ["a", "b"]))
    note = re.search(r"The same in all runs: (.*?)</p>", text)
    assert note is not None
    assert "Forget truth ratio (0.551)" in note[1]
    assert "Forget ROUGE" not in note[1]


def test_runs_are_read_from_folders_and_files_with_their_names(make: Make, tmp_path: Path) -> None:
    file = write_results(tmp_path / "one" / "results.json", make())
    write_results(tmp_path / "two" / "saved.json", make())
    comparison = read_runs([tmp_path / "one", file, tmp_path / "two" / "saved.json"])
    assert [run.name for run in comparison.runs] == ["one (1)", "one (2)", "saved"]
    with pytest.raises(ValueError, match="1 names were given for 2 runs"):
        read_runs([file, file], ["x"])
    with pytest.raises(ValueError, match="expected two runs or more"):
        read_runs([file])
    with pytest.raises(FileNotFoundError, match=r"has no results; expected a results\.json in it"):
        read_runs([file, tmp_path])


def test_an_axis_that_no_run_has_is_refused_with_those_that_they_have(make: Make, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"No run has the score 'other'; expected one of .*'model_utility'"):
        write_comparison(tmp_path, compare([make(), make()], ["a", "b"]), utility="other")
    assert not list(tmp_path.iterdir())
