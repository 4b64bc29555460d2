"""MUSE's files (arXiv 2407.06460) from a local folder: News or Books, named as on the hub and in its own code."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MUSE_FILES = {
    "verbmem/forget": ("prompt", "gt"),
    "knowmem/forget_qa": ("question", "answer"),
    "knowmem/forget_qa_icl": ("question", "answer"),
    "knowmem/retain_qa": ("question", "answer"),
    "knowmem/retain_qa_icl": ("question", "answer"),
    "privleak/forget": ("text",),
    "privleak/holdout": ("text",),
}
"""What is read, and the columns that every row has."""
_SUFFIXES = (".json", ".jsonl", ".parquet")
_CORPORA = ("news", "books")


@dataclass(frozen=True, kw_only=True)
class MuseFiles:
    """
    What a folder holds of MUSE.

    Args:
        rows (`Mapping[str, list[dict]]`):
            By name of [`MUSE_FILES`], the rows with the columns that are used.
        absent (`Mapping[str, str]`, *optional*):
            The other names, with the reason.
    """

    rows: Mapping[str, list[dict[str, str]]]
    absent: Mapping[str, str] = field(default_factory=dict)


def load_muse(folder: str | Path) -> MuseFiles:
    """
    Reads News or Books: `verbmem/forget`, `knowmem/forget_qa`, `knowmem/forget_qa_icl`, `knowmem/retain_qa`,
    `knowmem/retain_qa_icl`, `privleak/forget` and `privleak/holdout`.

    Each is a .json file (a list, or one object a line), a .jsonl file, or Parquet, also with the numbers of shards in
    its name, as a snapshot of `muse-bench/MUSE-News` has it. Texts of `privleak` may be plain strings. What has no
    file is absent, and the metrics made of it with it.

    Args:
        folder (`str` or `Path`):
            The folder of one corpus.

    Raises:
        FileNotFoundError: there is no such folder, or none of the files is in it.
        ValueError: a file without rows, or that cannot be read, or a row without one of its columns, with the place.
        TypeError: a column of another type, with the place.
    """
    place = Path(folder).expanduser()
    if not place.is_dir():
        raise FileNotFoundError(f"{place} is not a folder; expected one with {', '.join(MUSE_FILES)} (.json).")
    rows: dict[str, list[dict[str, str]]] = {}
    absent: dict[str, str] = {}
    for name, columns in MUSE_FILES.items():
        files = _files(place, name)
        if files:
            rows[name] = [row for file in files for row in _rows(file, columns)]
        else:
            absent[name] = f"there is no {name}.json (or .jsonl, .parquet) in {place.name}"
    if not rows:
        corpora = [name for name in _CORPORA if (place / name).is_dir()]
        hint = f" Give one corpus: {place / corpora[0]}." if corpora else ""
        held = ", ".join(sorted(entry.name for entry in place.iterdir())[:8]) or "nothing"
        raise FileNotFoundError(
            f"{place} holds {held}; expected at least one of {', '.join(f'{name}.json' for name in MUSE_FILES)}.{hint}"
        )
    return MuseFiles(rows=rows, absent=absent)


def _files(folder: Path, name: str) -> list[Path]:
    for suffix in _SUFFIXES:
        file = folder / f"{name}{suffix}"
        if file.is_file():
            return [file]
    parent, stem = (folder / name).parent, (folder / name).name
    return sorted(parent.glob(f"{stem}-*-of-*.parquet")) if parent.is_dir() else []


def _rows(file: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    entries = _parquet(file) if file.suffix == ".parquet" else _json(file)
    if not entries:
        raise ValueError(f"{file} holds no rows; expected at least one.")
    found = []
    for number, entry in enumerate(entries):
        row = {columns[0]: entry} if isinstance(entry, str) and len(columns) == 1 else entry
        if not isinstance(row, Mapping):
            raise TypeError(
                f"Row {number} of {file} is a {type(row).__name__}; expected an object with {_names(columns)}."
            )
        for column in columns:
            if row.get(column) is None:
                raise ValueError(
                    f"Row {number} of {file} has no `{column}`, it has {sorted(row)}; expected {_names(columns)}."
                )
            if not isinstance(row[column], str):
                raise TypeError(
                    f"`{column}` of row {number} of {file} is a {type(row[column]).__name__}; expected a string."
                )
            if not row[column].strip():
                raise ValueError(f"`{column}` of row {number} of {file} is blank; expected text. Drop the row.")
        found.append({column: row[column] for column in columns})
    return found


def _json(file: Path) -> list[Any]:
    try:
        text = file.read_text(encoding="utf-8-sig")
        if text.lstrip().startswith("["):
            return list(json.loads(text))
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 ({error.reason} at byte {error.start}). Save it as UTF-8.") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is neither a JSON list nor one JSON object a line ({error}).") from error


def _parquet(file: Path) -> list[Any]:
    from pyarrow import ArrowInvalid
    from pyarrow.parquet import read_table

    try:
        return list(read_table(file).to_pylist())
    except ArrowInvalid as error:
        raise ValueError(f"{file} is not Parquet ({error}).") from error


def _names(columns: Sequence[str]) -> str:
    return " and ".join(f"`{column}`" for column in columns)
