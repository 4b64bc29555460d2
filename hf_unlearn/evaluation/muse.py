"""MUSE (arXiv 2407.06460), News or Books, on a model: verbatim and knowledge memorisation, privacy leakage.

Shapes: n forget texts, m held-out texts.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.muse_files import MUSE_FILES, MuseFiles
from ..metrics.arrays import FloatArray, is_share
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
from ..metrics.uncertainty import Statistic, auc_of_draws, bootstrap
from ..reports.versions import library_versions
from .record import Evaluation, MetricValue
from .session import Session
from .values import (
    RESAMPLES,
    SEED,
    check_counts,
    check_positions,
    check_whole,
    how_scored,
    mean_metric,
    metric_of,
    name_of,
    positions_of,
    save_rows,
    text_digest,
)

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
SIDES = ("forget", "holdout")
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
    settings: Mapping[str, Any] | None = None,
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
        model_name (`str`, *optional*):
            Name or path, for the record. Default: the name in the model's config.
        limit (`int`, *optional*):
            Only so many rows of each file, evenly spaced.
        batch_size, output_dir, accelerator, description:
            As in [`Session`]; long texts are scored an eighth of `batch_size` at a time. With an `output_dir` the
            evaluation, the generations and the scores of single texts are written there.
        max_new_tokens (`int`, *optional*):
            Longest generated text in tokens; by default 128 for `verbmem_f` and 32 for the others.
        max_length (`int`, *optional*, defaults to `2048`):
            Longest text for PrivLeak in tokens; longer ones are cut, with a warning.
        settings (`Mapping[str, Any]`, *optional*):
            What else belongs on record: paths, for example.

    Raises:
        ValueError: before anything is computed: sharded weights, a reference AUC outside [0, 1], texts that do not fit
            into the model, or any reason of the functions above. Later: a model that gives NaN.
        OSError: `output_dir` cannot be written.
    """
    started = time.perf_counter()
    check_counts(max_new_tokens=max_new_tokens, max_length=max_length, batch_size=batch_size)
    if reference is not None and not isinstance(reference, Evaluation) and not is_share(reference):
        raise ValueError(f"reference is {reference!r}; expected an AUC in [0, 1], or an Evaluation.")
    # examples that are shown are not rows that are scored
    rows = {
        name: part if name.endswith("_icl") else [part[number] for number in evenly_spaced(len(part), limit)]
        for name, part in files.rows.items()
    }
    gone = {name: files.absent.get(name, f"there are no rows of {name}") for name in MUSE_FILES if name not in rows}
    asked = _asked(tokenizer, rows, max_new_tokens)
    texts = {
        side: encode_texts(tokenizer, rows[f"privleak/{side}"], max_length=max_length)
        for side in SIDES
        if not {f"privleak/{side}" for side in SIDES} & set(gone)
    }
    for name, one in asked.items():
        longest = max(map(len, one.prompts)) + one.tokens
        check_positions(model, longest, f"a prompt of {name} and {one.tokens} tokens after it. Leave the row out")
    for side, encoded in texts.items():
        longest = max(len(row["input_ids"]) for row in encoded)
        check_positions(model, longest, f"a text of privleak/{side}. Set max_length to at most {positions_of(model)}")
        single = [number for number, row in enumerate(encoded) if len(row["input_ids"]) < 2]
        if single:
            raise ValueError(f"Row {single[0]} of privleak/{side} has one token, which nothing predicts. Drop it.")
    session = Session(
        model,
        tokenizer,
        output_dir=output_dir,
        accelerator=accelerator,
        batch_size=batch_size,
        description=description,
    )
    check_whole(session, "MUSE")
    found = _Findings(absent={} if session.hash_obstacle is None else {"model_hash": session.hash_obstacle})
    for name, needed in _GENERATED.items():
        begun = time.perf_counter()
        if found.missing([gone[file] for file in needed if file in gone], name):
            continue
        scores = _generate(session, name, asked[name])
        found.metrics[name] = mean_metric(scores.rouge, higher_is_better=True if name == "knowmem_r" else None)
        found.lines[name] = _generated(scores)
        found.seconds[name] = time.perf_counter() - begun
    digest = text_digest([[row["text"] for row in rows.get(f"privleak/{side}", ())] for side in SIDES])
    if not found.missing([gone[f"privleak/{side}"] for side in SIDES if f"privleak/{side}" in gone], *_PRIVACY):
        begun = time.perf_counter()
        scored = {side: _min_k(session, side, encoded) for side, encoded in texts.items()}
        same = {"privleak_digest": digest, "max_length": max_length}
        metrics, reasons = _privacy(scored["forget"], scored["holdout"], reference, same)
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
        model=model_name or name_of(session.model),
        model_hash=session.model_hash,
        metrics=found.metrics,
        absent=found.absent,
        settings={
            **(settings or {}),
            "rows": {name: len(part) for name, part in rows.items()},
            "rows_digest": text_digest(rows),
            "privleak_digest": digest,
            "reference": reference.model if isinstance(reference, Evaluation) else None,
            "reference_hash": reference.model_hash if isinstance(reference, Evaluation) else None,
            "min_k_share": MIN_K_SHARE,
            "limit": limit,
            "max_new_tokens": max_new_tokens or {"verbmem": VERBATIM_TOKENS, "knowmem": KNOWLEDGE_TOKENS},
            "max_length": max_length,
            "resamples": RESAMPLES,
            "seed": SEED,
            **how_scored(session),
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


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """Prompts of a metric, what should follow each, and how many tokens are generated."""

    prompts: list[list[int]]
    wanted: list[str]
    tokens: int


def _asked(
    tokenizer: Any, rows: Mapping[str, Sequence[Mapping[str, str]]], max_new_tokens: int | None
) -> dict[str, _Asked]:
    """By metric whose files are there."""
    found = {}
    for name, (file, *shots) in _GENERATED.items():
        if not {file, *shots} <= set(rows):
            continue
        if name == "verbmem_f":
            tokens = max_new_tokens or VERBATIM_TOKENS
            prompts, wanted = encode_verbatim(tokenizer, rows[file], max_new_tokens=tokens)
        else:
            tokens = max_new_tokens or KNOWLEDGE_TOKENS
            prompts, wanted = encode_knowledge(tokenizer, rows[file], shots=rows[shots[0]])
        found[name] = _Asked(prompts=prompts, wanted=wanted, tokens=tokens)
    return found


def _generate(session: Session, name: str, asked: _Asked) -> MemorizationScores:
    """ROUGE of greedy continuations; answers to questions end at a stop string."""
    found = session.answers(name, asked.prompts, max_new_tokens=asked.tokens, batch_size=session.batch_size)
    return memorization_scores(found if name == "verbmem_f" else [cut_at_stops(text) for text in found], asked.wanted)


def _min_k(session: Session, side: str, encoded: list[dict[str, list[int]]]) -> FloatArray:
    """Min-K% of whole texts `(n,)`, by [`text_min_k_scores`]; one number a text is kept, not one a token."""
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
    forget: FloatArray, holdout: FloatArray, reference: Evaluation | float | None, same: Mapping[str, Any]
) -> tuple[dict[str, MetricValue], dict[str, str]]:
    """The metrics of privacy, and why one of them is absent; `same` is what must be alike for a comparison."""
    metrics = {"privleak_auc": _estimated(auc_of_draws, forget, holdout)}
    if isinstance(reference, Evaluation):
        known = reference.metrics.get("privleak_auc")
        reason = ""
        if known is None:
            reason = "the evaluation of the retrained model has no privleak_auc"
        elif any(reference.settings.get(name) != value for name, value in same.items()):
            reason = (
                "the retrained model was scored on other texts: evaluate it on the same files with the same limit and "
                "max_length"
            )
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
        metrics["privleak_reference_auc"] = MetricValue(value=against, n=len(forget) + len(holdout))
    return {**metrics, "privleak": _privleak(forget, holdout, against)}, {}


def _privleak(forget: FloatArray, holdout: FloatArray, reference_auc: float) -> MetricValue:
    def statistic(members: FloatArray, others: FloatArray) -> FloatArray:
        found = auc_of_draws(members, others)
        if reference_auc == 1.0:  # as [`privleak`] has it
            return np.where(found == 1.0, 0.0, np.inf)
        return 100.0 * (reference_auc - found) / (1.0 - reference_auc)

    return _estimated(statistic, forget, holdout)


def _estimated(statistic: Statistic, forget: FloatArray, holdout: FloatArray) -> MetricValue:
    estimate = bootstrap(statistic, forget, holdout, resamples=RESAMPLES, seed=SEED)
    return replace(metric_of(estimate), n=sum(estimate.n))


def _generated(scores: MemorizationScores) -> list[dict[str, Any]]:
    return [
        {"row": number, "rouge_l_f1": float(rouge), "generation": text, "reference": wanted}
        for number, (rouge, text, wanted) in enumerate(
            zip(scores.rouge, scores.generations, scores.references, strict=True)
        )
    ]
