"""The model card of an edited model: what is guaranteed, by which measurement, and what is not."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from .edits import markdown_edit
from .plain import mask_secrets, to_plain
from .schema import write_text

if TYPE_CHECKING:
    from ..editing.plan import EditPlan

METHOD_NAMES = {
    "pcr": "point-wise constrained regions (PCR)",
    "tsr": "towards safer regions (TSR)",
    "arr": "away from risky regions (ARR)",
}
_PCR_ONLY: tuple[str, ...] = (
    "positions",
    "probability",
    "source",
    "eps",
    "eps_percentile",
    "solver",
    "ridge",
    "soft_margin",
)
_PCR_ONLY += ("token", "tokens_per_word", "variants", "generation_rounds", "weigh_retain")
_REGION_ONLY = ("radius", "radius_unit", "steps", "learning_rate", "rank", "retain_weight")


def write_edit_card(
    folder: str | Path,
    plan: EditPlan,
    *,
    name: str,
    merged: bool,
    wanted: float | None = None,
    base_model: str | None = None,
    dataset_name: str | None = None,
    results_table: str | None = None,
) -> Path:
    """
    Writes `README.md`. Neither the words nor local paths are in it.

    Args:
        folder (`str` or `Path`):
            Where the card goes.
        plan ([`EditPlan`]):
            What was applied, with its measures.
        name (`str`):
            Title.
        merged (`bool`):
            Whether the folder holds a whole model; an adapter otherwise.
        wanted (`float`, *optional*):
            The probability that was asked for, of PCR with a search; a plan that was made anew because rounding ate
            into a merge has a lower one in its settings.
        base_model, dataset_name (`str`, *optional*):
            Hub ids; absolute paths and what exists on this disk are left out.
        results_table (`str`, *optional*):
            A further Markdown table.
    """
    from importlib.resources import files

    from jinja2 import Environment

    from ..editing.settled import ROUNDING

    base_model, dataset_name = _public(base_model), _public(dataset_name)
    measures, blocks = markdown_edit(plan)
    environment = Environment(trim_blocks=True, lstrip_blocks=True, autoescape=False)
    template = files(__package__).joinpath("templates/edit_card.md.j2").read_text(encoding="utf-8")
    held = plan.measures.get("constrained")
    if wanted is not None and held is not None:  # of the model as it is, which a merge has rounded
        guarded = plan.method == "pcr" and held["after"] <= wanted * ROUNDING
    else:
        guarded = plan.method == "pcr" and all(
            edit.certificate.get("reached", edit.certificate.get("feasible", False)) for edit in plan.edits
        )
    text = environment.from_string(template).render(
        front_matter=_front_matter(name, merged, base_model, dataset_name, plan.method),
        name=name,
        base_model=base_model,
        merged=merged,
        pcr=plan.method == "pcr",
        method=METHOD_NAMES[plan.method],
        wanted=None if wanted is None else f"{wanted:g}",
        guarded=guarded,
        shared=plan.settings.get("tokens_per_word", 1) if plan.settings.get("tokens_per_word", 1) > 1 else None,
        pairs=None if held is None else held["pairs"],
        largest=None if held is None else f"{held['after']:.2g}",
        measures=measures,
        blocks=blocks,
        results_table=results_table,
        settings=_settings(plan),
        versions=plan.versions,
    )
    return write_text(Path(folder) / "README.md", text)


def _public(name: str | None) -> str | None:
    """A hub id, or None for a path: those say who has made the model, and nobody else can use them."""
    if not name or Path(name).is_absolute() or name.startswith((".", "~")) or Path(name).exists():
        return None
    return name


def _settings(plan: EditPlan) -> dict[str, Any]:
    hidden = {"method", "words", "words_file", *(_REGION_ONLY if plan.method == "pcr" else _PCR_ONLY)}
    hidden |= set() if plan.method == "arr" else {"free_positions"}
    settings: dict[str, Any] = mask_secrets(to_plain(plan.settings))
    return {key: value for key, value in settings.items() if key not in hidden and value is not None}


def _front_matter(name: str, merged: bool, base_model: str | None, dataset_name: str | None, method: str) -> str:
    data: dict[str, Any] = {
        "library_name": "transformers" if merged else "peft",
        "model_name": name,
        "tags": ["hf_unlearn", "constrained-edit", method],
    }
    if base_model:
        data["base_model"] = base_model
    if dataset_name:
        data["datasets"] = [dataset_name]
    return "---\n" + yaml.safe_dump(data, sort_keys=False, allow_unicode=True) + "---"
