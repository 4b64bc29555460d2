"""Compares methods on one target and one reference: resumable, one JSON file a run, one table at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..attacks import RelearnConfig, relearn
from ..data import tokenize_example
from ..metrics.functional import harmonic_mean
from ..metrics.scores import TofuScores
from .evaluate import score_model
from .finished import BenchRow, load_run, other_runs, save_run, write_json
from .memory import PeakMemory
from .methods import LabMethod, run_method
from .quickstart import describe
from .recipe import LabData, LabRecipe
from .training import LabModel, model_path, train_retain_only, train_target

COLUMNS: tuple[tuple[str, str], ...] = (
    ("forget_probability", "forget prob."),
    ("forget_rouge", "forget ROUGE"),
    ("forget_paraphrased_question_probability", "paraphrased"),
    ("forget_truth_ratio", "truth ratio"),
    ("forget_quality", "forget quality"),
    ("mia_auc", "MIA AUC"),
    ("retain_probability", "retain prob."),
    ("retain_rouge", "retain ROUGE"),
    ("real_authors_plain_probability", "real authors"),
    ("world_facts_plain_probability", "world facts"),
    ("model_utility", "utility"),
    ("score", "score"),
    ("seconds", "seconds"),
    ("peak_mib", "peak MiB"),
)
# What is read first, where a terminal has no room for all.
HEADLINES = frozenset(
    ("forget_probability", "forget_quality", "mia_auc", "retain_probability", "model_utility", "score")
)


def run_bench(
    data: LabData,
    methods: Sequence[LabMethod],
    output_dir: str | Path,
    *,
    recipe: LabRecipe | None = None,
    seeds: Sequence[int] = (0,),
    max_new_tokens: int = 200,
    retain_limit: int | None = None,
    relearning: Sequence[RelearnConfig] = (),
    report: Callable[[str], None] = print,
) -> list[BenchRow]:
    """
    Trains (or loads) target and reference, runs every method with every seed, and writes `table.md` and `table.json`.

    A run that is complete in `output_dir/runs/` is not repeated, so the bench resumes where it was stopped; the table
    has those of earlier calls, too.

    Args:
        data ([`LabData`]):
            The world.
        methods (`Sequence[LabMethod]`):
            What to compare.
        output_dir (`str` or `Path`):
            Receives `runs/*.json`, `scores/*.json`, `table.md`, `table.json` and, with relearning, `relearning.png`.
        recipe ([`LabRecipe`], *optional*):
            Of target and reference.
        seeds (`Sequence[int]`, *optional*, defaults to `(0,)`):
            Seeds of the unlearning runs; target and reference are the same for all.
        max_new_tokens (`int`, *optional*, defaults to `200`):
            Longest generated answer.
        retain_limit (`int`, *optional*):
            Score only so many retain rows.
        relearning (`Sequence[RelearnConfig]`, *optional*):
            For each, also fine-tune a copy of every model on a part of the forget rows, and measure the other part.
            The reference is the control.
        report (`Callable`, *optional*):
            Gets a line after each run.

    Raises:
        ValueError: a complete run in `output_dir` is of other models, other scoring or other arguments.
    """
    from transformers import AutoModelForCausalLM

    recipe = recipe or LabRecipe()
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {"retain_limit": retain_limit, "max_new_tokens": max_new_tokens}
    rows: list[BenchRow] = []
    anchors: dict[str, TofuScores] = {}
    settings: dict[str, Any] = {
        "target": model_path(data, recipe, with_forget=True).name,
        "reference": model_path(data, recipe, with_forget=False).name,
        **options,
        "relearning": [asdict(attacker) for attacker in relearning],
    }
    runs = [(method, seed, folder / "runs" / f"{method.name}-seed{seed}.json") for seed in seeds for method in methods]
    finished = {  # what does not fit is refused before anything is trained
        file: load_run(file, settings, method.arguments) for method, _, file in runs if file.is_file()
    }
    lab: LabModel | None = None
    for name, train in (("target", train_target), ("reference", train_retain_only)):
        started = time.perf_counter()
        with PeakMemory() as memory:
            trained = train(data, recipe)
        seconds = 0.0 if trained.from_cache else time.perf_counter() - started
        cache = folder / "scores" / f"{trained.path.name}-{retain_limit or 'all'}-{max_new_tokens}.json"
        anchors[name] = score_model(
            trained.model, trained.tokenizer, data, cache=cache, description=f"evaluating {name}:", **options
        )
        extra = {} if trained.from_cache else {"seconds": seconds, "peak_mib": memory.bytes / 2**20}
        if name == "reference":
            extra |= recovery(trained.model, trained.tokenizer, data, relearning)
        rows.append(_row(name, f"{name} ({describe(trained)})", None, anchors[name], anchors, extra))
        report(_line(rows[-1]))
        lab = trained if name == "target" else lab
    assert lab is not None, "the target is one of the two"
    for method, seed, file in runs:
        if file not in finished:
            model = AutoModelForCausalLM.from_pretrained(lab.path)
            run = run_method(method, model, lab.tokenizer, data, seed=seed, bf16=recipe.bf16)
            scores = score_model(run.model, lab.tokenizer, data, description=f"evaluating {method.label}:", **options)
            extra = {"seconds": run.seconds, "peak_mib": run.peak_bytes / 2**20}
            extra |= recovery(run.model, lab.tokenizer, data, relearning)
            row = _row(method.name, method.label, seed, scores, anchors, extra)
            row = BenchRow(**{**row.__dict__, "constraints": run.constraints, "arguments": dict(method.arguments)})
            save_run(file, row, settings, run.history)
            finished[file] = load_run(file, settings, method.arguments)
        rows.append(finished[file])
        report(_line(rows[-1]))
    rows += other_runs(folder / "runs", settings, [file for *_, file in runs])
    write_tables(folder, rows)
    return rows


def recovery(model: Any, tokenizer: Any, data: LabData, attackers: Sequence[RelearnConfig]) -> dict[str, float]:
    """
    Probability of the forget rows that a relearning attacker never showed, as `recovery_<percent shown>_<steps>`.
    """
    from ..trainers.frozen_copy import independent_copy

    rows = [tokenize_example({"question": row["question"], "answer": row["answer"]}, tokenizer) for row in data.forget]
    found = {}
    for config in attackers:
        percent = f"{100 * config.fraction:g}"
        result = relearn(
            independent_copy(model),
            rows,
            pad_token_id=tokenizer.pad_token_id,
            config=config,
            description=f"relearning from {percent}%",
        )
        for step, value in zip(result.steps, result.unseen, strict=True):
            found[f"recovery_{percent}_{step}"] = value
    return found


def recovery_columns(rows: Sequence[BenchRow]) -> list[tuple[str, str]]:
    """Columns for what [`recovery`] has found in any of the rows, by share shown and steps."""
    keys = {tuple(key.split("_")[1:]) for row in rows for key in row.values if key.startswith("recovery_")}
    ordered = sorted(keys, key=lambda key: (float(key[0]), int(key[1])))
    return [(f"recovery_{percent}_{step}", f"{percent}% shown, {step} steps") for percent, step in ordered]


def _row(
    name: str,
    label: str,
    seed: int | None,
    scores: TofuScores,
    anchors: Mapping[str, TofuScores],
    extra: Mapping[str, float],
) -> BenchRow:
    values: dict[str, float] = dict(scores.summary())
    reference = anchors.get("reference", scores if name == "reference" else None)
    if reference is not None:
        values["forget_quality"] = scores.forget_quality_against(reference)
        values["mia_auc"] = scores.mia_auc_against(reference)
    kept = values["retain_probability"] / anchors["target"].summary()["retain_probability"]
    forgotten = [1 - values["forget_probability"], 1 - values["forget_rouge"]]
    values["score"] = harmonic_mean([min(kept, 1.0), *forgotten])
    return BenchRow(name=name, label=label, seed=seed, values={**values, **extra})


def _line(row: BenchRow) -> str:
    shown = ("forget_probability", "forget_quality", "retain_probability", "score", "seconds")
    numbers = [f"{key.replace('_', ' ')} {row.values[key]:.4g}" for key in shown if key in row.values]
    seed = "" if row.seed is None else f" (seed {row.seed})"
    return f"{row.label}{seed}: " + ", ".join(numbers)


def write_tables(folder: Path, rows: Sequence[BenchRow]) -> None:
    """Writes all rows to `table.json`, a Markdown table to `table.md`, and relearning curves to `relearning.png`."""
    from ..reports.recovery_plot import save_recovery_plot

    write_json(folder / "table.json", [asdict(row) for row in rows])
    (folder / "table.md").write_text(markdown(rows), encoding="utf-8")
    save_recovery_plot([folder / "table.json"], folder / "relearning.png")


def table_cells(rows: Sequence[BenchRow], keys: Collection[str] | None = None) -> tuple[list[str], list[list[str]]]:
    """Titles, and the cells of each row: of all columns, or those in `keys`. Below .001 in scientific notation."""
    columns = [(key, title) for key, title in COLUMNS if any(key in row.values for row in rows)]
    columns += recovery_columns(rows)
    columns = [(key, title) for key, title in columns if keys is None or key in keys]
    cells = [
        [row.label, "" if row.seed is None else str(row.seed), *(_number(row.values.get(key)) for key, _ in columns)]
        for row in rows
    ]
    return ["method", "seed", *(title for _, title in columns)], cells


def markdown(rows: Sequence[BenchRow]) -> str:
    """The rows as a Markdown table of all columns."""
    titles, cells = table_cells(rows)
    lines = [titles, ["---"] * len(titles), *cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    if abs(value) >= 100:
        return f"{value:.0f}"
    if value and abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:.3f}"
