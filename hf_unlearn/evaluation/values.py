"""What the benchmarks share: metrics with their bootstrap, files of single rows, and writing on one process."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import ArrayLike

from ..metrics.uncertainty import Estimate, bootstrap, mean_of_draws
from ..reports.eval_spread import on_all
from ..reports.plain import pull_non_finite, to_plain
from ..reports.schema import write_text
from .record import Evaluation, MetricValue

if TYPE_CHECKING:
    from .session import Session


def mean_metric(values: ArrayLike, *, higher_is_better: bool | None = None, unit: str = "") -> MetricValue:
    """
    Mean of `values` `(n,)` over rows, with its bootstrap.

    Args:
        values (`ArrayLike`):
            One number a row.
        higher_is_better, unit:
            As in [`MetricValue`].
    """
    return metric_of(bootstrap(mean_of_draws, values), higher_is_better=higher_is_better, unit=unit)


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
