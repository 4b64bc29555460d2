"""`hf-unlearn attack`: attack an unlearned model, the one before and one that never saw the data, in the same way."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from .attack_arguments import AttackArguments, check_request
from .attack_data import AttackData, add_models, judge_settings, load_data
from .attack_store import AttackStore, model_identity

if TYPE_CHECKING:
    from ..reports.outcomes import AttackOutcome

Subject = Literal["unlearned", "control", "target"]


def run(command: str, arguments: list[str]) -> int:
    """Parses, checks, attacks each model in turn, writes after each attack; 1 if one of them failed."""
    from trl import ModelConfig, TrlParser

    from ..progress import quiet_libraries

    parser = TrlParser((AttackArguments, ModelConfig), prog="hf-unlearn attack")
    given, model_args = parser.parse_args_and_config(args=arguments)[:2]
    check_request(given, model_args)
    quiet_libraries()
    started = time.perf_counter()
    job = _Job.read(given)
    models = {"unlearned": model_args.model_name_or_path, "control": given.control_model, "target": given.target_model}
    for subject in get_args(Subject):
        if models[subject] is not None:
            job.store.check_model(subject, job.identity(subject, models[subject], model_args))
    failed: list[str] = []
    for subject in get_args(Subject):
        if models[subject] is not None:
            failed += job.attack(subject, models[subject], model_args)
    found = job.store.chosen(job.configs)
    if found:  # nothing, if no model could be loaded
        _print(found)
        seconds = time.perf_counter() - started
        _console().print(f"attacks.json: {job.store.path} ({seconds:.0f} s)", markup=False, highlight=False)
    for line in failed:
        print(f"hf-unlearn attack: {line}", file=sys.stderr)
    return 1 if failed else 0


@dataclass(kw_only=True)
class _Job:
    """Attacks with their configurations and data, and where what they find is kept."""

    given: AttackArguments
    configs: dict[str, Any]
    data: dict[str, AttackData]
    store: AttackStore
    judging: bool = field(default=False)

    @classmethod
    def read(cls, given: AttackArguments) -> _Job:
        configs = given.configurations()
        store = AttackStore.open(Path(given.output_dir).expanduser())
        data = load_data(given, list(configs))
        for name in set(configs) - set(data):
            _console().print(f"{name} is left out: no row has another wording", style="dim", highlight=False)
        return cls(given=given, configs={name: configs[name] for name in data}, data=data, store=store)

    def settings(self, name: str) -> dict[str, Any]:
        """Everything that changes a number of an attack."""
        judges = judge_settings(self.given, name)
        return {"config": self.configs[name], "data": self.data[name].identity, **judges}

    def identity(self, subject: Subject, model_name: str, model_args: Any) -> dict[str, Any]:
        """What tells the model from another, and how it is loaded."""
        mine = subject == "unlearned"
        loading: dict[str, Any] = {
            name: getattr(model_args, name)
            for name in ("dtype", "attn_implementation", "load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type")
            if getattr(model_args, name, None)
        }
        if not model_args.load_in_4bit:
            loading.pop("bnb_4bit_quant_type", None)
        if self.given.tokenizer_name_or_path is not None:
            loading["tokenizer"] = model_identity(self.given.tokenizer_name_or_path)
        adapter = self.given.adapter if mine else None
        return model_identity(model_name, adapter, model_args.model_revision if mine else "main", loading)

    def attack(self, subject: Subject, model_name: str, model_args: Any) -> list[str]:
        """Runs what is not finished on one model; returns a line for each attack that failed."""
        adapter = self.given.adapter if subject == "unlearned" else None
        revision = model_args.model_revision if subject == "unlearned" else "main"
        identity = self.identity(subject, model_name, model_args)
        todo = [
            name
            for name in self.configs
            if self.given.redo or not self.store.finished(name, subject, self.settings(name), identity)
        ]
        for name in self.configs:
            if name not in todo:
                _console().print(f"{subject}: {name} is finished and kept", style="dim", highlight=False)
        if not todo:
            return []
        if not self.judging and any(judge_settings(self.given, name) for name in todo):
            add_models(self.given, self.data)
            self.judging = True
        try:
            model, tokenizer = _load(model_name, adapter, revision, self.given, model_args)
        except Exception as raised:  # safetensors and remote code have errors of their own
            return [f"the {subject} model {model_name} could not be loaded: {type(raised).__name__}: {raised}"]
        failed = []
        for name in todo:
            outcome, error = self.outcome(name, subject, model, tokenizer)
            self.store.put(outcome, subject, None if error else identity)
            if error:
                failed.append(f"{name} on the {subject} model failed: {error}")
        del model
        gc.collect()  # before the next model is loaded
        return failed

    def outcome(self, name: str, subject: Subject, model: Any, tokenizer: Any) -> tuple[AttackOutcome, str | None]:
        """What one attack found; or why it failed, so that the others go on."""
        from ..reports.outcomes import AttackOutcome

        module = import_module(f"..attacks.{name}", __package__)
        shown = import_module("..attacks.gcg_rows", __package__) if name == "gcg" else module
        data, settings = self.data[name], self.settings(name)
        started = time.perf_counter()
        try:
            result = module.run(
                model,
                tokenizer,
                data.rows,
                self.configs[name],
                description=f"{subject}: {name}",
                **data.options,
            )
            seconds = time.perf_counter() - started
            return shown.outcome(result, subject, settings=settings, seconds=seconds), None
        except Exception as raised:  # chat templates, models and judges are anybody's code; the others go on
            reason = f"{type(raised).__name__}: {raised}"
            seconds = time.perf_counter() - started
            return AttackOutcome(attack=name, settings=settings, seconds=seconds, absent={subject: reason}), reason


def _load(name: str, adapter: str | None, revision: str, given: AttackArguments, model_args: Any) -> tuple[Any, Any]:
    """The model on the accelerator, if there is one, its adapter merged where that can be; and its tokenizer."""
    import copy
    from types import SimpleNamespace

    import torch

    from .eval import load_model

    request = copy.copy(model_args)
    request.model_name_or_path, request.model_revision = name, revision
    like: Any = SimpleNamespace(
        adapter=adapter,
        tokenizer_name_or_path=given.tokenizer_name_or_path,
        trust_remote_code=given.trust_remote_code,
    )
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    model, tokenizer = load_model(like, request, device)
    if hasattr(model, "merge_and_unload") and not (model_args.load_in_4bit or model_args.load_in_8bit):
        model = model.merge_and_unload()
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def _console() -> Any:
    from rich.console import Console

    return Console()


def _print(outcomes: list[AttackOutcome]) -> None:
    """A table for each kind of finding: a row for each number, a column for each model."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Attacks")
    table.add_column("attack")
    table.add_column("what", overflow="fold")
    present = [
        subject
        for subject in ("target", "unlearned", "control")
        if any(subject in outcome.settings.get("models", {}) for outcome in outcomes)
    ]
    for subject in present:
        table.add_column(subject, justify="right", no_wrap=True)
    for outcome in outcomes:
        rows = _numbers(outcome)
        for number, (label, values) in enumerate(rows.items()):
            # names come from the user's files and models: text, not markup
            cells = [Text(values.get(subject, "")) for subject in present]
            table.add_row(
                outcome.attack if number == 0 else "", Text(label), *cells, end_section=number == len(rows) - 1
            )
        for key, reason in outcome.absent.items():
            table.add_row("", Text(f"absent, {key}: {reason}", style="yellow"))
    _console().print(table)


def _numbers(outcome: AttackOutcome) -> dict[str, dict[str, str]]:
    """Label to subject to number."""
    from ..reports.formats import score, with_error

    found: dict[str, dict[str, str]] = {}
    for measure in outcome.measures:
        found.setdefault(measure.name, {})[measure.subject] = with_error(measure.value, measure.standard_error)
    refusals = outcome.attack == "over_refusal"  # its measures are what the judges said of refusals
    for rate in outcome.judges:
        half = rate.judge.rpartition(", ")[2] if refusals else "answers"
        parts: Mapping[str, str | None] = {
            f"success, judge {rate.judge}": None if refusals else with_error(rate.success, rate.standard_error),
            f"refused, judge {rate.judge}": None if rate.refusal is None or refusals else score(rate.refusal),
            f"not judged, judge {rate.judge}": str(rate.failed) if rate.failed else None,
            # the same for all judges, unless one failed
            f"gibberish among {half}": score(rate.degenerate) if rate.degenerate > 0 else None,
        }
        for label, value in parts.items():
            if value is not None:
                found.setdefault(label, {}).setdefault(rate.subject, value)
    return found
