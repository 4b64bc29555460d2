"""A user's own question-answer rows: JSON lines in TOFU's columns, checked before anything is computed on them.

Errors name file, line and field. Several parts may stand in one file; the schema is on docs/evaluation_files.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

FORGET, RETAIN = "forget", "retain"
TEXTS = ("question", "answer")
FURTHER_TEXTS = ("paraphrased_question", "paraphrased_answer")
WRONG = "perturbed_answer"
COLUMNS = (*TEXTS, *FURTHER_TEXTS, WRONG, "part", "index")
_PART = re.compile(r"[A-Za-z][A-Za-z0-9_]*")

OwnRows = dict[str, list[dict[str, Any]]]
"""Rows by part: the forget part first, the retain part second, then the others as they come in the file."""


def load_own_rows(path: str | Path) -> OwnRows:
    """
    Reads rows of one or several parts from JSON lines.

    Every row is an object with `question` and `answer` (`str`), and optionally `paraphrased_question`,
    `paraphrased_answer` (`str`), `perturbed_answer` (`list[str]`, wrong answers), `part` (`str`, by default
    `"forget"`) and `index` (`int` or `str`, unique within a part). An optional field belongs to all rows of a part, or
    to none; `null` counts as absent. Fields of other names are left alone, unless the name is a near miss of one of
    these: then the file is refused, rather than a metric left out for a typing error.

    Args:
        path (`str` or `Path`):
            A .jsonl file, or a .json file of one object a line or of a list of objects.

    Returns:
        `dict[str, list[dict]]`: by part, the rows in the order of the file with the fields above but `part`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no rows, a line that is not JSON, or a field that is missing, blank or misspelt, or an index twice.
        TypeError: a line or a field of another type.
    """
    file = Path(path).expanduser()
    if file.suffix not in (".jsonl", ".json"):
        raise ValueError(f"{file} ends with {file.suffix!r}; expected .jsonl, one JSON object a line.")
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not a file; expected JSON lines with `question` and `answer`.")
    parts: OwnRows = {}
    lines: dict[str, list[str]] = {}
    for where, row in _objects(file):
        part, kept = _checked(where, row)
        parts.setdefault(part, []).append(kept)
        lines.setdefault(part, []).append(where)
    if not parts:
        raise ValueError(f"{file} holds no rows; expected at least one JSON object.")
    for part, rows in parts.items():
        _check_part(part, rows, lines[part])
    return {name: parts[name] for name in sorted(parts, key=_rank)}  # stable: others as they come


def _rank(part: str) -> int:
    return {FORGET: 0, RETAIN: 1}.get(part, 2)


def _objects(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Where each object is, for errors, and the object."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 ({error.reason} at byte {error.start}). Save it as UTF-8.") from error
    if text.lstrip().startswith("["):
        try:
            entries = [(f"Row {number} of {file}", entry) for number, entry in enumerate(json.loads(text))]
        except json.JSONDecodeError as error:
            raise ValueError(f"{file} is not JSON ({error}); expected one JSON object a line.") from error
    else:
        entries = []
        # not splitlines(): that also ends lines at characters which JSON allows inside a string
        for number, line in enumerate(text.split("\n"), start=1):
            if not line.strip():
                continue
            where = f"Line {number} of {file}"
            try:
                entries.append((where, json.loads(line)))
            except json.JSONDecodeError as error:
                raise ValueError(f"{where} is not JSON ({error.msg}); expected one JSON object a line.") from error
    for where, entry in entries:
        if not isinstance(entry, Mapping):
            raise TypeError(f"{where} is a {type(entry).__name__}; expected an object with `question` and `answer`.")
        yield where, entry


def _checked(where: str, row: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The part of a row, and its fields that are used."""
    for name in row:
        near = [] if name in COLUMNS else get_close_matches(name, COLUMNS, n=1, cutoff=0.85)
        if near:
            raise ValueError(f"{where} has a field {name!r}; expected `{near[0]}`. Rename it, or drop it.")
    given = {name: row[name] for name in COLUMNS if row.get(name) is not None}
    missing = [name for name in TEXTS if name not in given]
    if missing:
        raise ValueError(
            f"{where} has no `{missing[0]}`, it has {sorted(row)}; expected `question` and `answer`. Rename its "
            "fields."
        )
    for name in (*TEXTS, *FURTHER_TEXTS):
        if name in given:
            _check_text(f"`{name}` of {_lower(where)}", given[name])
    if WRONG in given:
        answers = given[WRONG]
        if not isinstance(answers, list):
            raise TypeError(
                f"`{WRONG}` of {_lower(where)} is a {type(answers).__name__}; expected a list of wrong answers."
            )
        if not answers:
            raise ValueError(f"`{WRONG}` of {_lower(where)} is empty; expected at least one wrong answer.")
        for number, answer in enumerate(answers):
            _check_text(f"`{WRONG}[{number}]` of {_lower(where)}", answer)
    if "index" in given and (isinstance(given["index"], bool) or not isinstance(given["index"], (int, str))):
        raise TypeError(
            f"`index` of {_lower(where)} is a {type(given['index']).__name__}; expected an integer or a string."
        )
    part = given.pop("part", FORGET)
    if not isinstance(part, str) or not _PART.fullmatch(part):
        raise ValueError(
            f"`part` of {_lower(where)} is {part!r:.40}; expected a name of letters, digits and underscores that "
            "begins with a letter, as 'forget', 'retain' or 'neighbours'."
        )
    reason = name_taken(part)
    if reason:
        raise ValueError(f"`part` of {_lower(where)} is {part!r}, {reason}")
    return part, given


def name_taken(part: str) -> str:
    """Why a part cannot have this name, with what to do; empty where it can."""
    if part == "holdout":
        return (
            "whose rows would count as knowledge to keep; expected rows that no model has seen in a file of their "
            "own. Give that as holdout_dataset."
        )
    if part.endswith("_plain") or part in ("forget_paraphrased_question", "forget_paraphrased_answer"):
        return "whose metrics would have the names of other metrics. Give the part another name."
    return ""


def _check_part(part: str, rows: list[dict[str, Any]], lines: list[str]) -> None:
    """Each optional field in all rows or none, and each index once."""
    for name in (*FURTHER_TEXTS, WRONG, "index"):
        without = [where for where, row in zip(lines, rows, strict=True) if name not in row]
        if without and len(without) < len(rows):
            raise ValueError(
                f"{without[0]} has no `{name}`, as {len(without)} of the {len(rows)} rows of the part {part!r}; "
                "expected it in all of them or in none. Complete it, or give these rows another `part`."
            )
    seen: dict[Any, str] = {}
    for where, row in zip(lines, rows, strict=True):
        if "index" not in row:
            return
        if row["index"] in seen:
            raise ValueError(
                f"`index` of {_lower(where)} is {row['index']!r:.40}, as that of {_lower(seen[row['index']])}; "
                f"expected each once in the part {part!r}. Drop the repeated row, or number it."
            )
        seen[row["index"]] = where


def _check_text(what: str, value: Any) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{what} is a {type(value).__name__}; expected a string.")
    if not value.strip():
        raise ValueError(f"{what} is blank; expected text. Drop the row, or fill it in.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{what} has half a character ({value[error.start]!r}) at {error.start}; expected text. Repair it."
        ) from error


def _lower(where: str) -> str:
    return where[0].lower() + where[1:]
