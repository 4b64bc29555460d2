"""TOFU (arXiv 2401.06121) on a model: every metric with its uncertainty, on one process or many, resumable."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ..metrics.scores import FORGET, RETAIN, PartScores, TofuScores
from ..reports.eval_rows import EvalRows, Limits
from ..reports.eval_spread import from_main, on_all
from ..reports.versions import library_versions
from .record import Evaluation
from .session import Session
from .tofu_files import DETAILS_FILE, EXAMPLES_FILE, SCORES_FILE, TofuEvaluation
from .tofu_metrics import tofu_metrics
from .tofu_scoring import (
    HOLDOUT,
    MIN_K,
    ReferenceLike,
    examples_of,
    forget_details,
    part_answers,
    part_losses,
    prepare,
    split_limits,
)
from .values import check_counts, how_scored, name_of

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def run_tofu(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    forget: Dataset | Sequence[Mapping[str, Any]],
    retain: Dataset | Sequence[Mapping[str, Any]],
    general: Mapping[str, Dataset | Sequence[Mapping[str, Any]]] | None = None,
    holdout: Dataset | Sequence[Mapping[str, Any]] | None = None,
    reference: ReferenceLike | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    model_name: str = "",
    limits: Limits = None,
    generate: bool = True,
    max_new_tokens: int = 200,
    batch_size: int = 32,
    max_length: int = 1024,
    resamples: int = 1000,
    seed: int = 0,
    accelerator: Any = None,
    settings: Mapping[str, Any] | None = None,
    description: str | None = None,
) -> TofuEvaluation:
    """
    Evaluates a model on TOFU: the metrics of [`tofu_metrics`], each with n, standard error and interval, and for each
    that cannot be computed the reason.

    The definitions are those of [`evaluate_tofu`]; scoring is that of [`Session`]: shared by the processes, and with
    an `output_dir` resumable, part by part. All input is checked before anything is computed.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            Causal language model, on its device.
        tokenizer (`PreTrainedTokenizerBase`):
            Its tokenizer.
        forget (`Dataset` or `Sequence[Mapping]`):
            Rows of [`evaluate_part`]; TOFU's `forget10_perturbed`.
        retain (`Dataset` or `Sequence[Mapping]`):
            TOFU's `retain_perturbed`.
        general (`Mapping[str, Dataset]`, *optional*):
            TOFU's `real_authors_perturbed` and `world_facts_perturbed` under `"real_authors"` and `"world_facts"`.
            Without them there is no model utility. Parts of other names take their place.
        holdout (`Dataset` or `Sequence[Mapping]`, *optional*):
            Rows with `question` and `answer` like the forget rows that no model was trained on, for membership
            inference.
        reference (`str`, `os.PathLike`, [`TofuReference`], [`TofuScores`] or [`TofuEvaluation`], *optional*):
            A retain-only model's evaluation on the same forget rows, or on all of them where `limits` choose some: the
            folder of its evaluation, its scores.json, or what was read from there. For forget quality, PrivLeak and
            the privacy score.
        output_dir (`str` or `os.PathLike`, *optional*):
            Gets evaluation.json, scores.json, details.json, examples.json, and finished pieces while it runs. This is
            what `reference` reads.
        model_name (`str`, *optional*):
            For the record. Default: the name in the model's config.
        limits (`int` or `Mapping[str, int | None]`, *optional*):
            Rows of each part, evenly spaced; by name, parts that are not named are scored whole. `"holdout"` is one.
        generate (`bool`, *optional*, defaults to `True`):
            Whether answers are generated; without them there is no ROUGE, model utility and fluency.
        max_new_tokens (`int`, *optional*, defaults to `200`):
            Longest generated answer in tokens.
        batch_size (`int`, *optional*, defaults to `32`):
            Texts in a forward pass of a process; twice as many prompts are answered at once. Changes no score.
        max_length (`int`, *optional*, defaults to `1024`):
            Tokens after which texts are cut, with a warning.
        resamples, seed (`int`, *optional*, default to `1000` and `0`):
            Of the bootstrap.
        accelerator (`Accelerator`, *optional*):
            As in [`Session`].
        settings (`Mapping[str, Any]`, *optional*):
            What else belongs on record: paths, names of splits.
        description (`str`, *optional*):
            Text in front of the progress bars; no bars without it.

    Returns:
        [`TofuEvaluation`]: the same on every process; the first one has written it to `output_dir`.

    Raises:
        TypeError, ValueError: before anything is computed: bad rows, an `index` that is there twice, limits of no
            part, a reference of other forget rows, texts that do not fit, answers from sharded weights. Later: a
            model that gives NaN.
        FileNotFoundError: `reference` is a path without scores.
        OSError: `output_dir` cannot be written; before anything is computed where that shows, and what is finished is
            kept.
    """
    clock = _Clock()
    check_counts(max_new_tokens=max_new_tokens, max_length=max_length, batch_size=batch_size)
    if resamples < 2 or seed < 0:
        raise ValueError(f"resamples is {resamples} and seed {seed}; expected at least 2 and 0.")
    taken = sorted({FORGET, RETAIN, HOLDOUT} & set(general or {}))
    if taken:
        raise ValueError(f"general has a part named {taken[0]!r}; expected other names, as 'real_authors'.")
    by_part, holdout_limit = split_limits(limits, [FORGET, RETAIN, *(general or {})], holdout is not None)
    rows = EvalRows({FORGET: forget, RETAIN: retain, **(general or {})}, by_part)
    given = prepare(
        model,
        tokenizer,
        rows,
        holdout=holdout,
        holdout_limit=holdout_limit,
        reference=reference,
        max_length=max_length,
        max_new_tokens=max_new_tokens if generate else 0,
    )

    session = Session(
        model,
        tokenizer,
        output_dir=output_dir,
        accelerator=accelerator,
        batch_size=batch_size,
        description=description,
    )
    if generate and session.sharded:
        raise ValueError(
            "generate=True needs whole weights on every process, but the model's are sharded (ZeRO-3, FSDP). Save the "
            "model and load it with from_pretrained, or pass generate=False."
        )
    clock.lap("loading")
    parts: dict[str, PartScores] = {}
    losses = part_losses(session, rows, given.encoded)
    clock.lap("likelihoods")
    details = None
    if not session.sharded:
        details = forget_details(session, rows, given.encoded, given.others, given.other_texts)
        clock.lap("token scores")
    for name, answers in part_answers(session, rows, given.encoded, max_new_tokens if generate else None):
        parts[name] = rows.parts[name].scores(losses[name], answers)
    clock.lap("answers")
    scores = TofuScores(parts=parts)
    # resampling is the same everywhere, and so need not be done everywhere
    compute = partial(tofu_metrics, scores, details, given.compared, resamples=resamples, seed=seed)
    metrics, absent = from_main(on_all(compute if session.is_main else _nothing, session.processes), session.processes)
    if session.hash_obstacle:
        absent = {**absent, "model_hash": session.hash_obstacle}
    clock.lap("bootstrap")
    evaluation = Evaluation(
        benchmark="tofu",
        model=model_name or name_of(session.model),
        model_hash=session.model_hash,
        metrics=metrics,
        absent=absent,
        settings={
            **(settings or {}),
            "parts": {name: len(part.rows) for name, part in rows.parts.items()} | {HOLDOUT: len(given.others)},
            "fingerprints": {name: part.fingerprint for name, part in parts.items()},
            "limits": limits,
            **given.on_record(),
            "generate": generate,
            "max_new_tokens": max_new_tokens,
            "max_length": max_length,
            "chat_template": bool(tokenizer.chat_template),
            "min_k_share": MIN_K,
            "resamples": resamples,
            "seed": seed,
            **how_scored(session),
        },
        versions=library_versions(),
        seconds=from_main(clock.seconds(), session.processes),
        rows={"scores": SCORES_FILE, "examples": EXAMPLES_FILE}
        | ({} if details is None else {"details": DETAILS_FILE}),
    )
    result = TofuEvaluation(evaluation=evaluation, scores=scores, details=details, examples=examples_of(rows, parts))
    if output_dir is not None:
        on_all(partial(result.save, output_dir) if session.is_main else _nothing, session.processes)
    return result


class _Clock:
    """Seconds of the phases of an evaluation."""

    def __init__(self) -> None:
        self.started = self.last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        """The time since the last call is that of a phase."""
        now = time.perf_counter()
        self.laps[phase], self.last = now - self.last, now

    def seconds(self) -> dict[str, float]:
        """By phase, with "total"."""
        return {**self.laps, "total": time.perf_counter() - self.started}


def _nothing() -> Any:
    """What a process does that leaves the work to the first one."""
