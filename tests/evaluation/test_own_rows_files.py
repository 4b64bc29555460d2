"""A user's own rows: what is read, and errors that name file, line and field before anything is computed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hf_unlearn.data.own_rows import load_own_rows

ROW = {"question": "Who keeps the ferry?", "answer": "Ines keeps it."}


def write(folder: Path, *lines: Any, name: str = "own.jsonl") -> Path:
    file = folder / name
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    file.write_text("\n".join(texts), encoding="utf-8")
    return file


def test_parts_come_forget_first_and_rows_in_the_order_of_the_file(tmp_path: Path) -> None:
    rows = [
        {**ROW, "part": "neighbours", "index": 1, "perturbed_answer": ["Yes."]},
        {**ROW, "part": "retain", "answer": "Paul does."},
        {**ROW, "index": "a", "author": "left alone"},
        "",
        {**ROW, "part": "neighbours", "index": 0, "answer": "No.", "perturbed_answer": ["Yes.", "Maybe."]},
        {**ROW, "part": "forget", "index": "b", "paraphrased_question": None},
    ]
    found = load_own_rows(write(tmp_path, *rows))
    assert list(found) == ["forget", "retain", "neighbours"]
    assert [row["index"] for row in found["forget"]] == ["a", "b"]
    assert set(found["forget"][1]) == {"question", "answer", "index"}, "null is absent, unknown fields are left alone"
    assert [row["perturbed_answer"] for row in found["neighbours"]] == [["Yes."], ["Yes.", "Maybe."]]
    assert found["retain"] == [{"question": ROW["question"], "answer": "Paul does."}]


def test_a_list_and_lines_of_json_give_the_same_rows(tmp_path: Path) -> None:
    rows = [ROW, {"question": "A\u2028b?", "answer": "Line separators are text."}]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    assert load_own_rows(write(tmp_path, lines)) == load_own_rows(write(tmp_path, json.dumps(rows), name="own.json"))


BAD: list[tuple[Any, type[Exception], str]] = [
    ('{"question": "a"', ValueError, r"Line 2 of .*own\.jsonl is not JSON"),
    ('["a"]', TypeError, r"Line 2 of .* is a list; expected an object"),
    ({"question": "a"}, ValueError, r"Line 2 of .* has no `answer`, it has \['question'\]"),
    ({"prompt": "a", "answer": "b"}, ValueError, r"Line 2 .* has no `question`"),
    ({**ROW, "question": " "}, ValueError, r"`question` of line 2 of .* is blank"),
    ({**ROW, "answer": 3}, TypeError, r"`answer` of line 2 of .* is a int; expected a string"),
    ({**ROW, "perturbed_answer": "no"}, TypeError, r"`perturbed_answer` of line 2 .* is a str; expected a list"),
    ({**ROW, "perturbed_answer": []}, ValueError, r"`perturbed_answer` of line 2 .* is empty"),
    ({**ROW, "perturbed_answer": ["x", ""]}, ValueError, r"`perturbed_answer\[1\]` of line 2 .* is blank"),
    ({**ROW, "perturbed_answers": ["x"]}, ValueError, r"a field 'perturbed_answers'; expected `perturbed_answer`"),
    ({**ROW, "part": "a b"}, ValueError, r"`part` of line 2 .* is 'a b'; expected a name of letters"),
    ({**ROW, "part": "../x"}, ValueError, r"`part` of line 2"),
    ({**ROW, "index": 1.5}, TypeError, r"`index` of line 2 .* is a float"),
    ({**ROW, "index": True}, TypeError, r"`index` of line 2 .* is a bool"),
    ({**ROW, "index": 7}, ValueError, r"`index` of line 2 of .* is 7, as that of line 1 of .*each once"),
    (ROW, ValueError, r"Line 2 of .* has no `index`, as 1 of the 2 rows of the part 'forget'"),
    ({**ROW, "index": 8, "paraphrased_answer": "y"}, ValueError, r"Line 1 of .* has no `paraphrased_answer`"),
]


@pytest.mark.parametrize(("line", "error", "message"), BAD, ids=[message[:40] for _, _, message in BAD])
def test_errors_name_file_line_and_field(tmp_path: Path, line: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_own_rows(write(tmp_path, {**ROW, "index": 7}, line))


def test_another_encoding_is_named_with_the_file_and_the_place(tmp_path: Path) -> None:
    (tmp_path / "own.jsonl").write_bytes('{"question": "Wer?", "answer": "Jürgen"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"own\.jsonl is not UTF-8 .* at byte \d+"):
        load_own_rows(tmp_path / "own.jsonl")


def test_half_a_character_is_named_before_a_tokenizer_meets_it(tmp_path: Path) -> None:
    (tmp_path / "own.jsonl").write_text('{"question": "Who?", "answer": "It is \\ud83d."}')
    with pytest.raises(ValueError, match=r"`answer` of line 1 of .* has half a character .* at 6"):
        load_own_rows(tmp_path / "own.jsonl")


def test_parts_whose_names_mean_something_else_are_refused(tmp_path: Path) -> None:
    for part, message in (
        ("holdout", "Give that as holdout_dataset"),
        ("friends_plain", "names of other metrics"),
        ("forget_paraphrased_answer", "names of other metrics"),
    ):
        with pytest.raises(ValueError, match=rf"`part` of line 1 of .* is '{part}', .*{message}"):
            load_own_rows(write(tmp_path, {**ROW, "part": part}))


def test_equal_indices_in_two_parts_are_two_rows(tmp_path: Path) -> None:
    file = write(tmp_path, {**ROW, "index": 7}, {**ROW, "index": 7, "part": "retain"})
    assert {part: len(rows) for part, rows in load_own_rows(file).items()} == {"forget": 1, "retain": 1}


def test_paths_without_rows_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.jsonl is not a file"):
        load_own_rows(tmp_path / "absent.jsonl")
    with pytest.raises(ValueError, match=r"ends with '\.csv'; expected \.jsonl"):
        load_own_rows(write(tmp_path, ROW, name="own.csv"))
    with pytest.raises(ValueError, match="holds no rows"):
        load_own_rows(write(tmp_path, ""))
    with pytest.raises(ValueError, match=r"own\.json is not JSON"):
        load_own_rows(write(tmp_path, "[1, ", name="own.json"))
