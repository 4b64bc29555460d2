"""Long texts to rows of one length, for books and corpora whose rows are longer than the model can read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def chunk_text(
    dataset: Iterable[Any], tokenizer: PreTrainedTokenizerBase, length: int, *, column: str = "text"
) -> Dataset:
    """
    Joins all texts, EOS between them, and cuts the stream of tokens into rows; every token is predicted once.

    Args:
        dataset (`Iterable`):
            Rows with the column.
        tokenizer (`PreTrainedTokenizerBase`):
            Adds no special tokens of its own here.
        length (`int`):
            Tokens in a row; the last row may be shorter, and is dropped if it has a single token.
        column (`str`, *optional*, defaults to `"text"`):
            Where the text is.

    Returns:
        `Dataset` with `input_ids` and `labels` (equal: the loss is on all of the text).

    Raises:
        ValueError: `length` below 2, no such column, or no text at all.
    """
    from datasets import Dataset

    if length < 2:
        raise ValueError(f"length is {length}; expected at least 2 tokens.")
    stream: list[int] = []
    for number, row in enumerate(dataset):
        if column not in row:
            raise ValueError(f"Row {number} has {sorted(row)}; chunking needs the column {column!r}.")
        stream += tokenizer(row[column], add_special_tokens=False)["input_ids"]
        if tokenizer.eos_token_id is not None:
            stream.append(tokenizer.eos_token_id)
    rows = [stream[start : start + length] for start in range(0, len(stream), length)]
    rows = [ids for ids in rows if len(ids) > 1]
    if not rows:
        raise ValueError("There is no text to cut into rows; expected at least two tokens.")
    return Dataset.from_list([{"input_ids": ids, "labels": list(ids)} for ids in rows])
