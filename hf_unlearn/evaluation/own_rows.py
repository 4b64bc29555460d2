"""A user's own question-answer rows on a model: TOFU's metrics, as far as the rows have the columns for them.

Shapes: n rows of a part.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.own_rows import OwnRows, name_taken
from ..metrics.parts import TofuPart, checked_rows, evenly_spaced
from ..metrics.scores import FORGET, RETAIN, PartScores, TofuScores
from ..reports.eval_rows import EvalRows
from ..reports.versions import library_versions
from .record import Evaluation, MetricValue
from .session import Session
from .tofu_files import DETAILS_FILE, EXAMPLES_FILE, SCORES_FILE, ForgetDetails, TofuEvaluation, TofuReference
from .tofu_metrics import GENERAL, Findings, part_metrics, tofu_metrics
from .tofu_scoring import (
    MIN_K,
    ReferenceLike,
    examples_of,
    forget_details,
    part_answers,
    part_losses,
    prepare,
)
from .values import RESAMPLES, SEED, check_counts, check_whole, how_scored, name_of, save_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROWS_FILE = "rows.jsonl"
_ALONE = "the rows have no {} part, and TOFU's comparisons need a forget and a retain part"


@dataclass(frozen=True, kw_only=True, eq=False)
class RowsEvaluation:
    """
    What a user's own rows say of one model.

    Args:
        evaluation ([`Evaluation`]): metrics with uncertainty, and the record.
        parts (`Mapping[str, PartScores]`): scores of single rows, by part.
        tofu ([`TofuEvaluation`], *optional*):
            The same as what a reference or a report is made of; None unless there are forget and retain rows.
    """

    evaluation: Evaluation
    parts: Mapping[str, PartScores]
    tofu: TofuEvaluation | None


def run_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    parts: OwnRows,
    *,
    holdout: Any = None,
    reference: ReferenceLike | None = None,
    model_name: str = "",
    limit: int | None = None,
    generate: bool = True,
    max_new_tokens: int = 200,
    batch_size: int = 32,
    max_length: int = 1024,
    output_dir: str | os.PathLike[str] | None = None,
    accelerator: Any = None,
    settings: Mapping[str, Any] | None = None,
    description: str | None = None,
) -> RowsEvaluation:
    """
    The metrics of [`run_tofu`] that the rows allow, by part; the others are absent with their reason.

    Every part has `<part>_probability` (never normalised), `<part>_rouge` with generated answers, and
    `<part>_truth_ratio` where its rows have `perturbed_answer`: mean of min(TR, 1/TR) for the forget part, of
    max(0, 1 - TR) for all others. With a forget and a retain part there are memorisation, membership inference, forget
    quality against a `reference`, and the aggregates, too; model utility is then the harmonic mean over all parts but
    the forget part, and needs one beside retain.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            Causal language model, on its device, with whole weights.
        tokenizer (`PreTrainedTokenizerBase`):
            Its tokenizer.
        parts (`dict[str, list[dict]]`):
            Rows by part ([`load_own_rows`]).
        holdout (`Dataset` or `Sequence[Mapping]`, *optional*):
            Rows with `question` and `answer` that no model was trained on, for membership inference.
        reference (`str`, `os.PathLike`, [`TofuReference`], [`TofuScores`] or [`TofuEvaluation`], *optional*):
            A retain-only model's evaluation on the same rows.
        limit (`int`, *optional*):
            Only so many rows of each part, evenly spaced.
        generate, max_new_tokens, batch_size, max_length, accelerator, settings, model_name, description:
            As in [`run_tofu`].
        output_dir (`str` or `os.PathLike`, *optional*):
            Receives evaluation.json and rows.jsonl (the scores of single rows, with their `index`), and with a forget
            and a retain part the scores.json that `reference` reads.

    Raises:
        ValueError: sharded weights, a reference or holdout rows without forget and retain parts, or any reason of
            [`run_tofu`].
        OSError: `output_dir` cannot be written.
    """
    started = time.perf_counter()
    check_counts(max_new_tokens=max_new_tokens, max_length=max_length, batch_size=batch_size)
    check_parts(parts, reference=reference, holdout=holdout)
    whole = {FORGET, RETAIN} <= set(parts)
    rows = OwnEvalRows(parts, limit)
    given = prepare(
        model,
        tokenizer,
        rows,
        holdout=holdout,
        holdout_limit=limit,
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
    check_whole(session, "An evaluation on your own rows")
    losses = part_losses(session, rows, given.encoded)
    details = (
        forget_details(session, rows, given.encoded, given.others, given.other_texts) if FORGET in parts else None
    )
    scores = {
        name: rows.parts[name].scores(losses[name], answers)
        for name, answers in part_answers(session, rows, given.encoded, max_new_tokens if generate else None)
    }
    metrics, absent = rows_metrics(scores, details, given.compared)
    if session.hash_obstacle is not None:
        absent["model_hash"] = session.hash_obstacle
    files = {"rows": ROWS_FILE}
    if whole:
        files |= {"scores": SCORES_FILE, "details": DETAILS_FILE, "examples": EXAMPLES_FILE}
    evaluation = Evaluation(
        benchmark="rows",
        model=model_name or name_of(session.model),
        model_hash=session.model_hash,
        metrics=metrics,
        absent=absent,
        settings={
            **(settings or {}),
            "parts": {name: len(part.rows) for name, part in rows.parts.items()} | {"holdout": len(given.others)},
            "fingerprints": {name: part.fingerprint for name, part in scores.items()},
            **given.on_record(),
            "limit": limit,
            "generate": generate,
            "max_new_tokens": max_new_tokens,
            "max_length": max_length,
            "chat_template": bool(tokenizer.chat_template),
            "min_k_share": MIN_K,
            "resamples": RESAMPLES,
            "seed": SEED,
            **how_scored(session),
        },
        versions=library_versions(),
        seconds={"total": time.perf_counter() - started},
        rows={} if output_dir is None else files,
    )
    tofu = None
    if whole:
        tofu = TofuEvaluation(
            evaluation=evaluation,
            scores=TofuScores(parts=scores),
            details=details,
            examples=examples_of(rows, scores),
        )
    lines = list(_lines(parts, limit, scores, details))
    save_rows(session, evaluation, output_dir, {"rows": lines}, also=None if tofu is None else tofu.save)
    return RowsEvaluation(evaluation=evaluation, parts=scores, tofu=tofu)


def check_parts(parts: OwnRows, *, reference: Any, holdout: Any) -> None:
    """
    Refuses what cannot be compared for want of a part.

    Raises:
        ValueError: a reference or holdout rows, and no forget or no retain part.
    """
    if {FORGET, RETAIN} <= set(parts):
        return
    alone = _ALONE.format("forget" if FORGET not in parts else "retain")
    for name, given in (("reference", reference), ("holdout", holdout)):
        if given is not None:
            raise ValueError(f"{name} is given, but {alone}. Add the part, or leave {name} out.")


def rows_metrics(
    parts: Mapping[str, PartScores], details: ForgetDetails | None, reference: TofuReference | None = None
) -> tuple[dict[str, MetricValue], dict[str, str]]:
    """
    The metrics of [`run_rows`] from the scores of single rows, and the reasons of those that are absent.

    Args:
        parts (`Mapping[str, PartScores]`):
            By name.
        details ([`ForgetDetails`], *optional*):
            Of the forget rows.
        reference ([`TofuReference`], *optional*):
            Of the retain-only model, on the same forget rows.
    """
    if {FORGET, RETAIN} <= set(parts):
        metrics, absent = tofu_metrics(TofuScores(parts=parts), details, reference)
        # what tofu_metrics says of TOFU's own general parts is about rows that nobody gave here
        unknown = tuple(f"{name}_" for name in GENERAL if name not in parts)
        absent = (
            {name: reason for name, reason in absent.items() if not name.startswith(unknown)} if unknown else absent
        )
        if len(parts) == 2:
            reason = "it is a mean over the retain part and further parts, and these rows have no further part"
            absent |= {name: reason for name in ("model_utility", "utility_score") if name in absent}
    else:
        found = Findings()
        for name, part in parts.items():
            part_metrics(found, name, part)
        if details is not None:
            found.mean("forget_exact_memorization", details.exact_memorization)
            found.mean("forget_extraction_strength", details.extraction_strength)
        reason = _ALONE.format("forget" if FORGET not in parts else "retain")
        found.missing(reason, "forget_quality", "forget_quality_log10", "model_utility")
        metrics, absent = found.metrics, found.absent
    # probabilities of own parts are never normalised: a second name for the same number
    return {name: value for name, value in metrics.items() if not name.endswith("_plain_probability")}, absent


class OwnEvalRows(EvalRows):
    """Parts of any name, none of which must be there; probabilities are never normalised."""

    def __init__(self, parts: OwnRows, limit: int | None) -> None:
        if not parts:
            raise ValueError("There are no parts to evaluate; expected rows by part, as load_own_rows gives them.")
        self.parts = {}
        for name, rows in parts.items():
            if name_taken(name):
                raise ValueError(f"A part is named {name!r}, {name_taken(name)}")
            try:
                chosen = checked_rows([rows[number] for number in evenly_spaced(len(rows), limit)])
            except (TypeError, ValueError) as error:
                raise type(error)(f"The {name} part: {error}") from error
            self.parts[name] = TofuPart(rows=chosen, normalised=False)
        self._forget, self._forget_limit = parts.get(FORGET, []), limit


def _lines(
    parts: OwnRows, limit: int | None, scores: Mapping[str, PartScores], details: ForgetDetails | None
) -> Iterator[dict[str, Any]]:
    """One object a row: where it is from, and every score that there is."""
    for name, part in scores.items():
        columns: dict[str, Any] = {
            "nll": part.nll,
            "probability": part.probability,
            "log_truth_ratio": part.log_truth_ratio,
            "rouge": part.rouge,
            "paraphrased_question_probability": part.paraphrase_probability,
        }
        if name == FORGET and details is not None:
            columns["exact_memorization"] = details.exact_memorization
            columns["extraction_strength"] = details.extraction_strength
        given = {key: np.asarray(values).tolist() for key, values in columns.items() if values is not None}
        for at, number in enumerate(evenly_spaced(len(parts[name]), limit)):
            line: dict[str, Any] = {"part": name, "row": number}
            if "index" in parts[name][number]:
                line["index"] = parts[name][number]["index"]
            line |= {key: values[at] for key, values in given.items()}
            if part.generations is not None:
                line["generation"] = part.generations[at]
            yield line
