"""Scoring in pieces: the plain functions' numbers, what is finished is kept, and nothing old is taken for new."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tofu_kit import ANSWER, build, parts, tokenizer

from hf_unlearn.data import tokenize_example, tokenize_prompt
from hf_unlearn.evaluation import pieces as pieces_module
from hf_unlearn.evaluation import session as module
from hf_unlearn.evaluation.session import Session
from hf_unlearn.metrics import greedy, mean_nll, score_tokens
from hf_unlearn.reports.schema import write_text

ROWS = [{"question": row["question"], "answer": row["answer"]} for row in [*parts()["forget"], *parts()["retain"]]]


@pytest.fixture(scope="module")
def model() -> Any:
    return build()


@pytest.fixture(scope="module")
def encoded() -> list[dict[str, list[int]]]:
    return [tokenize_example(row, tokenizer()) for row in ROWS]


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return [tokenize_prompt(row, tokenizer()) for row in ROWS]


class Counted:
    """A scoring function with the number of items it was given."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.calls: list[list[Any]] = []
        self.fail_at = fail_at

    def __call__(self, items: list[Any], text: str | None) -> list[Any]:
        self.calls.append(items)
        if len(self.calls) == self.fail_at:
            raise RuntimeError("out of memory")
        return [item * 10 for item in items]


def scored(session: Session, score: Any, items: Any = range(10), **settings: Any) -> list[Any]:
    items = list(items)
    return session.map("numbers", items, score, lengths=items, settings=settings)


# ------------------------------------------------------------------------------------------------ the same numbers


@pytest.mark.parametrize("batch_size", [1, 32])
@pytest.mark.parametrize("side", ["left", "right"])
def test_scores_are_those_of_the_plain_functions_at_any_batch_size_and_padding_side(
    model: Any, encoded: Any, prompts: Any, batch_size: int, side: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr(tokenizer(), "padding_side", side)
    session = Session(model, tokenizer(), batch_size=batch_size, piece_batches=2)
    pad = tokenizer().pad_token_id
    alone = [mean_nll(model, [row], pad_token_id=pad)[0] for row in encoded]
    np.testing.assert_allclose(session.nll("rows", encoded), alone, rtol=0, atol=1e-5)
    tokens = session.token_scores("rows", encoded)
    for number, row in enumerate(encoded):
        twin = score_tokens(model, [row], pad_token_id=pad)
        for name in ("log_probs", "mu", "sigma"):
            np.testing.assert_allclose(getattr(tokens, name)[number], getattr(twin, name)[0], rtol=0, atol=1e-4)
        assert tokens.predictions[number].tolist() == twin.predictions[0].tolist()
        assert tokens.labels[number].tolist() == twin.labels[0].tolist()
    answers = session.answers("rows", prompts, max_new_tokens=ANSWER)
    assert answers == [greedy(model, tokenizer(), [prompt], max_new_tokens=ANSWER)[0] for prompt in prompts]
    assert len(set(answers)) > 3


def test_reading_back_changes_no_bit(model: Any, encoded: Any, prompts: Any, tmp_path: Path) -> None:
    runs = []
    for _ in range(2):
        session = Session(model, tokenizer(), output_dir=tmp_path, batch_size=2)
        tokens = session.token_scores("rows", encoded)
        runs.append((session.nll("rows", encoded), tokens, session.answers("rows", prompts, max_new_tokens=ANSWER)))
    first, second = runs
    assert first[0].tolist() == second[0].tolist()
    assert first[2] == second[2]
    for name in ("log_probs", "mu", "sigma", "predictions", "labels"):
        for one, other in zip(getattr(first[1], name), getattr(second[1], name), strict=True):
            np.testing.assert_array_equal(one, other)
            assert one.dtype == other.dtype


def test_infinite_values_survive_the_file(model: Any, tmp_path: Path) -> None:
    def score(items: list[Any], text: str | None) -> list[Any]:
        return [[math.inf, -math.inf, item] for item in items]

    for _ in range(2):
        assert scored(Session(model, tokenizer(), output_dir=tmp_path), score, [1, 2]) == [
            [math.inf, -math.inf, 1],
            [math.inf, -math.inf, 2],
        ]
    for path in tmp_path.glob("pieces/*.json"):
        assert "Infinity" not in path.read_text()


def test_longest_first_in_whole_pieces(model: Any) -> None:
    count = Counted()
    assert scored(Session(model, tokenizer(), batch_size=2, piece_batches=2), count) == [10 * at for at in range(10)]
    assert count.calls == [[9, 8, 7, 6], [5, 4, 3, 2], [1, 0]]


# ------------------------------------------------------------------------------------------------- what is kept


def test_what_failed_goes_on_after_the_last_whole_piece_with_another_batch_size(model: Any, tmp_path: Path) -> None:
    failing = Counted(fail_at=3)
    with pytest.raises(RuntimeError, match="out of memory"):
        scored(Session(model, tokenizer(), output_dir=tmp_path, batch_size=1, piece_batches=3), failing)
    again = Counted()
    assert scored(Session(model, tokenizer(), output_dir=tmp_path, batch_size=8), again) == [
        10 * at for at in range(10)
    ]
    assert again.calls == [[3, 2, 1, 0]], "six items were finished"
    third = Counted()
    scored(Session(model, tokenizer(), output_dir=tmp_path), third)
    assert third.calls == []


def test_nothing_of_another_model_setting_or_text_is_used(model: Any, tmp_path: Path) -> None:
    scored(Session(model, tokenizer(), output_dir=tmp_path), Counted(), limit=3)
    changed = build()
    with torch.no_grad():
        changed.model.norm.weight[0] += 1e-3
    rescaled = build()
    rescaled.config.rms_norm_eps = 1e-2
    for other, items, settings in (
        (changed, range(10), {"limit": 3}),
        (rescaled, range(10), {"limit": 3}),
        (model, range(10), {"limit": 4}),
        (model, range(9, -1, -1), {"limit": 3}),
        (model, range(9), {"limit": 3}),
    ):
        count = Counted()
        scored(Session(other, tokenizer(), output_dir=tmp_path), count, items, **settings)
        assert sum(map(len, count.calls)) == len(items)
    count = Counted()
    scored(Session(build(), tokenizer(), output_dir=tmp_path), count, limit=3)
    assert count.calls == [], "the same weights, loaded again"


def test_longer_answers_are_not_taken_from_shorter_ones(model: Any, prompts: Any, tmp_path: Path) -> None:
    session = Session(model, tokenizer(), output_dir=tmp_path)
    short, long = (session.answers("rows", prompts, max_new_tokens=tokens) for tokens in (1, ANSWER))
    assert short != long == greedy(model, tokenizer(), prompts, max_new_tokens=ANSWER)


@pytest.mark.parametrize("text", ['{"format": "hf_unlearn.piece", "ver', "[]", '{"format": "other"}'])
def test_a_piece_that_cannot_be_read_is_scored_again(model: Any, tmp_path: Path, text: str, recwarn: Any) -> None:
    scored(Session(model, tokenizer(), output_dir=tmp_path, batch_size=1, piece_batches=5), Counted())
    broken, kept = sorted((tmp_path / "pieces").iterdir())
    broken.write_text(text)
    count = Counted()
    assert scored(Session(model, tokenizer(), output_dir=tmp_path), count) == [10 * at for at in range(10)]
    assert count.calls == [[4, 3, 2, 1, 0]]
    assert any("cannot be read" in str(one.message) for one in recwarn) == ("ver" in text)
    assert kept.is_file()


def test_pieces_hold_strict_json_and_say_what_they_are(model: Any, tmp_path: Path) -> None:
    scored(Session(model, tokenizer(), output_dir=tmp_path), Counted(), [7])
    (path,) = (tmp_path / "pieces").iterdir()
    content = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert (content["format"], content["name"], content["values"]) == ("hf_unlearn.piece", "numbers", {"0": 70})


def test_a_name_is_no_path(model: Any, tmp_path: Path) -> None:
    session = Session(model, tokenizer(), output_dir=tmp_path / "out")
    session.map("../../evil name", [1], Counted(), lengths=[1], settings={})
    assert [path.name for path in tmp_path.rglob("*.json")] == [
        path.name for path in (tmp_path / "out" / "pieces").iterdir()
    ]


def test_without_a_folder_nothing_is_written(model: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert scored(Session(model, tokenizer()), Counted(), [1]) == [10]
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------- bad input


def test_an_unwritable_folder_is_an_error_before_the_model_is_touched(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "model_hash", lambda model: pytest.fail("computed"))
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot be written .* Nothing has been computed"):
        Session(build(), tokenizer(), output_dir=tmp_path / "file")


def test_a_full_disk_ends_the_scoring_and_keeps_what_was_written(model: Any, tmp_path: Path, monkeypatch: Any) -> None:
    session = Session(model, tokenizer(), output_dir=tmp_path, batch_size=1, piece_batches=5)
    written: list[Path] = []

    def write(path: Path, text: str) -> Path:
        if written:
            raise OSError(28, "No space left on device")
        written.append(write_text(path, text))
        return path

    monkeypatch.setattr(pieces_module, "write_text", write)
    with pytest.raises(OSError, match="No space left"):
        scored(session, Counted())
    assert [path.name for path in (tmp_path / "pieces").iterdir()] == [written[0].name]


def test_what_cannot_be_scored_is_refused(model: Any, encoded: Any) -> None:
    with pytest.raises(ValueError, match="batch_size is 0"):
        Session(model, tokenizer(), batch_size=0)
    session = Session(model, tokenizer())
    with pytest.raises(ValueError, match="rows: there is nothing to score"):
        session.nll("rows", [])
    with pytest.raises(ValueError, match="Row 0 has no response token"):
        session.nll("rows", [{"input_ids": [5, 6], "labels": [-100, -100]}])
    broken = build()
    with torch.no_grad():
        broken.model.norm.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="NaN"):
        Session(broken, tokenizer()).nll("rows", encoded[:2])


def test_sharded_weights_have_likelihoods_only(encoded: Any, prompts: Any, tmp_path: Path) -> None:
    model = build()
    expected = mean_nll(model, encoded, pad_token_id=tokenizer().pad_token_id)
    model.model.norm.weight.ds_id = 0  # what ZeRO-3 marks a part of a weight with
    session = Session(model, tokenizer(), output_dir=tmp_path)
    assert session.sharded
    assert session.model_hash is None
    assert "sharded" in str(session.hash_obstacle)
    np.testing.assert_allclose(session.nll("rows", encoded), expected, atol=1e-5)
    for part in model.modules():
        if hasattr(part, "attention_dropout"):
            part.attention_dropout = 0.5
    model.train()
    np.testing.assert_allclose(session.nll("rows", encoded), expected, atol=1e-5)
    assert model.training, "modes are given back"
    with pytest.raises(ValueError, match=r"1 of 2 rows \(first row 1\) have no likelihood"):
        session.nll("rows", [encoded[0], {"input_ids": [5, 6], "labels": [-100, -100]}])
    with pytest.raises(ValueError, match="there is nothing to score"):
        session.nll("rows", [])
    assert list((tmp_path / "pieces").iterdir()) == [], "these weights cannot be told from others"
    for refused in (lambda: session.answers("rows", prompts), lambda: session.token_scores("rows", encoded)):
        with pytest.raises(ValueError, match=r"sharded .* from_pretrained"):
            refused()
