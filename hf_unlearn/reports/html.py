"""One self-contained page about a run: no scripts, no requests, every text of a model escaped."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import formats
from .attack_page import attack_sections
from .further import absent_reasons, evaluations_of, further_rows, model_hashes
from .glossary import GOALS, metric
from .limits import untested
from .overlap import leaked_words
from .page import ANSWERS, Plot, make_plot, page_environment
from .plots import constraint_figure, dual_figure, forget_figure, truth_ratio_figure
from .schema import SUBJECTS, Generation, Results, as_results, write_text
from .stays import RETURNED_YES
from .tables import score_rows, titles
from .verdict import FORGET_SLACK, INDISTINGUISHABLE, KEEP_YES, REWORDED, judge
from .word_plot import word_figure
from .words import words_of

SHOWN_GENERATIONS = 4
"""Questions of each part that are open; the others fold away."""
_EDITED_NOTE = "Marked words repeat the right answer: those edited should vanish, the sentence around them may stay."
SUBJECT_NOTES = {"target": "before unlearning", "unlearned": "after", "reference": "never saw the data"}


def render_report(results: Results | Mapping[str, Any]) -> str:
    """The report as one HTML page.

    Args:
        results ([`Results`] or `Mapping`): the results.

    Returns:
        `str`: the page. It loads nothing (its content security policy forbids it), runs no script, follows the
        reader's light or dark theme, and reflows on phones.
    """
    results = as_results(results)
    absent_first, absent_further = absent_reasons(results)
    return (
        page_environment()
        .get_template("report.html.j2")
        .render(
            results=results,
            verdict=judge(results),
            subjects=[
                {"name": name, "title": titles(results)[name], "note": SUBJECT_NOTES[name]} for name in SUBJECTS
            ],
            words=words_of(results),
            scores=_score_context(results),
            has_errors=any(scores is not None and scores.standard_error for scores in results.scores().values()),
            plots=_plots(results),
            generations=_generations(results),
            shown=SHOWN_GENERATIONS,
            phases=_phases(results),
            under_attack=attack_sections(results),
            further=further_rows(results),
            further_meanings=_further_meanings(results),
            further_subjects=list(evaluations_of(results)),
            absent_first=absent_first,
            absent_further=absent_further,
            hashes=model_hashes(results),
            untested=untested(results),
            settings=[(key, formats.plain_setting(value)) for key, value in results.settings.items()],
            forget_quality=formats.p_value(results.forget_quality, results.forget_quality_log10),
            limits={
                "slack": FORGET_SLACK,
                "keep": formats.percent(KEEP_YES),
                "p": INDISTINGUISHABLE,
                "reworded": REWORDED,
                "returned": formats.percent(RETURNED_YES),
            },
            answers=ANSWERS,
            format_loss=formats.loss,
            format_score=formats.score,
            format_duration=formats.duration,
        )
    )


def write_report(path: str | os.PathLike[str], results: Results | Mapping[str, Any]) -> Path:
    """Write [`render_report`] to `path`, whole or not at all.

    Raises:
        OSError: if the folder cannot be written.
    """
    return write_text(Path(path), render_report(results))


def _score_context(results: Results) -> list[dict[str, Any]]:
    rows = []
    for entry, cells in score_rows(results, headlines=True):
        dots = []
        if entry.unit_interval:
            for subject in ("reference", "target", "unlearned"):  # the last one lies on top
                scores = results.scores()[subject]
                value = None if scores is None else scores.as_dict().get(entry.name)
                if value is not None and 0 <= value <= 1:
                    dots.append({"subject": subject, "left": f"{100 * value:.1f}"})
        rows.append({"metric": entry, "goal": GOALS[entry.goal], "cells": cells, "dots": dots})
    return rows


def _further_meanings(results: Results) -> list[tuple[str, str]]:
    """Label and definition of the metrics of the evaluations that the first table lacks; alike definitions once."""
    first = {entry.name for entry, _ in score_rows(results, headlines=True)}
    found: dict[str, list[str]] = {}
    for row in further_rows(results):
        meaning = metric(row["name"]).meaning
        if meaning and row["name"] not in first:
            found.setdefault(meaning, []).append(row["label"])
    return [("; ".join(labels), meaning) for meaning, labels in found.items()]


def _plots(results: Results) -> list[Plot]:
    history, constraints = results.history, results.constraints
    words = words_of(results)
    if words is not None:
        return [
            make_plot(
                "words",
                "The words before and after",
                "Each dot is a word where an answer says it. The edit holds each below the dashed "
                "line under the questions it was made for; what happens under the reworded ones is measured, and "
                "nothing guarantees it.",
                word_figure(words),
            )
        ]
    plots = [
        make_plot(
            "forget",
            "Forgetting",
            "The forget loss is what training minimises. The NLL says how unlikely the forget answers have become: "
            "it should end at the forget level (dashed), where text that the model has never seen lies.",
            forget_figure(history, forget_level=results.forget_level),
        ),
        make_plot(
            "retain",
            "Retain loss against its limit",
            "Each constraint's loss should stay below its limit eps (dashed). The shaded side is infeasible.",
            constraint_figure(history, constraints),
        ),
        make_plot(
            "dual",
            "Dual variables",
            "The weight of each constraint. It grows while the constraint is violated, falls while there is room, and "
            "ends where one more step of forgetting would cost too much. At 0 the constraint costs nothing; growing "
            "to the end means infeasible.",
            dual_figure(history, constraints),
        ),
        make_plot(
            "truth-ratio",
            "Truth ratios of the forget rows",
            "The closer the unlearned curve is to the reference, the less the two models can be told apart. Forget "
            "quality is a test of the largest vertical gap between these two.",
            truth_ratio_figure(results.truth_ratios),
        ),
    ]
    # a page made of evaluations alone has no training to show
    evaluated = not history and bool(evaluations_of(results))
    return [plot for plot in plots if plot.svg is not None or not evaluated]


def _generations(results: Results) -> list[dict[str, Any]]:
    parts = (
        ("forget", "Questions that ask for the words", _EDITED_NOTE)
        if words_of(results) is not None
        else ("forget", "Questions to forget", "Marked words repeat the right answer: they should vanish."),
        ("retain", "Questions to keep", "Marked words repeat the right answer: they should stay."),
    )
    groups = []
    for part, title, note in parts:
        rows = [_generation(row, titles(results)) for row in results.generations if row.part == part]
        if rows:
            groups.append({"part": part, "title": title, "note": note, "rows": rows})
    return groups


def _generation(row: Generation, title: Mapping[str, str]) -> dict[str, Any]:
    answers = []
    for subject in SUBJECTS:
        text = getattr(row, subject)
        if text is not None:
            pieces = leaked_words(text, row.answer, row.question)
            answers.append({"subject": subject, "title": title[subject], "pieces": pieces, "empty": not text.strip()})
    return {"question": row.question, "answer": row.answer, "answers": answers}


def _phases(results: Results) -> list[dict[str, Any]]:
    total = results.seconds["total"]
    longest = max((value for value in results.seconds.values() if math.isfinite(value)), default=0.0)
    scale = total if math.isfinite(total) and total > 0 else longest
    return [
        {
            "name": formats.plain_words(name),
            "shown": formats.duration(value),
            "width": f"{min(100.0, 100 * value / scale):.1f}" if scale > 0 and math.isfinite(value) else "0",
        }
        for name, value in results.seconds.items()
        if name != "total"
    ]
