"""`hf-unlearn lab tofu`: methods side by side on a small model trained on TOFU, or on the embedded world."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from ..lab.finished import BenchRow


def run(command: str, arguments: list[str]) -> int:
    """Parses and runs the comparison."""
    parser = argparse.ArgumentParser(
        prog="hf-unlearn lab",
        description="Trains a small target and a retain-only reference, unlearns with several methods, and writes a "
        "table. Resumable: what is complete in --output_dir is not run again.",
    )
    parser.add_argument("world", choices=["tofu", "synthetic"], help="tofu: the benchmark; synthetic: our own authors")
    parser.add_argument("--data", default="locuslab/TOFU", help="TOFU: a folder of JSON lines, or the hub id")
    parser.add_argument("--forget_split", default="forget10", choices=["forget01", "forget05", "forget10"])
    parser.add_argument("--methods", nargs="+", help="names of methods; default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="seeds of the unlearning runs")
    parser.add_argument("--output_dir", default=None, help="default: outputs/lab-WORLD")
    parser.add_argument("--epochs", type=float, help="epochs of target and reference")
    parser.add_argument(
        "--fp32", action="store_true", help="no bf16 autocast (slower on recent CPUs, faster on old ones)"
    )
    parser.add_argument("--retain_limit", type=int, default=None, help="score only so many retain rows")
    parser.add_argument(
        "--relearn",
        nargs="*",
        type=float,
        metavar="SHARE",
        help="also fine-tune each model on a share of the forget rows (0.25), or on several, and measure the rest",
    )
    options = parser.parse_args(arguments)

    from ..progress import quiet_libraries

    quiet_libraries()
    from rich.console import Console

    from ..attacks import RelearnConfig
    from ..lab.bench import run_bench
    from ..lab.methods import METHODS, method_by_name
    from ..lab.recipe import LabRecipe

    if options.world == "tofu":
        from ..lab.tofu import tofu_data

        data = tofu_data(options.data, options.forget_split)
        recipe = LabRecipe(bf16=not options.fp32)
    else:
        from ..lab.quickstart import QUICKSTART_RECIPE as recipe
        from ..lab.world import make_world, world_data

        data = world_data(make_world(0))
    if options.epochs is not None:
        recipe = LabRecipe(**{**recipe.__dict__, "epochs": options.epochs})
    methods = [method_by_name(name) for name in options.methods] if options.methods else list(METHODS)
    shares = options.relearn
    folder = options.output_dir or f"outputs/lab-{options.world}"
    console = Console()
    rows = run_bench(
        data,
        methods,
        folder,
        recipe=recipe,
        seeds=options.seeds,
        retain_limit=options.retain_limit,
        relearning=[] if shares is None else [RelearnConfig(fraction=share) for share in shares or [0.25]],
        report=lambda line: console.print(line, highlight=False),
    )
    print_table(console, rows)
    console.print(f"All columns: {folder}/table.md, {folder}/table.json", highlight=False, soft_wrap=True)
    return 0


def print_table(console: Console, rows: Sequence[BenchRow]) -> None:
    """All columns where the terminal is wide enough, else the headlines: cut short, a number says nothing."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from ..lab.bench import HEADLINES, table_cells

    for keys in (None, HEADLINES):
        titles, cells = table_cells([replace(row, label=row.name) if row.seed is None else row for row in rows], keys)
        table = Table(box=box.SIMPLE, header_style="bold", padding=(0, 1, 0, 0))
        for number, title in enumerate(titles):
            words = [word for cell in (title, *(line[number] for line in cells)) for word in cell.split()]
            table.add_column(
                Text(title), justify="right" if number else "left", min_width=max(map(len, words), default=0)
            )
        for line in cells:
            table.add_row(*map(Text, line))
        needed = console.measure(table, options=console.options.update(width=10_000)).minimum
        if needed <= console.width:
            break
    console.print(table)
