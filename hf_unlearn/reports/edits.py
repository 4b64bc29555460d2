"""A planned or applied edit as tables: what it does before and after, and what it costs block by block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from . import formats
from .tables import markdown

if TYPE_CHECKING:
    from rich.table import Table

    from ..editing.plan import EditPlan

_REACH = {
    "largest_probability": "Words: largest probability",
    "median_probability": "Words: median probability",
    "perplexity": "Words: perplexity",
    "greedy_share": "Places where greedy decoding says the word",
}
_REGION = {
    "loss": "Loss of the region (nats)",
    "clean": "Loss of the region, plain prompts (nats)",
    "relaxed": "Loss of the region, relaxed prompts (nats)",
    "rounded": "Loss of the region, prompts rounded to tokens (nats)",
    "retain_kl": "KL divergence on retain answers (nats)",
}
_WHEN = ("before", "after")
LAYER_COLUMNS = ("Block", "Rank", "Norm", "Cost", "Gap", "Reached", "Seconds")


def measure_rows(measures: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Label, before and after of everything that the measures of a plan hold; see [`plan_edit`]."""
    rows = []
    if "constrained" in measures:
        held = measures["constrained"]
        label = f"Constrained tokens ({held['pairs']}, variants included): largest probability left to a word"
        rows.append((label, _number(held["before"]), _number(held["after"])))
    reach = measures.get("reach", {})
    for key, label in _REACH.items():
        if reach:
            show = formats.percent if key == "greedy_share" else _number
            rows.append((label, show(reach["before"][key]), show(reach["after"][key])))
    for method in ("tsr", "arr"):
        for key, label in _REGION.items():
            if key in measures.get(method, {}):
                pair = measures[method][key]
                rows.append((label, _number(pair["before"]), _number(pair["after"])))
    if "said" in measures:
        said = measures["said"]
        before, after = (f"{said[when]} of {said['rows']}" for when in _WHEN)
        rows.append(("Rows whose answer says a word", before, after))
    if "sampled" in measures:
        drawn = measures["sampled"]
        before, after = (f"{drawn[when]} of {drawn['answers']}" for when in _WHEN)
        rows.append(("Sampled answers that say a word", before, after))
    if "retain_probability" in measures:
        kept = measures["retain_probability"]
        held = "held-out" if kept.get("held_out") else "weighed"
        before, after = (_number(kept[when]) for when in _WHEN)
        rows.append((f"Retain answers: probability ({held} rows)", before, after))
    if "attack" in measures:
        attack = measures["attack"]
        for key, label in (("success", "Attacks that succeed"), ("refused", "Attacks that are refused")):
            before, after = (f"{attack[key][when]} of {attack['prompts']}" for when in _WHEN)
            rows.append((label, before, after))
    return rows


def layer_rows(plan: EditPlan) -> list[tuple[str, ...]]:
    """Each block's edit in the columns of `LAYER_COLUMNS`; what a method does not have is a dash."""
    rows: list[tuple[str, ...]] = []
    for edit in plan.edits:
        found = edit.certificate
        reached = found.get("reached", found.get("feasible"))
        rows.append(
            (
                str(edit.layer),
                str(edit.rank),
                _number(edit.norm()),
                _number(found.get("cost")),
                _number(found.get("gap")),
                formats.MISSING if reached is None else "yes" if reached else "no",
                formats.duration(found.get("seconds")),
            )
        )
    return rows


def edit_tables(plan: EditPlan) -> list[Table]:
    """The tables for the terminal: before and after, where there are measures, and the blocks."""
    from rich.table import Table
    from rich.text import Text

    tables = []
    rows = measure_rows(plan.measures)
    if rows:
        measured = Table("", title=Text(f"Edit by {plan.method.upper()}"), title_justify="left", header_style="bold")
        measured.add_column("before", justify="right")
        measured.add_column("after", justify="right", style="bold")
        for row in rows:
            measured.add_row(*map(Text, row))
        tables.append(measured)
    blocks = Table(title=Text("Blocks"), title_justify="left", header_style="bold")
    for name in LAYER_COLUMNS:
        blocks.add_column(name, justify="right")
    for layer in layer_rows(plan):
        blocks.add_row(*map(Text, layer))
    return [*tables, blocks]


def markdown_edit(plan: EditPlan) -> tuple[str, str]:
    """The same as Markdown, for a model card; the first one is empty without measures."""
    rows = measure_rows(plan.measures)
    return _markdown(("", "Before", "After"), rows) if rows else "", _markdown(LAYER_COLUMNS, layer_rows(plan))


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return markdown(header, rows, align="l" + "r" * (len(header) - 1))


def _number(value: Any) -> str:
    if isinstance(value, str):  # "inf" or "nan": a plan that was read from JSON
        value = float(value)
    if value is not None and value != 0 and (abs(value) < 1e-3 or abs(value) >= 1e5):
        return f"{value:.2g}"
    return formats.loss(value)
