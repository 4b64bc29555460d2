"""MUSE's files from a folder: the layouts of the hub and of the benchmark's code, and errors that name the place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_unlearn.data.muse_files import MUSE_FILES, load_muse

QA = [{"question": "Who?", "answer": "Ines."}, {"question": "Where?", "answer": "Here."}]


def write(folder: Path, name: str, content: Any) -> None:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def test_lists_lines_strings_and_shards_of_parquet_are_read_alike(tmp_path: Path) -> None:
    write(tmp_path, "knowmem/forget_qa.json", QA)
    write(tmp_path, "knowmem/forget_qa_icl.jsonl", "\n".join(map(json.dumps, QA)))
    write(tmp_path, "privleak/forget.json", ["one text", "two texts"])
    write(tmp_path, "privleak/holdout.json", [{"text": "three texts", "id": 3}])
    for number, row in enumerate(QA):
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / f"knowmem/retain_qa-0000{number}-of-00002.parquet")
    found = load_muse(tmp_path)
    assert found.rows["knowmem/forget_qa"] == found.rows["knowmem/forget_qa_icl"] == found.rows["knowmem/retain_qa"]
    assert found.rows["knowmem/retain_qa"] == QA
    assert found.rows["privleak/forget"] == [{"text": "one text"}, {"text": "two texts"}]
    assert found.rows["privleak/holdout"] == [{"text": "three texts"}]
    assert set(found.absent) == {"verbmem/forget", "knowmem/retain_qa_icl"}
    assert "there is no verbmem/forget.json" in found.absent["verbmem/forget"]
    assert set(found.rows) | set(found.absent) == set(MUSE_FILES)


BAD: list[tuple[str, Any, type[Exception], str]] = [
    ("verbmem/forget.json", [], ValueError, r"forget\.json holds no rows"),
    ("verbmem/forget.json", "{", ValueError, r"forget\.json is neither a JSON list nor"),
    (
        "verbmem/forget.json",
        ["text"],
        TypeError,
        r"Row 0 of .*forget\.json is a str; expected an object with `prompt`",
    ),
    ("verbmem/forget.json", [{"prompt": "a"}], ValueError, r"Row 0 of .* has no `gt`, it has \['prompt'\]"),
    ("knowmem/retain_qa.json", [*QA, {"question": "a", "answer": 1}], TypeError, r"`answer` of row 2 of .* is a int"),
    ("privleak/forget.json", ["a", " "], ValueError, r"`text` of row 1 of .* is blank"),
    ("privleak/forget.parquet", "no", ValueError, r"forget\.parquet is not Parquet"),
]


@pytest.mark.parametrize(("name", "content", "error", "message"), BAD, ids=[row[3][:40] for row in BAD])
def test_errors_name_the_file_and_the_row(
    tmp_path: Path, name: str, content: Any, error: type[Exception], message: str
) -> None:
    write(tmp_path, name, content)
    with pytest.raises(error, match=message):
        load_muse(tmp_path)


def test_another_encoding_is_named_with_the_file(tmp_path: Path) -> None:
    (tmp_path / "privleak").mkdir()
    (tmp_path / "privleak" / "forget.json").write_bytes('["Jürgen"]'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"forget\.json is not UTF-8 .* at byte 3"):
        load_muse(tmp_path)


def test_a_folder_without_files_says_what_it_holds_and_where_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent is not a folder"):
        load_muse(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="holds nothing; expected at least one of verbmem"):
        load_muse(tmp_path)
    write(tmp_path, "books/verbmem/forget.json", [])
    with pytest.raises(FileNotFoundError, match=r"Give one corpus: .*books\."):
        load_muse(tmp_path)
