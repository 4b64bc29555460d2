"""A comparison as a table for the terminal, as Markdown, and as compare.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .compare import Comparison
from .plain import pull_non_finite, to_plain
from .schema import write_text
from .tables import escape_cell, markdown
from .versions import library_versions

if TYPE_CHECKING:
    from rich.table import Table

FORMAT, FORMAT_VERSION = "hf_unlearn.comparison", 1
BEST = "★"
BEST_NOTE = (
    "★ marks the best: nearest to the reference, or to the target from below, or the lowest, as the goal says; also "
    "whatever is within two standard errors of it. Nothing is marked where all are alike, where nothing says what is "
    "best, or where other attacks were run, or the same with other settings."
)
NO_BEST_NOTE = "No best is marked: these runs cannot be compared number by number."


def best_note(comparison: Comparison) -> str:
    """What the star means, or why there is none."""
    return NO_BEST_NOTE if comparison.warnings else BEST_NOTE


def comparison_table(comparison: Comparison) -> Table:
    """The comparison for the terminal: a row for each measure, a column for each run."""
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=Text("Runs side by side"),
        caption=Text(best_note(comparison)),
        title_justify="left",
        caption_justify="left",
        header_style="bold",
    )
    table.add_column("")
    for run in comparison.runs:
        table.add_column(Text(run.name), justify="right")
    table.add_column("should be", style="dim")
    for column in comparison.columns:
        cells = []
        for run in comparison.runs:
            first = run.name in comparison.best[column.name]
            shown = column.shown(run.results)
            cells.append(Text(f"{BEST} {shown}" if first else shown, style="bold" if first else ""))
        table.add_row(Text(column.label), *cells, Text(column.goal))
    return table


def comparison_markdown(comparison: Comparison) -> str:
    """The comparison as Markdown: warnings, a table with a row for each run, verdicts, settings that differ."""
    lines = [f"**Warning.** {escape_cell(warning)}\n" for warning in comparison.warnings]
    header = ["Run", *(column.label for column in comparison.columns)]
    rows = []
    for run in comparison.runs:
        cells = []
        for column in comparison.columns:
            first = run.name in comparison.best[column.name]
            cells.append(f"{BEST} {column.shown(run.results)}" if first else column.shown(run.results))
        rows.append([run.name, *cells])
    lines += [markdown(header, rows, align="l" + "r" * len(comparison.columns)), best_note(comparison) + "\n"]
    lines.append(markdown(["Run", "Verdict"], [[run.name, run.verdict.text] for run in comparison.runs], align="ll"))
    if comparison.settings:
        names = [run.name for run in comparison.runs]
        differing = [[key, *(values[name] for name in names)] for key, values in comparison.settings.items()]
        lines.append(markdown(["Setting", *names], differing, align="l" + "l" * len(names)))
    return "\n".join(lines)


def comparison_dict(comparison: Comparison) -> dict[str, Any]:
    """The comparison as nested plain values; NaN and infinities are still floats here."""
    plain: dict[str, Any] = to_plain(
        {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "versions": library_versions(),
            "warnings": comparison.warnings,
            "columns": [
                {
                    "name": column.name,
                    "label": column.label,
                    "goal": column.goal,
                    "best": [run.name for run in comparison.runs if run.name in comparison.best[column.name]],
                }
                for column in comparison.columns
            ],
            "runs": [
                {
                    "name": run.name,
                    "method": run.results.method,
                    "model": run.results.model,
                    "dataset": run.results.dataset,
                    "seed": run.results.seed,
                    "verdict": {"answer": run.verdict.answer, "text": run.verdict.text},
                    "values": {column.name: column.value(run.results) for column in comparison.columns},
                    "standard_errors": {
                        column.name: error
                        for column in comparison.columns
                        if (error := column.error(run.results)) is not None
                    },
                }
                for run in comparison.runs
            ],
            "settings_that_differ": comparison.settings,
        }
    )
    return plain


def write_comparison_json(path: Path, comparison: Comparison) -> Path:
    """Writes compare.json in strict JSON, whole or not at all."""
    plain, non_finite = pull_non_finite(comparison_dict(comparison))
    if non_finite:
        plain["non_finite"] = non_finite
    return write_text(path, json.dumps(plain, indent=2, allow_nan=False, ensure_ascii=False) + "\n")
