"""The section of a model card that says what an edit has changed, what it guarantees, and how to load it."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from .plan import FACTORS_FILE, PLAN_FILE, EditPlan

BEGIN = "<!-- hf_unlearn: constrained edit, begin -->"
END = "<!-- hf_unlearn: constrained edit, end -->"
CARD_FILE = "README.md"

_METHODS = {
    "pcr": "point-wise constrained regions (PCR)",
    "tsr": "towards safer regions (TSR)",
    "arr": "away from risky regions (ARR)",
}
_PURPOSES = {
    "pcr": "the smallest change of the matrices below under which chosen words are unreachable at given places",
    "tsr": "a bounded change of the matrices below towards safe answers to given prompts",
    "arr": "a bounded change of the matrices below away from harmful answers, whatever stands in part of a prompt",
}


def card_section(plan: EditPlan, *, adapter_name: str | None = None) -> str:
    """
    The section in Markdown, between two markers. It names neither the words nor the prompts.

    Args:
        plan ([`EditPlan`]):
            What was applied, with its measures.
        adapter_name (`str`, *optional*):
            The adapter that holds the edit; None where it is in the weights.
    """
    parts = [
        f"## Constrained edit\n\nAfter training the weights were edited with [hf_unlearn]"
        f"(https://github.com/hf-unlearn/hf-unlearn): {_PURPOSES[plan.method]} "
        "([arXiv 2510.03567](https://arxiv.org/abs/2510.03567)).",
        _table(["", ""], _what(plan, adapter_name)),
    ]
    measured = _measured(plan.measures)
    if measured:
        parts.append("By real forward passes, the edit applied:")
        parts.append(_table(["", "before", "after"], measured))
    parts += [_guarantee(plan), _loading(adapter_name)]
    return "\n\n".join([BEGIN, *parts, END]) + "\n"


def edit_metrics(plan: EditPlan) -> dict[str, float]:
    """
    What is logged of an edit: `edit/rank`, `edit/norm`, `edit/realised` and, where they were measured,
    `edit/constrained_probability`, `edit/largest_probability`, `edit/said`, `edit/sampled`, `edit/retain_probability`,
    `edit/attack_success`; of the last six also `..._before`.
    """
    measures = plan.measures
    found: dict[str, float] = {
        "edit/rank": plan.rank,
        "edit/norm": sum(edit.norm() ** 2 for edit in plan.edits) ** 0.5,
        "edit/realised": min(measures.get("realised", {"": 1.0}).values()),
    }
    reach, attack = measures.get("reach", {}), measures.get("attack", {})
    for when, suffix in (("after", ""), ("before", "_before")):
        if reach:
            found[f"edit/largest_probability{suffix}"] = reach[when]["largest_probability"]
        if "constrained" in measures:
            found[f"edit/constrained_probability{suffix}"] = measures["constrained"][when]
        for name in ("said", "sampled", "retain_probability"):
            if name in measures:
                found[f"edit/{name}{suffix}"] = measures[name][when]
        if attack:
            found[f"edit/attack_success{suffix}"] = attack["success"][when]
    return found


def put_section(folder: str | Path, section: str) -> Path:
    """
    Puts a section into the `README.md` of a folder: in place of an earlier one, else at its end; a file that is not
    there is made. The file is complete at any time.
    """
    path = Path(folder) / CARD_FILE
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    head, begin, rest = text.partition(BEGIN)
    if begin and END in rest:
        tail = rest.partition(END)[2].removeprefix("\n")
    else:
        head, tail = (f"{text.rstrip()}\n\n" if text.strip() else ""), ""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f"{CARD_FILE}.part")
    try:
        scratch.write_text(head + section + tail, encoding="utf-8")
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
    return path


def save_with_card(folder: str | Path, plan: EditPlan, section: str, *, model_card: str | Path | None = None) -> None:
    """
    Writes a plan and its section as a card of its own to a folder, and the section into the card of the folder
    `model_card`; where that fails, no plan is left there.
    """
    folder = Path(folder)
    try:
        plan.save(folder)
        put_section(folder, section)
        if model_card is not None:
            put_section(model_card, section)
    except BaseException:
        for name in (PLAN_FILE, FACTORS_FILE):
            for left in (folder / name, folder / f"{name}.part"):
                with suppress(OSError):
                    left.unlink(missing_ok=True)
        raise


def _what(plan: EditPlan, adapter_name: str | None) -> list[list[str]]:
    settings, realised = plan.settings, plan.measures.get("realised", {})
    rows = [
        ["Method", _METHODS[plan.method]],
        ["Blocks", ", ".join(str(edit.layer) for edit in plan.edits)],
        ["Rank", ", ".join(str(edit.rank) for edit in plan.edits)],
        ["Norm of the edit", ", ".join(_number(edit.norm()) for edit in plan.edits)],
        ["Words (not listed)", str(settings.get("number_of_words", 0))],
    ]
    searched = plan.method == "pcr" and settings.get("eps") is None and settings.get("eps_percentile") is None
    if searched and "probability" in settings:
        rows.append(["Probability that a word may have, at most", _number(settings["probability"])])
    if "step" in plan.measures:
        rows.append(["After optimizer step", str(plan.measures["step"])])
    rows.append(["Applied as", "merged into the weights" if adapter_name is None else f"adapter `{adapter_name}`"])
    if realised and adapter_name is None:
        rows.append(["Share of the edit that the weights have taken", f"{min(realised.values()):.1%}"])
    return rows


def _measured(measures: dict[str, Any]) -> list[list[str]]:
    rows = []
    if "constrained" in measures:
        held = measures["constrained"]
        text = f"Largest probability left to a word at all {held['pairs']} places that the edit was made for"
        rows.append([text, *(_number(held[when]) for when in ("before", "after"))])
    if "reach" in measures:
        reach = measures["reach"]
        names = {
            "largest_probability": "Largest probability of a word where the rows say it",
            "lowest_rank": "Lowest rank of a word there",
        }
        rows += [[text, *(_number(reach[when][key]) for when in ("before", "after"))] for key, text in names.items()]
    if "said" in measures:
        said = measures["said"]
        rows.append([f"Answers that say a word, of {said['rows']}", str(said["before"]), str(said["after"])])
    if "sampled" in measures:
        drawn = measures["sampled"]
        text = f"Sampled answers that say a word, of {drawn['answers']}"
        rows.append([text, str(drawn["before"]), str(drawn["after"])])
    if "retain_probability" in measures:
        kept = measures["retain_probability"]
        which = "held out of" if kept.get("held_out") else "also used for"
        rows.append(
            [
                f"Mean probability of a retain token ({kept['rows']} rows, {which} the edit)",
                *(_number(kept[when]) for when in ("before", "after")),
            ]
        )
    if "attack" in measures:
        attack = measures["attack"]
        for key, text in (("success", "Attacks that succeed"), ("refused", "Attacks that are refused")):
            counts = [str(attack[key][when]) for when in ("before", "after")]
            rows.append([f"{text}, of {attack['prompts']}", *counts])
    return rows


def _guarantee(plan: EditPlan) -> str:
    if plan.method == "pcr":
        held = (
            "**What holds**: at the places that the edit was made for, and only there, the words are as unlikely as "
            "the table says; that was measured on the edited model. Other wordings, languages and contexts can still "
            "lead to the words."
        )
    else:
        held = (
            "**What holds**: the change is bounded as configured, and its effect is what the table shows. It proves "
            "nothing about prompts that were not measured."
        )
    return (
        f"{held} Whoever has the weights can find the edit and remove it, and any further training, quantisation or "
        "merging moves the weights: measure again after it."
    )


def _loading(adapter_name: str | None) -> str:
    if adapter_name is None:
        return (
            "**Loading**: the weights of this folder have the edit in them; nothing else is needed. `edit/` holds the "
            "plan (factors and measures). The weights before the edit are those of the last (or the best) checkpoint "
            "of the run; in the process that trained, `callback.result.applied.undo()` brings them back."
        )
    return (
        f"**Loading**: the edit is an adapter of its own, in the folder `{adapter_name}`, and has to be active "
        "together with the trained one. Without it the model is the unedited one.\n\n"
        "```python\n"
        "model = PeftModel.from_pretrained(base, folder)\n"
        f'model.load_adapter(f"{{folder}}/{adapter_name}", adapter_name="{adapter_name}")\n'
        f'model.base_model.set_adapter([*model.active_adapters, "{adapter_name}"])\n'
        "model = model.merge_and_unload()  # or leave it as adapters\n"
        "```\n\n"
        f'To undo it, leave it out, or call `model.delete_adapter("{adapter_name}")`.'
    )


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
