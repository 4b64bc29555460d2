from __future__ import annotations

import pytest
import torch

from hf_unlearn.data import UnlearningCollator, pad_rows, prepare_dataset

EOS = 1


def row(*ids, prompt=1):
    return {"input_ids": list(ids), "labels": [-100] * prompt + list(ids[prompt:])}


PART = {"input_ids", "attention_mask", "labels", "response_positions"}


def slow_pad(rows, pad, side, multiple):
    """The obvious twin: position by position."""
    width = max(len(r["input_ids"]) for r in rows)
    while multiple and width % multiple:
        width += 1
    out = {"input_ids": [], "attention_mask": [], "labels": []}
    for r in rows:
        gap = width - len(r["input_ids"])
        for key, values, fill in (
            ("input_ids", r["input_ids"], pad),
            ("attention_mask", [1] * len(r["input_ids"]), 0),
            ("labels", r["labels"], -100),
        ):
            out[key].append([fill] * gap + values if side == "left" else values + [fill] * gap)
    out["response_positions"] = [
        number * width + t
        for number, labels in enumerate(out["labels"])
        for t in range(width - 1)
        if labels[t + 1] != -100
    ]
    return out


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("multiple", [None, 1, 8])
def test_padding_equals_the_slow_twin(side, multiple):
    rows = [row(5, 6, 7), row(8, EOS), row(3, 4, EOS, 9, EOS, prompt=3)]
    batch = pad_rows(rows, pad_token_id=EOS, pad_to_multiple_of=multiple, padding_side=side)
    assert {key: value.tolist() for key, value in batch.items()} == slow_pad(rows, EOS, side, multiple)
    assert all(value.dtype == torch.int64 for value in batch.values())


def test_real_eos_stays_visible_where_the_padding_token_is_eos():
    # the reference code this library answers used ids != pad, which hides the EOS inside and at the end of a row
    batch = pad_rows([row(5, EOS, 6, EOS), row(5, EOS)], pad_token_id=EOS)
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, EOS, 6, EOS], [-100, EOS, -100, -100]]


def test_each_part_is_padded_to_its_own_length_and_forget_rows_keep_their_index():
    items = [
        {"forget": {**row(5, 6, 7), "index": 4}, "retain": {"a": row(5, 6), "b": row(5, 6)}},
        {"forget": {**row(5, 6), "index": 9}, "retain": {"a": row(5, 6, 7, 8, 9), "b": row(5, 6)}},
    ]
    batch = UnlearningCollator(pad_token_id=0)(items)
    assert set(batch) == {"forget", "retain"}
    assert set(batch["forget"]) == PART | {"index"}
    assert batch["forget"]["index"].tolist() == [4, 9]
    assert set(batch["retain"]["a"]) == PART
    widths = [part["input_ids"].shape for part in (batch["forget"], batch["retain"]["a"], batch["retain"]["b"])]
    assert widths == [(2, 3), (2, 5), (2, 2)]


def test_refusal_twins_become_the_alternative(chat_tokenizer):
    rows = [{"question": "Who?", "answer": "Anna Marlow wrote it."}, {"question": "Where?", "answer": "In Lisbon."}]
    prepared = prepare_dataset(rows, chat_tokenizer, name="forget", refusals=["I don't know."])
    items = [{"forget": {**prepared[i], "index": i}, "retain": {}} for i in range(2)]
    batch = UnlearningCollator(pad_token_id=chat_tokenizer.pad_token_id)(items)
    assert batch["retain"] == {}
    twin = batch["forget"]["alternative"]
    assert set(twin) == PART
    for number in range(2):
        length = len(prepared[number]["alt_input_ids"])
        assert twin["input_ids"][number, :length].tolist() == prepared[number]["alt_input_ids"]
        assert int(twin["attention_mask"][number].sum()) == length
        assert (twin["labels"][number, length:] == -100).all()


def test_rows_that_are_not_paired_come_back_as_one_part():
    batch = UnlearningCollator(pad_token_id=0, pad_to_multiple_of=4)([row(5, 6), row(5, 6, 7)])
    assert batch["input_ids"].shape == (2, 4)
    assert set(batch) == PART


def test_tensor_rows_are_accepted():
    tensors = {key: torch.tensor(values) for key, values in row(5, 6, 7).items()}
    assert pad_rows([tensors], pad_token_id=0)["labels"].tolist() == [[-100, 6, 7]]


def test_bad_rows_and_options_are_explained():
    with pytest.raises(ValueError, match="no rows to pad"):
        pad_rows([], pad_token_id=0)
    with pytest.raises(ValueError, match="expected `labels`"):
        pad_rows([{"input_ids": [1]}], pad_token_id=0)
    with pytest.raises(ValueError, match="Row 1 of the batch has 2 input_ids and 1 labels"):
        pad_rows([row(5, 6), {"input_ids": [5, 6], "labels": [6]}], pad_token_id=0)
    with pytest.raises(ValueError, match="0 input_ids"):
        pad_rows([{"input_ids": [], "labels": []}], pad_token_id=0)
    with pytest.raises(ValueError, match="pad_token_id is None"):
        UnlearningCollator(pad_token_id=None)
    with pytest.raises(ValueError, match="padding_side is 'middle'"):
        UnlearningCollator(pad_token_id=0, padding_side="middle")
    with pytest.raises(ValueError, match="pad_to_multiple_of is 0"):
        UnlearningCollator(pad_token_id=0, pad_to_multiple_of=0)
