"""The main job, end to end, on the embedded world: train, unlearn, evaluate, report."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..metrics.scores import TofuScores
from ..reports import Results, library_versions, save_plots, write_report, write_results
from .evaluate import score_model
from .methods import PROBE, LabMethod, MethodRun, run_method
from .recipe import LabData, LabRecipe
from .training import LabModel, train_retain_only, train_target
from .world import make_world, world_data

QUICKSTART_RECIPE = LabRecipe(
    vocab_size=2048,
    hidden_size=128,
    num_layers=3,
    num_heads=4,
    intermediate_size=384,
    epochs=24,
    learning_rate=3e-3,
    batch_size=16,
)
# What differs from PrimalDualConfig's defaults, for a model of a million parameters and 80 rows to forget. The level
# is given, not measured: a token gate at the level of unseen authors (4.2 nats) leaves their paraphrases a little
# likelier than wrong answers (forget quality 0.02 to 0.17 on seed 0); at 8 nats, above log V = 7.6, it does not.
# Small as the world is, all its retain rows are needed to train on: with a tenth held out, those 72 rows lose up to
# 0.08 nats while the others keep theirs. The limit is therefore measured on the training rows, and once, at the end:
# forget quality still rises over the last hundred steps.
QUICKSTART_METHOD = LabMethod(
    name="primal_dual",
    label="PrimalDualTrainer",
    trainer="primal-dual",
    arguments={
        "num_train_epochs": 50,
        "learning_rate": 5e-4,
        "retain_margin": 0.045,
        "retain_eval_size": 0,
        "forget_target": 8.0,
        "eval_strategy": "steps",
        "eval_steps": 250,
        "save_strategy": "steps",
        "save_steps": 250,
    },
)
# PRISM under the same limit: the retain loss's weight is learned, so nothing has to be tuned against forgetting.
QUICKSTART_PRISM = LabMethod(
    name="prism",
    label="PrismTrainer",
    trainer="prism",
    arguments={
        **QUICKSTART_METHOD.arguments,
        "forget_loss": "lmf",
        "normalize_forget_loss": True,
        "sam_rho": 0.05,
        **PROBE,
    },
)
QUICKSTART_METHODS = {"primal-dual": QUICKSTART_METHOD, "prism": QUICKSTART_PRISM}
QUICKSTART_CHOICES = (*QUICKSTART_METHODS, "edit")
RETAIN_ROWS = 80
SHOWN_PER_PART = 4


@dataclass
class Stopwatch:
    """Seconds of each phase, and when it all started."""

    started: float = field(default_factory=time.perf_counter)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Adds the time of the block to a phase."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - started


def run_quickstart(
    output_dir: str | Path = "outputs/quickstart",
    *,
    method: str = "primal-dual",
    seed: int = 0,
    use_cache: bool = True,
) -> Results:
    """
    Trains a target and a retain-only reference on the world of `seed`, unlearns 10% of its authors, and compares
    before, after and reference.

    Args:
        output_dir (`str` or `Path`, *optional*, defaults to `"outputs/quickstart"`):
            Receives `model/` (with its card), `results.json`, `report.html` and `plots/`.
        method (`str`, *optional*, defaults to `"primal-dual"`):
            `"primal-dual"` or `"prism"`: which trainer unlearns. `"edit"`: no trainer, but a constrained edit of a
            weight matrix that makes the names in answers about these authors unreachable.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the world, of the training and of the unlearning.
        use_cache (`bool`, *optional*, defaults to `True`):
            Whether target and reference may come from the cache of an earlier run.

    Returns:
        [`Results`]: what `results.json` holds.
    """
    if method not in QUICKSTART_CHOICES:
        raise ValueError(f"method is {method!r}; expected one of: {', '.join(QUICKSTART_CHOICES)}.")
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)  # an unwritable place is found before any compute is spent
    clock = Stopwatch()
    world = make_world(seed)
    data = world_data(world)
    recipe = LabRecipe(**{**QUICKSTART_RECIPE.__dict__, "seed": seed})
    with clock("train_target"):
        target = train_target(data, recipe, use_cache=use_cache)
    with clock("train_reference"):
        reference = train_retain_only(data, recipe, use_cache=use_cache)
    if method == "edit":
        from .edit_quickstart import run_edit_quickstart

        return run_edit_quickstart(folder, world, target, reference, clock, seed=seed)
    scores: dict[str, TofuScores] = {}
    with clock("evaluate"):
        scores["target"] = score_lab_model(target.model, target, data, "target")
        scores["reference"] = score_lab_model(reference.model, reference, data, "reference")
    with clock("unlearn"):
        run = run_method(QUICKSTART_METHODS[method], target.model, target.tokenizer, data, seed=seed)
    with clock("evaluate"):
        scores["unlearned"] = score_lab_model(run.model, target, data, "unlearned")
    clock.seconds["total"] = time.perf_counter() - clock.started
    results = build_results(run, scores, data, seconds=clock.seconds, seed=seed, model_name=describe(target))
    write_run(folder, run, results)
    return results


def score_lab_model(model: Any, lab: LabModel, data: LabData, name: str) -> TofuScores:
    """TOFU's scores of a model of the quickstart, with the tokenizer of `lab`; `name` is for the progress bars."""
    return score_model(
        model, lab.tokenizer, data, retain_limit=RETAIN_ROWS, max_new_tokens=48, description=f"evaluating {name}:"
    )


def describe(lab: LabModel) -> str:
    """A model in words, for reports."""
    config = lab.model.config
    return (
        f"{type(lab.model).__name__}, {lab.model.num_parameters() / 1e6:.1f} M parameters, "
        f"{config.num_hidden_layers} layers, width {config.hidden_size}, {config.vocab_size} tokens"
    )


def build_results(
    run: MethodRun,
    scores: dict[str, TofuScores],
    data: LabData,
    *,
    seconds: dict[str, float],
    seed: int,
    model_name: str,
) -> Results:
    """Everything that a report needs, from the scores of `target`, `unlearned` and `reference`."""
    reference, unlearned = scores["reference"], scores["unlearned"]
    flat: dict[str, dict[str, Any]] = {name: dict(score.summary()) for name, score in scores.items()}
    for name in scores:  # the reference against itself is 0.5, what the others should be
        flat[name]["mia_auc"] = scores[name].mia_auc_against(reference)
    trainer = run.trainer
    return Results.from_dict(
        {
            "method": type(trainer).__name__,
            **flat,
            "forget_quality": unlearned.forget_quality_against(reference),
            "forget_quality_log10": unlearned.forget_quality_log10_against(reference),
            "constraints": run.constraints,
            "seconds": seconds,
            "versions": library_versions(),
            "settings": _settings(trainer),
            "seed": seed,
            "generations": generations(scores, data),
            "history": run.history,
            "truth_ratios": {name: score.parts["forget"].truth_ratio for name, score in scores.items()},
            "forget_level": None if trainer.target is None else trainer.target.level,
            "model": model_name,
            "dataset": data.name,
        }
    )


def _settings(trainer: Any) -> dict[str, Any]:
    names = ["forget_loss", "retain_loss", "learning_rate", "num_train_epochs", "per_device_train_batch_size", "bf16"]
    names += [
        name
        for name in vars(trainer.args)
        if name.startswith(("dual_", "forget_target", "probe", "sam_", "gradient_proj"))
    ]
    names += [name for name in ("retain_eps", "retain_tolerance", "retain_margin") if hasattr(trainer.args, name)]
    return {name: getattr(trainer.args, name) for name in names}


def generations(scores: dict[str, TofuScores], data: LabData) -> list[dict[str, Any]]:
    """A few questions of each part with the answers of the three models side by side."""
    from ..metrics.runner import evenly_spaced

    shown: list[dict[str, Any]] = []
    for part, rows in (("forget", data.forget_eval), ("retain", data.retain_eval)):
        answered = scores["target"].parts[part].generations or []
        picked = evenly_spaced(len(rows), len(answered)) if answered else []
        for position in evenly_spaced(len(answered), SHOWN_PER_PART) if answered else []:
            row = rows[picked[position]]
            texts = {name: (score.parts[part].generations or [])[position] for name, score in scores.items()}
            shown.append({"question": row["question"], "answer": row["answer"], "part": part, **texts})
    return shown


def write_run(folder: Path, run: MethodRun, results: Results) -> None:
    """Writes the model with its card, `results.json`, the plots and the page."""
    from ..reports import markdown_table
    from ..trainers.model_card import write_model_card

    run.trainer.save_model(str(folder / "model"))
    write_model_card(
        run.trainer,
        model_name=f"{results.dataset} after {results.method}",
        dataset_name=None,
        tags=("hf_unlearn", "unlearning", run.trainer.method),
        results_table=markdown_table(results),
        folder=folder / "model",
    )
    save_plots(
        results.history,
        results.constraints,
        folder / "plots",
        forget_level=results.forget_level,
        truth_ratios=results.truth_ratios,
    )
    write_results(folder / "results.json", results)
    write_report(folder / "report.html", results)
