"""What the benchmarks share: metrics with their bootstrap, files of single rows, and writing on one process."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import extract_model_from_parallel
from numpy.typing import ArrayLike

from ..data import tokenize_example
from ..metrics.generate import stop_token_ids
from ..metrics.uncertainty import Estimate, bootstrap, mean_of_draws
from ..reports.eval_spread import on_all
from ..reports.plain import pull_non_finite, to_plain
from ..reports.schema import write_text
from .record import FILE, Evaluation, MetricValue

if TYPE_CHECKING:
    from .session import Session


RESAMPLES, SEED = 1000, 0
"""Of the bootstrap, where a benchmark does not let them be chosen."""


def mean_metric(values: ArrayLike, *, higher_is_better: bool | None = None, unit: str = "") -> MetricValue:
    """
    Mean of `values` `(n,)` over rows, with its bootstrap.

    Args:
        values (`ArrayLike`):
            One number a row.
        higher_is_better, unit:
            As in [`MetricValue`].
    """
    estimate = bootstrap(mean_of_draws, values, resamples=RESAMPLES, seed=SEED)
    return metric_of(estimate, higher_is_better=higher_is_better, unit=unit)


def metric_of(estimate: Estimate, *, higher_is_better: bool | None = None, unit: str = "") -> MetricValue:
    """A metric from an [`Estimate`]; `n` counts the rows of its first sample."""
    return MetricValue(
        value=estimate.value,
        n=estimate.n[0],
        standard_error=estimate.standard_error,
        low=estimate.low,
        high=estimate.high,
        higher_is_better=higher_is_better,
        unit=unit,
    )


def text_digest(value: Any) -> str:
    """16 hexadecimal digits of SHA-256 over plain values: whether two evaluations saw the same rows."""
    text = json.dumps(to_plain(value), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def how_scored(session: Session) -> dict[str, Any]:
    """For the settings of any benchmark: what of model, tokenizer and processes decides numbers, or may move them."""
    config = session.model.config
    quantization: Any = getattr(config, "quantization_config", None)
    return {
        "dtype": str(next(session.model.parameters()).dtype).removeprefix("torch."),
        "quantization": to_plain(quantization.to_dict() if hasattr(quantization, "to_dict") else quantization),
        "attention": getattr(config, "_attn_implementation", None),
        "device": session.processes.device.type,
        "processes": session.processes.num_processes,
        "batch_size": session.batch_size,
        "stop_token_ids": stop_token_ids(session.model, session.tokenizer),
        "template_digest": template_digest(session.tokenizer),
    }


def name_of(model: Any) -> str:
    """Name or path from the model's config, else its class: for the record, where the caller gives none."""
    inner = extract_model_from_parallel(model)  # a DistributedDataParallel has no config
    return getattr(inner.config, "_name_or_path", "") or type(inner).__name__


def template_digest(tokenizer: Any) -> str:
    """[`text_digest`] of the tokens of one question and answer: others under another tokenizer or chat template."""
    return text_digest(tokenize_example({"question": "Who keeps the ferry?", "answer": "Ines keeps it."}, tokenizer))


def check_counts(**counts: int | None) -> None:
    """
    Refuses counts below 1, by their names; None is whatever the default is.

    Raises:
        ValueError: one is.
    """
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name} is {count}; expected at least 1.")


def check_positions(model: Any, tokens: int, what: str) -> None:
    """
    Refuses a text that is longer than the model has positions, where some models would go on with wrong numbers.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            Causal language model.
        tokens (`int`):
            Of the longest text, with what is generated after it.
        what (`str`):
            What is that long, and what to do, for the error.

    Raises:
        ValueError: it does not fit.
    """
    positions = positions_of(model)
    if positions and tokens > positions:
        raise ValueError(f"{type(model).__name__} has {positions} positions, but {tokens} are needed: {what}.")


def positions_of(model: Any) -> int | None:
    """How long a text the model takes, in tokens; None where its config does not say."""
    config = extract_model_from_parallel(model).config.get_text_config()
    return getattr(config, "max_position_embeddings", None) or None


def check_whole(session: Session, what: str) -> None:
    """
    Refuses a model whose weights are spread over processes.

    Raises:
        ValueError: they are.
    """
    if session.sharded:
        raise ValueError(
            f"{what} needs whole weights on every process, but the model's are sharded (ZeRO-3, FSDP). Save the "
            "model, load it with from_pretrained, and evaluate that."
        )


def save_rows(
    session: Session,
    evaluation: Evaluation,
    output_dir: str | os.PathLike[str] | None,
    rows: Mapping[str, Iterable[Mapping[str, Any]]],
    *,
    also: Callable[[str | os.PathLike[str]], Any] | None = None,
) -> None:
    """
    Writes evaluation.json, and the JSON lines that `evaluation.rows` names, on the first process.

    Args:
        session ([`Session`]):
            Whose processes these are.
        evaluation ([`Evaluation`]):
            What was found.
        output_dir (`str` or `os.PathLike`, *optional*):
            The folder; None writes nothing.
        rows (`Mapping[str, Iterable[Mapping]]`):
            By part, one plain object a row.
        also (`Callable`, *optional*):
            Writes further files into the folder.

    Raises:
        OSError: a file cannot be written. On the other processes it is a `RuntimeError`.
    """
    if output_dir is None:
        return
    folder = Path(output_dir)

    def write() -> None:
        if not session.is_main:
            return
        (folder / FILE).unlink(missing_ok=True)  # of a run before: rows of this one must not be taken for its
        for part, lines in rows.items():
            # strict JSON has no infinity: a letter that a model gives no probability at all is null
            text = "".join(json.dumps(_finite(line), ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
            write_text(folder / evaluation.rows[part], text)
        if also is not None:
            also(folder)
        evaluation.save(folder)  # last: with it the evaluation is complete

    on_all(write, session.processes)


def _finite(line: Mapping[str, Any]) -> Any:
    return pull_non_finite(to_plain(line))[0]
