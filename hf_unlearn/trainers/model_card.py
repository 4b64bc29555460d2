"""The model card of an unlearned model: what was done, under which limits, and whether they hold."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from .base import UnlearningTrainer

_CITATIONS = {
    "primal-dual": (
        "@misc{entesari2025constrained,\n"
        "  title = {Constrained Entropic Unlearning: A Primal-Dual Framework for Large Language Models},\n"
        "  year = {2025},\n  eprint = {2506.05314},\n  archivePrefix = {arXiv}\n}"
    ),
    "prism": (
        "@misc{prism2025dualspace,\n"
        "  title = {Dual-Space Smoothness for Robust and Balanced LLM Unlearning},\n"
        "  year = {2025},\n  eprint = {2509.23362},\n  archivePrefix = {arXiv}\n}"
    ),
}


def write_model_card(
    trainer: UnlearningTrainer,
    *,
    model_name: str | None = None,
    dataset_name: str | None = None,
    tags: Sequence[str] = (),
    results_table: str | None = None,
    folder: str | Path | None = None,
) -> Path:
    """
    Renders the card from the trainer's state and writes it to `folder` (default: the output folder).

    Args:
        trainer ([`UnlearningTrainer`]):
            After training.
        model_name, dataset_name (`str`, *optional*):
            Names for the title and the text.
        tags (`Sequence[str]`, *optional*):
            Tags for the hub.
        results_table (`str`, *optional*):
            A Markdown table of evaluation results.
        folder (`str` or `Path`, *optional*):
            Where `README.md` goes.
    """
    from importlib.resources import files

    from jinja2 import Environment

    args = trainer.args
    base = getattr(trainer.accelerator.unwrap_model(trainer.model).config, "_name_or_path", "") or ""
    base_model = None if not base or Path(base).is_absolute() or Path(base).exists() else base
    name = model_name or Path(args.output_dir).name
    feasibility: list[dict[str, Any]] | None = getattr(trainer, "feasibility", None)
    environment = Environment(trim_blocks=True, lstrip_blocks=True, autoescape=False)
    template = files(__package__).joinpath("templates/model_card.md.j2").read_text(encoding="utf-8")
    text = environment.from_string(template).render(
        front_matter=_front_matter(base_model, name, dataset_name, tags),
        name=name,
        base_model=base_model,
        dataset_name=dataset_name,
        trainer=type(trainer).__name__,
        forget_loss=args.forget_loss,
        forget_kwargs=args.forget_loss_kwargs,
        retain_loss=args.retain_loss,
        settings=_settings(trainer),
        feasibility=feasibility,
        held_out=args.retain_eval_size > 0,
        all_feasible=all(row["feasible"] for row in feasibility or []),
        results_table=results_table,
        sections=_sections(trainer),
        versions=_versions(),
        citation=_CITATIONS.get(trainer.method),
    )
    path = Path(folder or args.output_dir) / "README.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def _sections(trainer: UnlearningTrainer) -> list[str]:
    """What callbacks have to say: those with a method `card_section`, like the one that edits the weights."""
    found = (getattr(callback, "card_section", None) for callback in trainer.callback_handler.callbacks)
    return [text for section in found if section is not None and (text := section())]


def _front_matter(base_model: str | None, name: str, dataset_name: str | None, tags: Sequence[str]) -> str:
    data: dict[str, Any] = {
        "library_name": "transformers",
        "model_name": name,
        "tags": list(dict.fromkeys([*tags, "generated_from_trainer"])),
    }
    if base_model:
        data["base_model"] = base_model
    if dataset_name:
        data["datasets"] = dataset_name
    return "---\n" + yaml.safe_dump(data, sort_keys=False, allow_unicode=True) + "---"


def _settings(trainer: UnlearningTrainer) -> dict[str, Any]:
    args = trainer.args
    settings = {
        "Learning rate": args.learning_rate,
        "Epochs": args.num_train_epochs if args.max_steps <= 0 else None,
        "Optimizer steps": trainer.state.global_step,
        "Batch size (all ranks, with accumulation)": args.train_batch_size
        * args.world_size
        * args.gradient_accumulation_steps,
        "Seed": args.seed,
    }
    if args.weight_noise > 0:
        settings["Share of the weights replaced by noise before training"] = args.weight_noise
    if args.sam_rho > 0:
        settings["SAM radius"] = args.sam_rho
    if args.gradient_projection != "none":
        settings["Forget gradient decoupled"] = args.gradient_projection
    probe = getattr(trainer, "probe", None)
    if probe is not None:
        accuracy = probe.card.adversarial_accuracy
        shown = "" if accuracy is None else f", balanced accuracy under attack {accuracy:.2f}"
        settings["Probe"] = f"layer {probe.layer}, {probe.pooling}{shown}; largest weight {args.probe_weight:g}"
    if trainer.target is not None:
        settings["Forget level (nats per token)"] = (
            f"{trainer.target.level:.4g} by {trainer.target.by}, {trainer.target.mode}"
        )
    elif hasattr(args, "forget_target"):
        settings["Forget level"] = "none: forgetting is not stopped"
    return {key: value for key, value in settings.items() if value is not None}


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    from .._version import __version__

    return {"hf_unlearn": __version__, **{name: version(name) for name in ("transformers", "torch", "peft", "trl")}}
