"""Files of multiple-choice questions in the layouts of WMDP (arXiv 2403.03218) and MMLU (arXiv 2009.03300)."""

from __future__ import annotations

import ast
import csv
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

LETTERS = ascii_uppercase
FEWEST, MOST = 2, len(LETTERS)

_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
_SPLIT = re.compile(r"[_-](test|val|validation|dev|train)$")


@dataclass(frozen=True, kw_only=True)
class ChoiceRow:
    """
    One question.

    Args:
        question (`str`): what is asked.
        choices (`tuple[str, ...]`): 2 to 26 answers, in the order of their letters.
        answer (`int`): index of the right one, counted from 0.
        subject (`str`, *optional*, defaults to `""`): what the row is about, for the breakdown.

    Raises:
        ValueError: a blank question, another number of choices, or an answer that is none of them.
        TypeError: a field of another type.
    """

    question: str
    choices: tuple[str, ...]
    answer: int
    subject: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.question, str) or not isinstance(self.subject, str):
            raise TypeError("`question` and `subject` must be strings.")
        if not isinstance(self.choices, tuple) or not all(isinstance(choice, str) for choice in self.choices):
            raise TypeError(f"`choices` is a {type(self.choices).__name__}; expected a tuple of strings.")
        if not isinstance(self.answer, int) or isinstance(self.answer, bool):
            raise TypeError(f"`answer` is {self.answer!r}; expected the index of the right choice, counted from 0.")
        if not self.question.strip():
            raise ValueError("`question` is blank; expected text.")
        if not FEWEST <= len(self.choices) <= MOST:
            raise ValueError(f"There are {len(self.choices)} choices; expected {FEWEST} to {MOST}, one a letter.")
        if not 0 <= self.answer < len(self.choices):
            raise ValueError(
                f"`answer` is {self.answer}, of {len(self.choices)} choices; expected 0 to {len(self.choices) - 1} "
                "(0 is A). Test splits with hidden answers have -1 and cannot be scored."
            )


def choice_row(values: Mapping[str, Any], *, subject: str = "") -> ChoiceRow:
    """
    A row in the hub's layout: `question`, `choices` and `answer`, and optionally `subject`.

    Args:
        values (`Mapping`):
            `question` (`str`), `choices` (`list[str]`), `answer` (an index from 0, or its letter) and `subject`
            (`str`); other columns are left alone.
        subject (`str`, *optional*, defaults to `""`):
            Subject of a row that has none.

    Raises:
        ValueError: a missing column, or any reason of [`ChoiceRow`].
        TypeError: a column of another type.
    """
    missing = [name for name in ("question", "choices", "answer") if values.get(name) is None]
    if missing:
        raise ValueError(
            f"There is no {', '.join(f'`{name}`' for name in missing)}, only {sorted(map(str, values))}; expected "
            "`question`, `choices` and `answer`. Rename the columns."
        )
    choices = values["choices"]
    if isinstance(choices, (str, Mapping)) or not isinstance(choices, Sequence):
        raise TypeError(f"`choices` is a {type(choices).__name__}; expected a list of strings.")
    return ChoiceRow(
        question=values["question"],
        choices=tuple(choices),
        answer=_index(values["answer"]),
        subject=values.get("subject") or subject,
    )


def load_multiple_choice(path: str | Path, *, subject: str | None = None) -> list[ChoiceRow]:
    """
    Reads questions from a file, or from all .json, .jsonl, .csv and .parquet files of a folder in alphabetical order.

    * Parquet, as the hub stores WMDP and MMLU: the columns of the JSON objects below.
    * JSON: a list of objects, or one object a line (also in a .json file, as `datasets` writes it), with `question`,
      `choices` (`list[str]`), `answer` (index from 0, or letter) and optionally `subject`: WMDP and MMLU on the hub.
    * CSV with a header: `question`, `answer`, optionally `subject`, and either `choices` (a JSON or Python list) or a
      column for each letter from `A` on; empty cells at the end of a row are no choices.
    * CSV without a header: question, two or more choices, and the letter of the answer, as MMLU was first published.

    Args:
        path (`str` or `Path`):
            File or folder.
        subject (`str`, *optional*):
            Subject of rows without one; by default the name of their file without `_test`, `_val`, `_dev`.

    Returns:
        `list[ChoiceRow]`: in the order of the files.

    Raises:
        FileNotFoundError: there is no such path, or no such file in the folder.
        ValueError: an empty file, another layout, or a row that cannot be scored, with file and row number.
        TypeError: a column of another type, with file and row number.
    """
    path = Path(path).expanduser()
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES)
        if not files:
            raise FileNotFoundError(f"{path} holds no {', '.join(_SUFFIXES)} file.")
    elif path.suffix not in _SUFFIXES:
        raise ValueError(f"{path} ends with {path.suffix!r}; expected one of {', '.join(_SUFFIXES)}, or a folder.")
    found = []
    for file in files:
        name = _SPLIT.sub("", file.stem) if subject is None else subject
        entries = _READERS[file.suffix](file)
        if not entries:
            raise ValueError(f"{file} holds no rows; expected at least one.")
        for number, entry in enumerate(entries):
            try:
                found.append(choice_row(entry, subject=name))
            except (TypeError, ValueError) as error:
                raise type(error)(f"Row {number} of {file}: {error}") from error
    return found


def _index(answer: Any) -> int:
    """An index from 0, of an index or a letter, either perhaps as text."""
    if isinstance(answer, str):
        text = answer.strip()
        if len(text) == 1 and text.upper() in LETTERS:
            return LETTERS.index(text.upper())
        if re.fullmatch(r"-?[0-9]+", text):
            return int(text)
    if isinstance(answer, int) and not isinstance(answer, bool):
        return answer
    raise ValueError(f"`answer` is {answer!r:.80}; expected an index counted from 0, or a letter.")


def _json_entries(file: Path) -> list[Mapping[str, Any]]:
    text = file.read_text(encoding="utf-8-sig")
    try:
        whole = text.lstrip().startswith("[")
        entries = json.loads(text) if whole else [json.loads(line) for line in text.splitlines() if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is neither a JSON list nor one JSON object a line ({error}).") from error
    for number, entry in enumerate(entries):
        if not isinstance(entry, Mapping):
            raise TypeError(f"Row {number} of {file} is a {type(entry).__name__}; expected an object.")
    return list(entries)


def _csv_entries(file: Path) -> list[Mapping[str, Any]]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        table = [cells for cells in csv.reader(lines) if cells]
    if not table:
        return []
    header = [cell.strip() for cell in table[0]]
    if {"question", "answer"} <= {name.lower() for name in header}:
        return [_headed(file, number, header, cells) for number, cells in enumerate(table[1:])]
    # without a header the last cell of the first row is an answer
    last, columns = header[-1], len(header)
    if columns < FEWEST + 2 or last not in tuple(LETTERS[: columns - 2]):
        raise ValueError(
            f"{file} has the columns {header[:8]}; expected a header with `question`, `answer` and `choices` (or `A`, "
            "`B`, ...), or no header and rows of question, choices and the letter of the answer."
        )
    for number, cells in enumerate(table):
        _same_width(file, number, cells, columns)
    return [{"question": cells[0], "choices": cells[1:-1], "answer": cells[-1]} for cells in table]


def _headed(file: Path, number: int, header: Sequence[str], cells: Sequence[str]) -> dict[str, Any]:
    _same_width(file, number, cells, len(header))
    named = dict(zip(header, cells, strict=True))
    lower = {name.lower(): cell for name, cell in named.items() if name not in LETTERS}
    row: dict[str, Any] = {name: lower[name] for name in ("question", "answer", "subject") if name in lower}
    if "choices" in lower:
        row["choices"] = _list(file, number, lower["choices"])
    else:
        letters = [letter for letter in LETTERS if letter in named]
        if letters != list(LETTERS[: len(letters)]) or not letters:
            raise ValueError(f"{file} has the columns {list(header)}; expected `choices`, or `A`, `B` and so on.")
        choices = [named[letter] for letter in letters]
        while choices and not choices[-1].strip():
            choices.pop()
        row["choices"] = choices
    return row


def _list(file: Path, number: int, cell: str) -> list[Any]:
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(cell)
        except (ValueError, SyntaxError):
            continue
        if isinstance(value, (list, tuple)):
            return list(value)
    raise ValueError(
        f"Row {number} of {file}: `choices` is {cell!r:.80}; expected a JSON list of strings. Write it with "
        "json.dumps, or give a column for each letter."
    )


def _same_width(file: Path, number: int, cells: Sequence[str], columns: int) -> None:
    if len(cells) != columns:
        raise ValueError(
            f"Row {number} of {file} has {len(cells)} cells and the first line {columns}. Quote the fields that hold "
            "commas or line breaks."
        )


def _parquet_entries(file: Path) -> list[Mapping[str, Any]]:
    from pyarrow import ArrowInvalid
    from pyarrow.parquet import read_table

    try:
        return list(read_table(file).to_pylist())
    except ArrowInvalid as error:
        raise ValueError(f"{file} is not Parquet ({error}).") from error


_READERS: dict[str, Callable[[Path], list[Mapping[str, Any]]]] = {
    ".json": _json_entries,
    ".jsonl": _json_entries,
    ".csv": _csv_entries,
    ".parquet": _parquet_entries,
}
