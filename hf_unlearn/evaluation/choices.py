"""Multiple choice (WMDP, MMLU, any file of questions) on a model, with uncertainty and a record of how."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..data.multiple_choice_files import LETTERS, ChoiceRow
from ..metrics.generate import padding_id
from ..metrics.harness import evaluate_with_harness
from ..metrics.multiple_choice import ChoiceScores, encode_rows, letter_log_probs, scores_of_rows
from ..metrics.runner import evenly_spaced
from ..reports.versions import library_versions
from .record import Evaluation, MetricValue
from .session import Session
from .values import (
    RESAMPLES,
    SEED,
    check_positions,
    check_whole,
    how_scored,
    mean_metric,
    name_of,
    positions_of,
    save_rows,
    text_digest,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ChoiceBenchmark = Literal["wmdp", "mmlu", "multiple_choice"]
# a subject's name becomes a part of a metric's
_NO_WORD = re.compile(r"[^0-9A-Za-z]+")


def run_choices(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[ChoiceRow],
    *,
    benchmark: ChoiceBenchmark = "multiple_choice",
    model_name: str = "",
    chat_template: bool = False,
    limit: int | None = None,
    batch_size: int = 32,
    max_length: int | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    accelerator: Any = None,
    settings: Mapping[str, Any] | None = None,
    description: str | None = None,
) -> Evaluation:
    """
    Accuracy over the letters, overall and by subject ([`evaluate_multiple_choice`]), on one process or many.

    Metrics: `accuracy`, `accuracy_<subject>` where there are several subjects, `letter_mass` (mean probability of all
    letters together), `ties` (share of rows with several likeliest letters, of which the first counts) and `chance`
    (what guessing gives).

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            Causal language model, on its device.
        tokenizer (`PreTrainedTokenizerBase`):
            Its tokenizer.
        rows (`Sequence[ChoiceRow]`):
            n questions ([`load_multiple_choice`]).
        benchmark (`Literal["wmdp", "mmlu", "multiple_choice"]`, *optional*, defaults to `"multiple_choice"`):
            What they are: decides whether a high accuracy is good (MMLU), or near chance is (WMDP).
        model_name (`str`, *optional*):
            Name or path, for the record. Default: the name in the model's config.
        chat_template (`bool`, *optional*, defaults to `False`):
            Ask in a user's turn of the chat template; published numbers are without.
        limit (`int`, *optional*):
            Only so many rows, evenly spaced.
        batch_size, output_dir, accelerator, description:
            As in [`Session`]. With an `output_dir` the evaluation and `choices.jsonl` (without the questions) are
            written there.
        max_length (`int`, *optional*):
            Longest prompt in tokens; longer ones lose their beginning, with a warning.
        settings (`Mapping[str, Any]`, *optional*):
            What else belongs on record: paths, for example.

    Raises:
        ValueError, TypeError: the reasons of [`evaluate_multiple_choice`], sharded weights, or a prompt that does not
            fit into the model; but for NaN before anything is computed.
        OSError: `output_dir` cannot be written.
    """
    started = time.perf_counter()
    chosen = [rows[number] for number in evenly_spaced(len(rows), limit)]
    encoded = encode_rows(chosen, tokenizer, chat_template=chat_template, max_length=max_length)
    check_positions(
        model, max(len(ids) for ids, _ in encoded), f"a question. Set max_length to at most {positions_of(model)}"
    )
    session = Session(
        model,
        tokenizer,
        output_dir=output_dir,
        accelerator=accelerator,
        batch_size=batch_size,
        description=description,
    )
    check_whole(session, "Multiple choice")
    pad = padding_id(tokenizer)

    def score(items: list[Any], text: str | None) -> list[Any]:
        found = letter_log_probs(session.model, items, pad_token_id=pad, batch_size=batch_size, description=text)
        return [values.tolist() for values in found]

    log_probs = session.map(
        "choices",
        [[ids, letters] for ids, letters in encoded],
        score,
        lengths=[len(ids) for ids, _ in encoded],
        settings={"kind": "letters"},
    )
    scores = scores_of_rows(chosen, [np.asarray(values, dtype=np.float64) for values in log_probs])
    found = Evaluation(
        benchmark=benchmark,
        model=model_name or name_of(session.model),
        model_hash=session.model_hash,
        metrics=choice_metrics(scores, benchmark),
        absent={} if session.hash_obstacle is None else {"model_hash": session.hash_obstacle},
        settings={
            **(settings or {}),
            "rows": len(chosen),
            "rows_digest": text_digest([[row.question, row.choices, row.answer] for row in chosen]),
            "chat_template": chat_template,
            "limit": limit,
            "max_length": max_length,
            "scorer": "built-in",
            "resamples": RESAMPLES,
            "seed": SEED,
            **how_scored(session),
        },
        versions=library_versions(),
        seconds={"total": time.perf_counter() - started},
        rows={} if output_dir is None else {"choices": "choices.jsonl"},
    )
    save_rows(session, found, output_dir, {"choices": _lines(chosen, scores)})
    return found


def choice_metrics(scores: ChoiceScores, benchmark: ChoiceBenchmark) -> dict[str, MetricValue]:
    """The metrics of [`run_choices`] from the scores of single rows."""
    # to lose hazardous knowledge is to guess: lower than chance is not better
    better = True if benchmark == "mmlu" else None
    right = scores.correct.astype(np.float64)
    tied = (scores.log_probs == scores.log_probs.max(axis=1, keepdims=True)).sum(axis=1) > 1
    found = {
        "accuracy": mean_metric(right, higher_is_better=better),
        "letter_mass": mean_metric(scores.letter_mass),
        "ties": mean_metric(tied.astype(np.float64), higher_is_better=False),
        "chance": MetricValue(value=float((1 / scores.counts).mean()), n=len(right)),
    }
    names = np.asarray(scores.subjects)
    subjects = sorted(set(scores.subjects))
    if len(subjects) > 1:
        labels = _subject_names(subjects)
        for subject in subjects:
            found[f"accuracy_{labels[subject]}"] = mean_metric(right[names == subject], higher_is_better=better)
    return found


def run_harness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    benchmark: ChoiceBenchmark,
    model_name: str = "",
    chat_template: bool = False,
    limit: int | None = None,
    batch_size: int = 32,
    output_dir: str | os.PathLike[str] | None = None,
) -> Evaluation:
    """
    The same evaluation from lm-evaluation-harness's own tasks ([`evaluate_with_harness`]), in one process: `accuracy`
    of the first task or group, and `accuracy_<task>` of all. The harness keeps no pieces: a stopped run starts again.

    Args:
        model, tokenizer, benchmark, model_name, chat_template:
            As in [`run_choices`].
        tasks (`Sequence[str]`):
            Its names, such as `["wmdp"]`.
        limit (`int`, *optional*):
            The first so many rows of each task.
        batch_size (`int`, *optional*, defaults to `32`):
            Requests in a forward pass.
        output_dir (`str` or `os.PathLike`, *optional*):
            Receives evaluation.json.

    Raises:
        ImportError: the harness is not installed.
        ValueError: no tasks, or none with an accuracy.
        OSError: `output_dir` cannot be written.
    """
    started = time.perf_counter()
    session = Session(model, tokenizer, output_dir=output_dir)
    scores = evaluate_with_harness(
        session.model, tokenizer, tasks, batch_size=batch_size, limit=limit, chat_template=chat_template
    )
    better = True if benchmark == "mmlu" else None
    metrics = {}
    for name, one in scores.items():
        value = MetricValue(value=one.value, n=one.n, standard_error=one.standard_error, higher_is_better=better)
        metrics[f"accuracy_{_NO_WORD.sub('_', name)}"] = value
        if name == tasks[0]:
            metrics = {"accuracy": value, **metrics}
    found = Evaluation(
        benchmark=benchmark,
        model=model_name or name_of(session.model),
        model_hash=session.model_hash,
        metrics=metrics,
        absent={} if "accuracy" in metrics else {"accuracy": f"the harness reports none for {tasks[0]}"},
        settings={
            "tasks": list(tasks),
            "chat_template": chat_template,
            "limit": limit,
            **how_scored(session),
            "batch_size": batch_size,
            "scorer": "lm-evaluation-harness",
        },
        versions={**library_versions(), "lm_eval": _harness_version()},
        seconds={"total": time.perf_counter() - started},
    )
    if output_dir is not None:
        found.save(output_dir)
    return found


def _harness_version() -> str:
    from importlib import metadata

    try:
        return metadata.version("lm_eval")
    except metadata.PackageNotFoundError:
        return "unknown"


def _subject_names(subjects: Sequence[str]) -> dict[str, str]:
    """A part of a metric's name for each subject: words joined by underscores, distinct."""
    found: dict[str, str] = {}
    for subject in subjects:
        base = _NO_WORD.sub("_", subject).strip("_").lower() or "without_subject"
        name, number = base, 2
        while name in found.values():
            name, number = f"{base}_{number}", number + 1
        found[subject] = name
    return found


def _lines(rows: Sequence[ChoiceRow], scores: ChoiceScores) -> list[Mapping[str, Any]]:
    """One row each: no question, which may be hazardous, but its digest."""
    predictions = scores.predictions.tolist()
    return [
        {
            "row": number,
            "digest": text_digest([row.question, row.choices]),
            "subject": row.subject,
            "answer": LETTERS[row.answer],
            "prediction": LETTERS[predictions[number]],
            "log_probs": scores.log_probs[number, : len(row.choices)].tolist(),
        }
        for number, row in enumerate(rows)
    ]
