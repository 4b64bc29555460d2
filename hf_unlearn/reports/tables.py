"""The results as a table: for the terminal (rich) and for model cards (Markdown)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from . import formats
from .further import evaluations_of, rows_of
from .glossary import GOALS, Metric, metrics_of
from .schema import SUBJECTS, ModelScores, Results, as_results
from .verdict import INDISTINGUISHABLE, judge
from .words import words_of

if TYPE_CHECKING:
    from rich.table import Table

_TITLES = {"target": "Target", "unlearned": "Unlearned", "reference": "Reference"}


def titles(results: Results) -> dict[str, str]:
    """What the three models are called in tables."""
    return _TITLES if words_of(results) is None else {**_TITLES, "unlearned": "Edited"}


def score_rows(
    results: Results | Mapping[str, Any], *, headlines: bool = False
) -> list[tuple[Metric, dict[str, str]]]:
    """
    Every metric of the results with its formatted score for each of target, unlearned and reference.

    With `headlines`, without those that are no headline and stand in the table of the evaluations' metrics anyway.
    """
    results = as_results(results)
    scores = results.scores()
    elsewhere = {name for entry in evaluations_of(results).values() for name in entry["metrics"]} if headlines else ()
    return [
        (metric, {subject: _cell(scores[subject], metric.name) for subject in SUBJECTS})
        for metric in metrics_of(results)
        if metric.headline or metric.name not in elsewhere
    ]


def results_table(results: Results | Mapping[str, Any], *, headlines: bool = False) -> Table:
    """A table of target, unlearned and reference for the terminal, with the verdict below it.

    Args:
        results ([`Results`] or `Mapping`): the results.
        headlines (`bool`, *optional*, defaults to `False`): see [`score_rows`].

    Returns:
        `rich.table.Table`: give it to `rich.console.Console().print`.
    """
    from rich.table import Table
    from rich.text import Text

    results = as_results(results)
    verdict, edited = judge(results), words_of(results) is not None
    table = Table(
        title=Text(f"Results: {results.method}" if edited else f"Unlearning results: {results.method}"),
        caption=Text(verdict.text),
        title_justify="left",
        caption_justify="left",
        header_style="bold",
    )
    table.add_column("")
    for subject in SUBJECTS:
        table.add_column(titles(results)[subject], justify="right", style="bold" if subject == "unlearned" else "")
    table.add_column("should be", style="dim")
    for metric, cells in score_rows(results, headlines=headlines):
        table.add_row(Text(metric.label), *(Text(cells[subject]) for subject in SUBJECTS), Text(GOALS[metric.goal]))
    table.add_section()
    quality = formats.p_value(results.forget_quality, results.forget_quality_log10)
    if not edited:
        table.add_row(Text("Forget quality (p)"), Text(""), Text(quality), Text(""), Text(f"> {INDISTINGUISHABLE}"))
    for constraint in results.constraints:
        table.add_row(
            Text("Most left to a word" if edited else f"Loss of {constraint.name}"),
            Text(""),
            Text(formats.loss(constraint.loss), style="" if constraint.feasible else "red"),
            Text(""),
            Text(f"≤ {formats.loss(constraint.eps)}{'' if constraint.feasible else ' (violated)'}"),
        )
    table.add_row(Text("Time"), Text(""), Text(formats.duration(results.seconds["total"])), Text(""), Text(""))
    return table


def markdown_table(results: Results | Mapping[str, Any], *, headlines: bool = False) -> str:
    """
    The scores as a Markdown table, with forget quality as the last row; an edit has none.

    Args:
        results ([`Results`] or `Mapping`): the results. Where they carry an evaluation of the unlearned model, there
            is a column with the number of rows.
        headlines (`bool`, *optional*, defaults to `False`): see [`score_rows`].
    """
    results = as_results(results)
    count = rows_of(results)
    header = ["Metric", *(titles(results)[subject] for subject in SUBJECTS), "Should be"]
    rows = [
        [metric.label, *(cells[subject] for subject in SUBJECTS), GOALS[metric.goal]]
        for metric, cells in score_rows(results, headlines=headlines)
    ]
    names = [metric.name for metric, _ in score_rows(results, headlines=headlines)]
    quality = formats.p_value(results.forget_quality, results.forget_quality_log10)
    if words_of(results) is None:
        rows.append(["Forget quality (KS p-value)", "", quality, "", f"> {INDISTINGUISHABLE}"])
        names.append("forget_quality")
    if not count:
        return markdown(header, rows, align="lrrrl")
    for name, row in zip(names, rows, strict=True):
        row.insert(-1, str(count.get(name, formats.MISSING)))
    return markdown([*header[:-1], "n", header[-1]], rows, align="lrrrrl")


def markdown_constraints(results: Results | Mapping[str, Any]) -> str:
    """The constraints as a Markdown table: limit, loss, multiplier and feasibility; empty text if there are none."""
    results = as_results(results)
    if not results.constraints:
        return ""
    rows = [
        [c.name, formats.loss(c.eps), formats.loss(c.loss), formats.loss(c.multiplier), "yes" if c.feasible else "no"]
        for c in results.constraints
    ]
    return markdown(["Constraint", "eps", "Loss", "Multiplier", "Feasible"], rows, align="lrrrl")


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], *, align: str) -> str:
    """A Markdown table; `align` has "l" or "r" for each column."""
    ruler = ["---:" if side == "r" else "---" for side in align]
    lines = [[escape_cell(cell) for cell in header], ruler, *([escape_cell(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def escape_cell(cell: str) -> str:
    """Text in one line of Markdown that starts no cell, tag or link."""
    text = " ".join(cell.split()).replace("\\", "\\\\").replace("|", "\\|")
    return text.replace("<", "&lt;").replace(">", "&gt;").replace("[", "\\[")


def _cell(scores: ModelScores | None, name: str) -> str:
    if scores is None:
        return formats.MISSING
    value = scores.as_dict().get(name)
    if value is None or math.isnan(value):
        return formats.MISSING
    return formats.with_error(value, scores.standard_error.get(name))
