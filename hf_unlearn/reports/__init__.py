"""Results of an unlearning run and how they are shown: schema, tables, plots and one HTML page.

Importing this package is cheap: matplotlib, jinja2 and rich are imported by the first name that needs them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .html import render_report, write_report
    from .plots import constraint_figure, dual_figure, forget_figure, save_plots, truth_ratio_figure
    from .schema import ConstraintOutcome, Generation, ModelScores, Results, read_results, write_results
    from .tables import markdown_constraints, markdown_table, results_table
    from .verdict import Check, Verdict, judge
    from .versions import library_versions
    from .word_plot import word_figure
    from .words import Words, words_of

_WHERE = {
    "Check": "verdict",
    "ConstraintOutcome": "schema",
    "Generation": "schema",
    "ModelScores": "schema",
    "Results": "schema",
    "Verdict": "verdict",
    "Words": "words",
    "constraint_figure": "plots",
    "dual_figure": "plots",
    "forget_figure": "plots",
    "judge": "verdict",
    "library_versions": "versions",
    "markdown_constraints": "tables",
    "markdown_table": "tables",
    "read_results": "schema",
    "render_report": "html",
    "results_table": "tables",
    "save_plots": "plots",
    "truth_ratio_figure": "plots",
    "word_figure": "word_plot",
    "words_of": "words",
    "write_report": "html",
    "write_results": "schema",
}

__all__ = [
    "Check",
    "ConstraintOutcome",
    "Generation",
    "ModelScores",
    "Results",
    "Verdict",
    "Words",
    "constraint_figure",
    "dual_figure",
    "forget_figure",
    "judge",
    "library_versions",
    "markdown_constraints",
    "markdown_table",
    "read_results",
    "render_report",
    "results_table",
    "save_plots",
    "truth_ratio_figure",
    "word_figure",
    "words_of",
    "write_report",
    "write_results",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
