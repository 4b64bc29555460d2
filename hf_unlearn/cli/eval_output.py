"""What `hf-unlearn eval` leaves beside evaluation.json, and what it prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..evaluation.record import Evaluation, MetricValue
from ..reports import formats
from ..reports.tables import markdown

if TYPE_CHECKING:
    from rich.table import Table

    from ..evaluation.tofu_files import TofuEvaluation
    from .eval_arguments import EvalArguments
    from .eval_data import EvalData

RESULTS, TABLE, REPORT = "results.json", "table.md", "report.html"
_BEST = {True: "high", False: "low", None: ""}


def write_report_files(given: EvalArguments, data: EvalData, found: TofuEvaluation) -> list[str]:
    """
    Writes results.json, table.md and report.html; returns their names.

    Raises:
        OSError: the folder cannot be written; evaluation.json and the scores are there already.
    """
    from ..evaluation.to_results import results_of
    from ..evaluation.tofu_files import TofuEvaluation
    from ..reports.html import write_report
    from ..reports.schema import write_results, write_text
    from ..reports.tables import markdown_table

    folder = Path(given.output_dir).expanduser()
    reference = data.reference_evaluation if isinstance(data.reference_evaluation, TofuEvaluation) else None
    run = None if given.run is None else Path(given.run).expanduser()
    results = results_of(found, data.target, reference, run_folder=run)
    write_results(folder / RESULTS, results)
    write_text(folder / TABLE, markdown_table(results))
    write_report(folder / REPORT, results)
    return [RESULTS, TABLE, REPORT]


def write_table(folder: Path, evaluation: Evaluation) -> list[str]:
    """Writes table.md of a benchmark that has no report; returns its name."""
    from ..reports.schema import write_text

    rows = [[name, _value(metric), str(metric.n)] for name, metric in evaluation.metrics.items()]
    write_text(folder / TABLE, markdown(["Metric", "Value", "n"], rows, align="lrr"))
    return [TABLE]


def print_evaluation(
    evaluation: Evaluation, others: Mapping[str, Evaluation], folder: Path, written: Sequence[str]
) -> None:
    """Prints the table of metrics, what is absent and why, and where the files are."""
    from rich.console import Console

    console = Console()
    console.print(evaluation_table(evaluation, others))
    for reason, names in _by_reason(evaluation).items():
        console.print(f"Absent: {', '.join(names)}: {reason}.", style="dim", markup=False, highlight=False)
    limit = evaluation.settings.get("limits", evaluation.settings.get("limit"))
    if limit is not None:
        console.print(f"At most {limit} rows of each part: for a first look, not for numbers to report.", style="dim")
    names = ["evaluation.json", *evaluation.rows.values(), *written]
    seconds = formats.duration(evaluation.seconds.get("total"))
    console.print(
        f"{', '.join(dict.fromkeys(names))}: {folder} ({seconds})", markup=False, highlight=False, soft_wrap=True
    )


def evaluation_table(evaluation: Evaluation, others: Mapping[str, Evaluation]) -> Table:
    """Every metric with its standard error and n, and the same metric of other models, or else its 95% interval."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(f"{evaluation.benchmark}: {evaluation.model}"), title_justify="left", header_style="bold")
    # names are keys of evaluation.json: cut short they could not be looked up
    table.add_column("", no_wrap=True, min_width=max(map(len, evaluation.metrics), default=0))
    table.add_column("value ± SE", justify="right", style="bold")
    if not others:
        table.add_column("95%", justify="right", style="dim")
    table.add_column("n", justify="right")
    for name in others:
        table.add_column(name, justify="right")
    table.add_column("should be", style="dim")
    for name, metric in evaluation.metrics.items():
        beside = [one.metrics.get(name) for one in others.values()]
        table.add_row(
            Text(name),
            Text(_value(metric)),
            *([] if others else [Text(_interval(metric))]),
            Text(str(metric.n)),
            *(Text("" if value is None else _value(value)) for value in beside),
            Text(_BEST[metric.higher_is_better]),
        )
    return table


def _value(metric: MetricValue) -> str:
    return f"{formats.with_error(metric.value, metric.standard_error)}{f' {metric.unit}' if metric.unit else ''}"


def _interval(metric: MetricValue) -> str:
    if metric.low is None or metric.high is None:
        return ""
    return f"{formats.score(metric.low)} to {formats.score(metric.high)}"


def _by_reason(evaluation: Evaluation) -> dict[str, list[str]]:
    found: dict[str, list[Any]] = {}
    for name, reason in evaluation.absent.items():
        found.setdefault(reason, []).append(name)
    return found
