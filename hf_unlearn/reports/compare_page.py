"""compare.html: several runs on one self-contained page without scripts, links or requests."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import formats
from .columns import Column
from .compare import Comparison
from .compare_plot import FORGET, quality_figure, returned_figure, scatter_figure, utility_of
from .compare_tables import best_note, comparison_markdown, write_comparison_json
from .doubts import score_of
from .glossary import metric
from .page import ANSWERS, Plot, make_plot, page_environment
from .schema import write_text
from .versions import library_versions

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def render_comparison(comparison: Comparison, *, forget: str = FORGET, utility: str | None = None) -> str:
    """
    The comparison as one HTML page.

    Args:
        comparison ([`Comparison`]): the runs.
        forget, utility (`str`, *optional*): scores on the axes of the first figure; see [`scatter_figure`].
    """
    rows = [_row(column, comparison) for column in comparison.columns]
    return (
        page_environment()
        .get_template("compare.html.j2")
        .render(
            comparison=comparison,
            plots=_plots(comparison, forget, utility),
            rows=[row for row in rows if row["headline"] and not row["same"]],
            further=[row for row in rows if not row["headline"] and not row["same"]],
            same=[row for row in rows if row["same"]],
            note=best_note(comparison),
            answers=ANSWERS,
            version=library_versions()["hf_unlearn"],
        )
    )


def write_comparison(
    folder: str | os.PathLike[str], comparison: Comparison, *, forget: str = FORGET, utility: str | None = None
) -> list[Path]:
    """
    Writes compare.json, compare.md and compare.html, each whole or not at all.

    Raises:
        ValueError: no run has the score that an axis asks for.
        OSError: the folder cannot be written.
    """
    check_axes(comparison, [forget, *([] if utility is None else [utility])])
    out = Path(folder)
    return [
        write_comparison_json(out / "compare.json", comparison),
        write_text(out / "compare.md", comparison_markdown(comparison)),
        write_text(out / "compare.html", render_comparison(comparison, forget=forget, utility=utility)),
    ]


def check_axes(comparison: Comparison, names: Sequence[str]) -> None:
    """
    Whether the axes can be drawn.

    Raises:
        ValueError: no run has a score of that name.
    """
    known = sorted(
        {
            name
            for run in comparison.runs
            for name in run.results.unlearned.as_dict()
            if score_of(run.results.unlearned, name) is not None
        }
    )
    for name in names:
        if name not in known and name != FORGET:
            raise ValueError(f"No run has the score {name!r}; expected one of {known}.")


def _plots(comparison: Comparison, forget: str, utility: str | None) -> list[Plot]:
    chosen = utility or utility_of(comparison.runs)
    what = metric(chosen).label.lower()
    caption = (
        "Bars are standard errors. Forgetting should end where the reference is, a model that never saw the data, and "
        "utility where the target is."
    )
    made: list[tuple[str, str, str, Figure | None, list[float | None]]] = [
        (
            "trade-off",
            f"{metric(forget).label} against {what}",
            caption,
            scatter_figure(comparison, forget, utility),
            [score_of(run.results.unlearned, forget) for run in comparison.runs],
        ),
        (
            "quality",
            f"Forget quality against {what}",
            "Right of the dashed line the test does not tell a run from the reference. How far right is no merit.",
            quality_figure(comparison, utility),
            [run.results.forget_quality_log10 for run in comparison.runs],
        ),
        (
            "returned",
            f"Brought back by relearning, against {what}",
            "What a little fine-tuning brings back of what was forgotten, beyond what the control learns. Left is "
            "better.",
            returned_figure(comparison, utility),
            [None for _ in comparison.runs],
        ),
    ]
    plots = []
    for name, title, text, figure, values in made:
        if figure is None and name != "trade-off":
            continue
        said = " ".join(
            f"{run.name}: {formats.score(x)}, {formats.score(score_of(run.results.unlearned, chosen))}."
            for run, x in zip(comparison.runs, values, strict=True)
        )
        plots.append(make_plot(name, title, text, figure, label=f"{title}. {said}"))
    return plots


def _row(column: Column, comparison: Comparison) -> dict[str, Any]:
    cells = [
        {"text": column.shown(run.results), "best": run.name in comparison.best[column.name]}
        for run in comparison.runs
    ]
    same = len({cell["text"] for cell in cells}) == 1
    return {
        "label": column.label,
        "goal": column.goal,
        "cells": cells,
        "same": same,
        "headline": column.headline,
    }
