"""Runs of a comparison that are complete: kept as JSON, and taken again only where they are the same experiment."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..reports.plain import pull_non_finite, to_plain


@dataclass(frozen=True, kw_only=True)
class BenchRow:
    """One model in the table: numbers by column, and what was run."""

    name: str
    label: str
    seed: int | None
    values: Mapping[str, float]
    constraints: Sequence[Mapping[str, Any]] = field(default_factory=tuple)
    arguments: Mapping[str, Any] = field(default_factory=dict)


def save_run(file: Path, row: BenchRow, settings: Mapping[str, Any], history: Any) -> None:
    """Writes a complete run, with the settings that it shares with the other rows of its table."""
    write_json(file, {**asdict(row), "settings": settings, "history": history})


def load_run(file: Path, settings: Mapping[str, Any], arguments: Mapping[str, Any]) -> BenchRow:
    """
    A complete run.

    Args:
        file (`Path`):
            From [`save_run`].
        settings (`Mapping`):
            Of the table that it is to stand in.
        arguments (`Mapping`):
            Of the method as it would be run now.

    Raises:
        ValueError: it is another experiment: other models, other scoring, or other arguments.
    """
    payload = json.loads(file.read_text(encoding="utf-8"))
    changed = _differing(payload.get("settings", {}), settings)
    changed += [f"arguments.{name}" for name in _differing(payload["arguments"], arguments)]
    if changed:
        raise ValueError(
            f"{file} is a run with other settings ({', '.join(changed)}); beside the ones asked for now it would be "
            "no comparison. Give another output_dir, or remove that file to run it again."
        )
    return _row(payload)


def other_runs(folder: Path, settings: Mapping[str, Any], known: Collection[Path]) -> list[BenchRow]:
    """Complete runs of a folder that are not `known` and have the same settings, by method and seed."""
    found = []
    for file in sorted(set(folder.glob("*.json")) - set(known)):
        payload = json.loads(file.read_text(encoding="utf-8"))
        if not _differing(payload.get("settings", {}), settings):
            found.append(_row(payload))
    return sorted(found, key=lambda row: (row.name, row.seed or 0))


def write_json(file: Path, payload: Any) -> None:
    """Writes a file whole or not at all; numbers that are not finite become null."""
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_name(f".{file.name}.partial")
    finite, _ = pull_non_finite(to_plain(payload))
    scratch.write_text(json.dumps(finite, indent=1, allow_nan=False), encoding="utf-8")
    os.replace(scratch, file)


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    other = json.loads(json.dumps(pull_non_finite(to_plain(other))[0]))
    return sorted(name for name in {*one, *other} if one.get(name) != other.get(name))


def _row(payload: dict[str, Any]) -> BenchRow:
    return BenchRow(**{name: value for name, value in payload.items() if name not in ("settings", "history")})
