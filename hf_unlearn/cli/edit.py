"""`hf-unlearn edit`: plan, apply, verify and write a constrained edit; or look at a plan."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .edit_arguments import EditArguments, check_request

if TYPE_CHECKING:
    from ..editing.constrained import EditResult

PLAN = "plan"


def run(command: str, arguments: list[str]) -> int:
    """Parses, checks, loads, edits, writes, and prints what it did; returns the exit code."""
    if any(argument == "--inspect" or argument.startswith("--inspect=") for argument in arguments):
        return _inspect(arguments)
    from trl import ModelConfig, TrlParser

    from ..editing.config import EditConfig
    from ..progress import quiet_libraries

    parser = TrlParser((EditArguments, EditConfig, ModelConfig), prog="hf-unlearn edit")
    parser.add_argument("--inspect", metavar="PLAN", help="Print the tables of a plan or of an output folder, alone.")
    given, config, model_args = parser.parse_args_and_config(args=arguments)[:3]
    check_request(given, config, model_args)
    rows, retain, attack = (given.load(kind) for kind in ("dataset", "retain", "attack"))
    quiet_libraries()
    started = time.perf_counter()
    model, tokenizer = _load(given, model_args)
    from ..editing.constrained import constrained_edit

    result = constrained_edit(
        model, tokenizer, rows, config, retain_dataset=retain, attack_dataset=attack, merge=given.merge
    )
    wanted = config.probability if config.searches else None
    _write(result, tokenizer, given, wanted, model_args.model_name_or_path, time.perf_counter() - started)
    _print(result.plan)
    what = "Merged model" if given.merge else "Adapter"
    _console().print(
        f"{what}, card, edit.json and {PLAN}/: {given.output_dir} ({time.perf_counter() - started:.0f} s)",
        markup=False,
        highlight=False,
    )
    return 0


def _inspect(arguments: list[str]) -> int:
    import argparse

    parser = argparse.ArgumentParser(prog="hf-unlearn edit", description="Prints a plan; loads no model.")
    parser.add_argument("--inspect", required=True, metavar="PLAN", help="A plan's folder, or one of hf-unlearn edit.")
    folder = Path(parser.parse_args(arguments).inspect).expanduser()
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; expected a plan (edit_plan.json), or what this command wrote.")
    from ..editing.plan import PLAN_FILE, EditPlan

    nested = folder / PLAN
    plan = EditPlan.load(nested if not (folder / PLAN_FILE).is_file() and nested.is_dir() else folder)
    _print(plan)
    settings = {key: value for key, value in plan.settings.items() if value is not None}
    shown = ", ".join(f"{key}={value}" for key, value in settings.items())
    versions = ", ".join(f"{name} {version}" for name, version in plan.versions.items())
    _console().print(f"Settings: {shown}\nVersions: {versions}", markup=False, highlight=False)
    return 0


def _load(given: EditArguments, model_args: Any) -> tuple[Any, Any]:
    """The model on the accelerator, if there is one, ready to be read; and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import get_quantization_config

    from .train import _model_kwargs

    name = model_args.model_name_or_path
    kwargs = _model_kwargs(model_args)
    quantization = get_quantization_config(model_args)
    if quantization is not None:
        kwargs["quantization_config"] = quantization
    tokenizer = AutoTokenizer.from_pretrained(
        given.tokenizer_name_or_path or name,
        trust_remote_code=given.trust_remote_code,
        **({} if given.tokenizer_name_or_path else {"revision": model_args.model_revision}),
    )
    model: Any = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=given.trust_remote_code, **kwargs)
    if quantization is None and torch.accelerator.is_available():
        model = model.to(torch.accelerator.current_accelerator())
    return model.eval(), tokenizer


def _write(
    result: EditResult,
    tokenizer: Any,
    given: EditArguments,
    wanted: float | None,
    model_name: str,
    seconds: float,
) -> None:
    from ..reports.edit_card import write_edit_card
    from ..reports.schema import write_text

    folder = Path(given.output_dir).expanduser()
    plan = result.plan.with_measures(seconds=seconds)
    plan.save(folder / PLAN)
    base = None if Path(model_name).is_absolute() or Path(model_name).exists() else model_name
    if given.merge:
        result.model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    else:
        plan.to_peft(folder, base_model_name_or_path=model_name)
    found = json.loads((folder / PLAN / "edit_plan.json").read_text(encoding="utf-8"))  # strict JSON: no infinities
    kept = {"method": plan.method, "merged": given.merge, **{key: found[key] for key in ("measures", "settings")}}
    write_text(folder / "edit.json", json.dumps({**kept, "edits": found["edits"]}, indent=2, allow_nan=False) + "\n")
    write_edit_card(
        folder,
        plan,
        name=f"{Path(model_name).name} after an edit by {plan.method.upper()}",
        merged=given.merge,
        wanted=wanted,
        base_model=base,
        dataset_name=given.dataset,
    )


def _console() -> Any:
    from rich.console import Console

    return Console()


def _print(plan: Any) -> None:
    from ..reports.edits import edit_tables

    for table in edit_tables(plan):
        _console().print(table)
