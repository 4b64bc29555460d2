"""`hf-unlearn report`: the page, the table and the plots from what lies in folders, without a model."""

from __future__ import annotations

import argparse


def run(command: str, arguments: list[str]) -> int:
    """Rebuilds a report and prints its table."""
    parser = argparse.ArgumentParser(
        prog="hf-unlearn report",
        description="Writes report.html, table.md (for model cards), plots and results.json from a folder with "
        "results.json and, where there is one, attacks.json; or from folders of evaluations. Loads no model.",
    )
    parser.add_argument("folder", help="with results.json, or with the evaluation of the unlearned model")
    parser.add_argument("--attacks", nargs="+", default=[], metavar="FILE", help="attacks.json, or folders with one")
    parser.add_argument("--unlearned", metavar="DIR", help="evaluation of the unlearned model (hf-unlearn eval)")
    parser.add_argument("--target", metavar="DIR", help="evaluation of the model before unlearning")
    parser.add_argument("--reference", metavar="DIR", help="evaluation of a model that never saw the forget set")
    parser.add_argument("--run", metavar="DIR", help="a trainer's output, for curves and constraints")
    parser.add_argument("--output_dir", metavar="DIR", help="default: the folder itself")
    options = parser.parse_args(arguments)

    from rich.console import Console

    from ..reports import results_table
    from ..reports.rebuild import gather, write_all

    results = gather(
        options.folder,
        attacks=options.attacks,
        unlearned=options.unlearned,
        target=options.target,
        reference=options.reference,
        run=options.run,
    )
    files = write_all(options.output_dir or options.folder, results)
    console = Console()
    console.print(results_table(results, headlines=True))
    for file in files[:3]:
        console.print(str(file), highlight=False, markup=False, soft_wrap=True)
    return 0
