"""MUSE (arXiv 2407.06460), News or Books, on a model: verbatim and knowledge memorisation, privacy leakage.

Shapes: n forget texts, m held-out texts.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.muse_files import MuseFiles
from ..metrics.arrays import FloatArray
from ..metrics.generate import padding_id
from ..metrics.membership_scores import min_k_scores
from ..metrics.muse import (
    MemorizationScores,
    cut_at_stops,
    encode_knowledge,
    encode_texts,
    encode_verbatim,
    memorization_scores,
)
from ..metrics.runner import evenly_spaced
from ..metrics.token_scores import score_tokens
from ..metrics.uncertainty import auc_of_draws, bootstrap
from ..reports.versions import library_versions
from .record import Evaluation, MetricValue
from .session import Session
from .values import check_whole, mean_metric, metric_of, save_rows, text_digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MIN_K_SHARE = 0.4
VERBATIM_TOKENS, KNOWLEDGE_TOKENS = 128, 32
# texts of a forward pass: they have up to 2,048 tokens, and questions fewer than a tenth of that
_TEXTS_OF_BATCH = 8
_GENERATED: dict[str, tuple[str, ...]] = {
    "verbmem_f": ("verbmem/forget",),
    "knowmem_f": ("knowmem/forget_qa", "knowmem/forget_qa_icl"),
    "knowmem_r": ("knowmem/retain_qa", "knowmem/retain_qa_icl"),
}
_PRIVACY = ("privleak", "privleak_auc", "privleak_reference_auc")


def run_muse(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    files: MuseFiles,
    *,
    reference: Evaluation | float | None = None,
    model_name: str = "",
    limit: int | None = None,
    batch_size: int = 32,
    max_new_tokens: int | None = None,
    max_length: int = 2048,
    output_dir: str | os.PathLike[str] | None = None,
    accelerator: Any = None,
    description: str | None = None,
) -> Evaluation:
    """
    MUSE's four metrics of one model, on one process or many; each needs its files and is absent without them.

    `verbmem_f` ([`verbatim_memorization`]), `knowmem_f` and `knowmem_r` ([`knowledge_memorization`], with the solved
    examples of the `*_icl` files), each a mean ROUGE-L F1 in [0, 1] (the benchmark's tables show 100 times it);
    `privleak` ([`privacy_leakage`], in percent) with `privleak_auc` of this model and `privleak_reference_auc`. The
    standard error of `privleak` is that of this model's AUC: the reference's is taken as it is.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            Causal language model, on its device.
        tokenizer (`PreTrainedTokenizerBase`):
            Its tokenizer.
        files ([`MuseFiles`]):
            What [`load_muse`] read.
        reference ([`Evaluation`] or `float`, *optional*):
            That of the retrained model on the same texts, or its AUC. Without it PrivLeak is against an AUC of 0.5.
        model_name (`str`, *optional*, defaults to `""`):
            Name or path, for the record.
        limit (`int`, *optional*):
            Only so many rows of each file, evenly spaced.
        batch_size, output_dir, accelerator, description:
            As in [`Session`]; long texts are scored an eighth of `batch_size` at a time. With an `output_dir` the
            evaluation, the generations and the scores of single texts are written there.
        max_new_tokens (`int`, *optional*):
            Longest generated text in tokens; by default 128 for `verbmem_f` and 32 for the others.
        max_length (`int`, *optional*, defaults to `2048`):
            Longest text for PrivLeak in tokens; longer ones are cut, with a warning.

    Raises:
        ValueError: sharded weights, or any reason of the functions above.
        OSError: `output_dir` cannot be written.
    """
    started = time.perf_counter()
    session = Session(
        model,
        tokenizer,
        output_dir=output_dir,
        accelerator=accelerator,
        batch_size=batch_size,
        description=description,
    )
    check_whole(session, "MUSE")
    # examples that are shown are not rows that are scored
    rows = {
        name: part if name.endswith("_icl") else [part[number] for number in evenly_spaced(len(part), limit)]
        for name, part in files.rows.items()
    }
    found = _Findings(absent={} if session.hash_obstacle is None else {"model_hash": session.hash_obstacle})
    for name, needed in _GENERATED.items():
        begun = time.perf_counter()
        if found.missing([files.absent[file] for file in needed if file not in rows], name):
            continue
        scores = (
            _verbatim(session, rows[needed[0]], max_new_tokens or VERBATIM_TOKENS)
            if name == "verbmem_f"
            else _knowledge(session, name, rows[needed[0]], rows[needed[1]], max_new_tokens or KNOWLEDGE_TOKENS)
        )
        found.metrics[name] = mean_metric(scores.rouge, higher_is_better=True if name == "knowmem_r" else None)
        found.lines[name] = _generated(scores)
        found.seconds[name] = time.perf_counter() - begun
    texts = {side: rows.get(f"privleak/{side}", []) for side in ("forget", "holdout")}
    digest = text_digest([[row["text"] for row in part] for part in texts.values()])
    if not found.missing([files.absent[f"privleak/{side}"] for side, part in texts.items() if not part], *_PRIVACY):
        begun = time.perf_counter()
        scored = {side: _min_k(session, side, part, max_length) for side, part in texts.items()}
        metrics, reasons = _privacy(scored["forget"], scored["holdout"], reference, digest)
        found.metrics.update(metrics)
        found.absent.update(reasons)
        found.lines["privleak"] = [
            {"part": side, "row": number, "min_k": float(value)}
            for side, values in scored.items()
            for number, value in enumerate(values)
        ]
        found.seconds["privleak"] = time.perf_counter() - begun

    evaluation = Evaluation(
        benchmark="muse",
        model=model_name,
        model_hash=session.model_hash,
        metrics=found.metrics,
        absent=found.absent,
        settings={
            "rows": {name: len(part) for name, part in rows.items()},
            "rows_digest": text_digest(rows),
            "privleak_digest": digest,
            "reference": reference.model if isinstance(reference, Evaluation) else None,
            "reference_hash": reference.model_hash if isinstance(reference, Evaluation) else None,
            "min_k_share": MIN_K_SHARE,
            "limit": limit,
            "batch_size": batch_size,
            "max_new_tokens": max_new_tokens or {"verbmem": VERBATIM_TOKENS, "knowmem": KNOWLEDGE_TOKENS},
            "max_length": max_length,
            "processes": session.processes.num_processes,
        },
        versions=library_versions(),
        seconds={**found.seconds, "total": time.perf_counter() - started},
        rows={} if output_dir is None else {name: f"{name}.jsonl" for name in found.lines},
    )
    save_rows(session, evaluation, output_dir, found.lines)
    return evaluation


@dataclass(frozen=True, kw_only=True)
class _Findings:
    """What is found, metric by metric."""

    metrics: dict[str, MetricValue] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    lines: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def missing(self, reasons: Sequence[str], *names: str) -> bool:
        """Whether there is a reason for which these metrics cannot be computed; it is kept."""
        if reasons:
            self.absent.update(dict.fromkeys(names, "; ".join(reasons)))
        return bool(reasons)


def _verbatim(session: Session, rows: Sequence[Mapping[str, str]], max_new_tokens: int) -> MemorizationScores:
    prompts, references = encode_verbatim(session.tokenizer, rows, max_new_tokens=max_new_tokens)
    return memorization_scores(
        session.answers("verbmem_f", prompts, max_new_tokens=max_new_tokens, batch_size=session.batch_size), references
    )


def _knowledge(
    session: Session,
    name: str,
    rows: Sequence[Mapping[str, str]],
    shots: Sequence[Mapping[str, str]],
    max_new_tokens: int,
) -> MemorizationScores:
    prompts, answers = encode_knowledge(session.tokenizer, rows, shots=shots)
    found = session.answers(name, prompts, max_new_tokens=max_new_tokens, batch_size=session.batch_size)
    return memorization_scores([cut_at_stops(text) for text in found], answers)


def _min_k(session: Session, side: str, rows: Sequence[Mapping[str, str]], max_length: int) -> FloatArray:
    """Min-K% of whole texts `(n,)`, by [`text_min_k_scores`]; one number a text is kept, not one a token."""
    encoded = encode_texts(session.tokenizer, rows, max_length=max_length)
    pad = padding_id(session.tokenizer)
    at_once = max(1, session.batch_size // _TEXTS_OF_BATCH)

    def score(items: list[Any], text: str | None) -> list[Any]:
        found = score_tokens(session.model, items, pad_token_id=pad, batch_size=at_once, description=text)
        return [float(value) for value in min_k_scores(found.log_probs, share=MIN_K_SHARE)]

    return np.array(
        session.map(
            f"privleak {side}",
            encoded,
            score,
            lengths=[len(row["input_ids"]) for row in encoded],
            settings={"kind": "min_k", "share": MIN_K_SHARE},
            batch_size=at_once,
        ),
        dtype=np.float64,
    )


def _privacy(
    forget: FloatArray, holdout: FloatArray, reference: Evaluation | float | None, digest: str
) -> tuple[dict[str, MetricValue], dict[str, str]]:
    """The metrics of privacy, and why one of them is absent."""
    auc = bootstrap(auc_of_draws, forget, holdout)
    metrics = {"privleak_auc": metric_of(auc)}
    if isinstance(reference, Evaluation):
        known = reference.metrics.get("privleak_auc")
        reason = ""
        if known is None:
            reason = "the evaluation of the retrained model has no privleak_auc"
        elif reference.settings.get("privleak_digest") != digest:
            reason = "the retrained model was scored on other texts: evaluate it on the same files with the same limit"
        if known is None or reason:
            return metrics, dict.fromkeys(("privleak", "privleak_reference_auc"), reason)
        metrics["privleak_reference_auc"] = known
        against = known.value
    elif reference is None:
        against = 0.5
        reasons = {"privleak_reference_auc": "there is no retrained model; PrivLeak is against an AUC of 0.5"}
        return {**metrics, "privleak": _privleak(forget, holdout, against)}, reasons
    else:
        against = float(reference)
        metrics["privleak_reference_auc"] = MetricValue(value=against, n=len(forget))
    return {**metrics, "privleak": _privleak(forget, holdout, against)}, {}


def _privleak(forget: FloatArray, holdout: FloatArray, reference_auc: float) -> MetricValue:
    def statistic(members: FloatArray, others: FloatArray) -> FloatArray:
        found = auc_of_draws(members, others)
        if reference_auc == 1.0:  # as [`privleak`] has it
            return np.where(found == 1.0, 0.0, np.inf)
        return 100.0 * (reference_auc - found) / (1.0 - reference_auc)

    return metric_of(bootstrap(statistic, forget, holdout))


def _generated(scores: MemorizationScores) -> list[dict[str, Any]]:
    return [
        {"row": number, "rouge_l_f1": float(rouge), "generation": text, "reference": wanted}
        for number, (rouge, text, wanted) in enumerate(
            zip(scores.rouge, scores.generations, scores.references, strict=True)
        )
    ]
