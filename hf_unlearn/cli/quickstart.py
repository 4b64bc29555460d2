"""`hf-unlearn quickstart`: the main job on the embedded world, offline."""

from __future__ import annotations

import argparse


def run(command: str, arguments: list[str]) -> int:
    """Runs the quickstart and prints its table."""
    parser = argparse.ArgumentParser(
        prog="hf-unlearn quickstart",
        description="Trains a small model on fictional authors, makes it forget a tenth of them under a hard limit on "
        "the rest, and compares it with a model that never saw them. Needs no network and no GPU.",
    )
    parser.add_argument("--output_dir", default="outputs/quickstart", help="where model, results and report go")
    parser.add_argument(
        "--method",
        default="primal-dual",
        choices=["primal-dual", "prism", "edit"],
        help="which trainer unlearns; edit: a constrained edit of a weight matrix, which makes names unreachable",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of world, training and unlearning")
    parser.add_argument("--no_cache", action="store_true", help="train target and reference even if they are cached")
    options = parser.parse_args(arguments)

    from ..progress import quiet_libraries

    quiet_libraries()
    from rich.console import Console

    from ..lab.quickstart import run_quickstart
    from ..reports import results_table

    console = Console()
    console.print(
        "[bold]hf-unlearn quickstart[/]: train a target and a retain-only reference, "
        f"{'edit' if options.method == 'edit' else 'unlearn'}, compare.",
        highlight=False,
    )
    results = run_quickstart(
        options.output_dir, method=options.method, seed=options.seed, use_cache=not options.no_cache
    )
    console.print(results_table(results))
    console.print(f"\n{results.seconds['total']:.0f} s. Report: {options.output_dir}/report.html", highlight=False)
    return 0
