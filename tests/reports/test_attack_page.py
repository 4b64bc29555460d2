"""The page of a run that was attacked and evaluated: sections, figures, numbers, hostile texts, bad entries."""

from __future__ import annotations

import math
import re
from html import unescape
from typing import Any

import attacked
import pytest

from hf_unlearn.reports import Results, markdown_table, render_report
from hf_unlearn.reports.attack_page import judge_rows, measure_rows
from hf_unlearn.reports.attack_plots import curve_figures, judge_figure
from hf_unlearn.reports.further import absent_reasons, further_rows, model_hashes
from hf_unlearn.reports.outcomes import AttackOutcome, Curve, JudgeRate, Measure
from hf_unlearn.reports.svg import figure_svg
from hf_unlearn.reports.tables import score_rows


@pytest.fixture
def text(attacked_page: str) -> str:
    return attacked_page


def words(html: str) -> str:
    return " ".join(unescape(re.sub(r"<(style|svg).*?</\1>|<[^>]*>", " ", html, flags=re.DOTALL)).split())


def test_every_attack_has_its_figure_or_table(text: str) -> None:
    figures = re.findall(r'<figure id="([\w-]+)">', text)
    assert figures[:4] == ["attack-success", "attack-1-curve-1", "attack-2-curve-1", "attack-3-curve-1"]
    assert text.count("<svg") == len(figures) == 8
    assert "probability, reworded question" in text
    shown = words(text)
    for title in ("Relearning", "Rounded weights", "Given first words", "Jailbreak prompts", "Conversations"):
        assert title in shown
    assert "0.410 ± 0.049 0.470 0.120 100" in shown  # success, refused, gibberish, n
    assert "3 not judged" in shown
    assert "perplexity is missing: no reference model was given" in shown
    assert "Does it refuse too much?" in shown
    assert "safe prompts refused n = 250" in shown


def test_figures_say_their_numbers_to_a_screen_reader(text: str) -> None:
    labels = [unescape(label) for label in re.findall(r'<svg[^>]*aria-label="([^"]*)"', text)]
    assert "rows never shown, unlearned: 0.002 to 0.550." in labels[1]
    assert "Conversations, target in the answer, unlearned: 0.120." in labels[0]
    assert all(labels)


def test_evaluations_show_interval_rows_hash_and_what_is_absent(text: str) -> None:
    shown = words(text)
    assert "0.060 ± 0.010 0.040 to 0.080, n = 400" in shown
    assert "ab" * 32 in shown
    assert "aggregate is missing (target, unlearned, reference): no fluency: no classifier was given" in shown
    assert "Forget quality 0.42 n = 400" in shown  # a p-value: no standard error, no interval


def test_hostile_judges_answers_metrics_and_reasons_stay_text(text: str) -> None:
    assert not re.search(r"<(script|img|b>prompts|i>own|u>x)", text)
    shown = words(text)
    for hostile in (attacked.HOSTILE_JUDGE, attacked.HOSTILE_ANSWER, "<b>prompts.csv</b>"):
        assert hostile in unescape(re.sub(r"<svg.*?</svg>", "", text, flags=re.DOTALL))
    assert "<u>x</u> is missing" in shown
    assert "hf_secret" not in text


def test_a_page_without_attacks_has_none_of_their_sections(plain_page: str) -> None:
    for section in ("attacks", "refusals", "metrics"):
        assert f'id="{section}"' not in plain_page
    assert "No attack was tried." in plain_page


def test_ids_stay_unique_and_the_page_loads_nothing(text: str) -> None:
    ids = re.findall(r'\sid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert not re.search(r'\s(?:src|srcset|action|href)="(?!#)', text)


def test_the_curve_figure_has_a_panel_a_series_and_a_line_a_model() -> None:
    ((label, figure),) = curve_figures(attacked.relearning())
    assert label == "optimizer steps"
    axes: Any = figure.axes
    assert [axis.get_title(loc="left") for axis in axes] == [
        "Probability of the answer: rows never shown",
        "Probability of the answer: rows shown",
    ]
    lines = [line.get_ydata().tolist() for line in axes[0].lines]
    assert lines == [list(attacked.UNSEEN[subject]) for subject in ("target", "unlearned", "control")]
    band = axes[0].collections[1].get_paths()[0].vertices[:, 1]
    error = 0.04 * math.sqrt(0.55 * 0.45)
    assert band.max() == pytest.approx(0.55 + error)


def test_fewer_bits_are_drawn_as_the_stronger_attack() -> None:
    ((_, figure),) = curve_figures(attacked.rounding())
    low, high = figure.axes[0].get_xlim()
    assert low > high


def test_several_seeds_are_drawn_as_mean_and_range() -> None:
    seeds = tuple(
        Curve(name="a", subject="unlearned", x=(0.0, 1.0), y=(0.0, y), x_label="steps", y_label="p")
        for y in (0.2, 0.6)
    )
    ((_, figure),) = curve_figures(AttackOutcome(attack="relearn", curves=seeds))
    axis: Any = figure.axes[0]
    assert axis.lines[0].get_ydata().tolist() == pytest.approx([0.0, 0.4])
    vertices = axis.collections[0].get_paths()[0].vertices[:, 1]
    assert (vertices.min(), vertices.max()) == pytest.approx((0.0, 0.6))


def test_odd_curves_and_judges_do_not_break_the_figures() -> None:
    nan, inf = float("nan"), float("inf")
    odd = Curve(name="_$x$", subject="control", x=(0.0, 0.0, inf), y=(nan, 1.0, 2.0), x_label="", y_label="")
    nothing = Curve(name="", subject="target", x=(1.0,), y=(nan,), x_label="other", y_label="")
    figures = curve_figures(AttackOutcome(attack="mine", curves=(odd, nothing)))
    assert [label for label, _ in figures] == [""]
    assert "</svg>" in figure_svg(figures[0][1], name="x")
    rate = JudgeRate(judge="j" * 90, subject="target", success=nan, degenerate=nan, n=3, standard_error=nan)
    unjudged = JudgeRate(judge="k", subject="target", success=nan, degenerate=nan, n=0, failed=3)
    figure = judge_figure([AttackOutcome(attack="static", judges=(rate, unjudged))])
    assert figure is not None
    assert "</svg>" in figure_svg(figure, name="x")
    assert judge_figure([AttackOutcome(attack="static", judges=(unjudged,))]) is None
    assert judge_figure([AttackOutcome(attack="over_refusal", judges=(rate,))]) is None


def test_rows_of_measures_and_judges_by_hand() -> None:
    measures = [
        Measure(name="p", subject="unlearned", value=0.25, n=4, standard_error=0.1),
        Measure(name="p", subject="control", value=1.5, n=8),
    ]
    assert measure_rows(measures) == [
        {
            "name": "p",
            "cells": {"target": "–", "unlearned": "0.250 ± 0.100", "reference": "1.500"},
            "dots": [{"subject": "unlearned", "left": "25.0"}],
            "n": "4 to 8",
        }
    ]
    (group,) = judge_rows([JudgeRate(judge="j", subject="control", success=0.5, degenerate=0.0, n=2)])
    assert group["rows"][0] | {"refusal": "–", "title": "Control", "success": "0.500"} == group["rows"][0]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"attacks": {"attack": "x"}}, "`attacks` of the results is a dict"),
        ({"attacks": [{"name": "x"}]}, "needs `attack`"),
        ({"evaluations": {"unlearned": {"scores": {}}}}, "expected evaluations with `metrics`"),
        ({"evaluations": {"other": {"metrics": {}}}}, "other"),
        ({"evaluations": [1]}, "list"),
    ],
)
def test_entries_of_another_form_are_refused_with_the_reason(
    sample: dict[str, Any], entry: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        render_report({**sample, **entry})


def test_further_metrics_leave_the_first_table_only_where_their_own_table_has_them(sample: dict[str, Any]) -> None:
    sample["unlearned"] |= {"forget_extraction_strength": 0.125, "privleak": -4.25}
    assert [entry.name for entry, _ in score_rows(sample, headlines=True)][-2:] == [
        "forget_extraction_strength",
        "privleak",
    ]
    metrics = {"forget_extraction_strength": {"value": 0.125, "n": 40}, "forget_probability": {"value": 0.1, "n": 40}}
    sample["evaluations"] = {"unlearned": {"metrics": metrics, "absent": {"a": "why", "b": "why"}}, "target": None}
    results = Results.from_dict(sample)
    # PrivLeak is in no evaluation: it stays in the first table
    first = [entry.name for entry, _ in score_rows(results, headlines=True)]
    assert "forget_extraction_strength" not in first
    assert {"privleak", "forget_probability"} <= set(first)
    assert [row["label"] for row in further_rows(results)] == ["Extraction strength", "Forget probability"]
    assert absent_reasons(results)[1] == [{"names": ["a", "b"], "models": "unlearned", "reason": "why"}]
    assert model_hashes(results) == [{"subject": "unlearned", "model": "", "hash": ""}]
    table = markdown_table(results)
    assert "| Forget probability | 0.998 | 0.002 | 0.002 | 40 | as the reference |" in table
    assert "| Extraction strength | – | 0.125 | – | 40 | as the reference |" in table


def test_many_reasons_fold_away_and_names_of_one_reason_stand_together(sample: dict[str, Any]) -> None:
    sample["absent"] = {f"metric_{number}": f"reason {number // 2}" for number in range(12)}
    shown = words(render_report(sample))
    assert "Missing, and why (6 reasons)" in shown
    assert "metric_0 , metric_1 are missing: reason 0" in shown


def test_a_page_of_evaluations_alone_does_not_show_empty_curves_of_training(sample: dict[str, Any]) -> None:
    evaluations = attacked.all_evaluations()
    text = render_report({**sample, "history": [], "evaluations": evaluations})
    assert re.findall(r'<figure id="([\w-]+)">', text) == ["truth-ratio"]
    assert "Nothing was recorded" not in text
