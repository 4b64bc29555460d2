"""`hf-unlearn compare`: runs side by side, in the terminal and as one page."""

from __future__ import annotations

import argparse


def run(command: str, arguments: list[str]) -> int:
    """Compares runs and prints their table."""
    parser = argparse.ArgumentParser(
        prog="hf-unlearn compare",
        description="Puts two runs or more side by side: a table, and compare.json, compare.md and compare.html with "
        "forgetting against utility. Warns where they are on different data, rows or models.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders with results.json, or such files")
    parser.add_argument("--names", nargs="+", default=[], help="one for each run; default: the folders' names")
    parser.add_argument("--forget", default=None, metavar="SCORE", help="x axis; default: forget_probability")
    parser.add_argument(
        "--utility", default=None, metavar="SCORE", help="y axis; default: model_utility, or retain_probability"
    )
    parser.add_argument("--output_dir", default="outputs/compare", help="default: outputs/compare")
    options = parser.parse_args(arguments)

    from rich.console import Console
    from rich.text import Text

    from ..reports.compare import read_runs
    from ..reports.compare_page import write_comparison
    from ..reports.compare_plot import FORGET
    from ..reports.compare_tables import comparison_table

    comparison = read_runs(options.runs, options.names)
    files = write_comparison(options.output_dir, comparison, forget=options.forget or FORGET, utility=options.utility)
    console = Console()
    for warning in comparison.warnings:
        console.print(Text.assemble(("Warning: ", "bold yellow"), warning))
    console.print(comparison_table(comparison))
    for run in comparison.runs:
        console.print(Text.assemble((f"{run.name}: ", "bold"), run.verdict.text))
    console.print(f"\nPage: {files[-1]}", highlight=False, markup=False, soft_wrap=True)
    return 0
