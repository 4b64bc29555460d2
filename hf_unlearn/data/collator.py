"""Padding: lists of rows to tensors, each part of a batch to its own length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

IGNORE_INDEX = -100
PaddingSide = Literal["right", "left"]


def pad_rows(
    rows: Sequence[Mapping[str, Any]],
    *,
    pad_token_id: int,
    pad_to_multiple_of: int | None = None,
    padding_side: PaddingSide = "right",
) -> dict[str, torch.Tensor]:
    """
    Pads rows to the longest of them. The attention mask comes from the lengths and never from the ids: where the
    padding token is also EOS, the real EOS of a row stays visible.

    Args:
        rows (`Sequence[Mapping]`):
            B rows, each with `input_ids` and `labels` of one length (lists or 1-d tensors), and perhaps `index`.
        pad_token_id (`int`):
            Id to fill `input_ids` with; labels are filled with -100.
        pad_to_multiple_of (`int`, *optional*):
            Rounds T up to a multiple.
        padding_side (`Literal["right", "left"]`, *optional*, defaults to `"right"`):
            Where the padding goes.

    Returns:
        `dict[str, Tensor]`: `input_ids`, `attention_mask`, `labels`, each (B, T) `int64`; `response_positions` (N,),
        the flat positions of (B, T) whose logits predict a label; and `index` (B,) if rows have one.

    Raises:
        ValueError: no rows, a row without tokens or labels, or `labels` and `input_ids` of different lengths.
    """
    if not rows:
        raise ValueError("There are no rows to pad; expected at least one.")
    ids = [torch.as_tensor(row["input_ids"], dtype=torch.int64) for row in rows]
    for number, (row, tokens) in enumerate(zip(rows, ids, strict=True)):
        if "labels" not in row:
            raise ValueError(f"Row {number} of the batch has {sorted(row)}; expected `labels`. Use `prepare_dataset`.")
        if len(tokens) == 0 or len(tokens) != len(row["labels"]):
            raise ValueError(
                f"Row {number} of the batch has {len(tokens)} input_ids and {len(row['labels'])} labels; expected "
                "the same number, at least one."
            )
    width = max(len(tokens) for tokens in ids)
    if pad_to_multiple_of is not None:
        width = -(-width // pad_to_multiple_of) * pad_to_multiple_of
    batch = {
        "input_ids": torch.full((len(rows), width), pad_token_id, dtype=torch.int64),
        "attention_mask": torch.zeros((len(rows), width), dtype=torch.int64),
        "labels": torch.full((len(rows), width), IGNORE_INDEX, dtype=torch.int64),
    }
    for number, (row, tokens) in enumerate(zip(rows, ids, strict=True)):
        start = width - len(tokens) if padding_side == "left" else 0
        real = slice(start, start + len(tokens))
        batch["input_ids"][number, real] = tokens
        batch["attention_mask"][number, real] = 1
        batch["labels"][number, real] = torch.as_tensor(row["labels"], dtype=torch.int64)
    # Counted here, where nothing has to wait for a device: the positions whose logits predict a label.
    ahead = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)
    batch["response_positions"] = (ahead != IGNORE_INDEX).flatten().nonzero().squeeze(-1)
    if all("index" in row for row in rows):
        batch["index"] = torch.tensor([int(row["index"]) for row in rows], dtype=torch.int64)
    return batch


@dataclass(frozen=True, kw_only=True)
class UnlearningCollator:
    """
    Collates items of [`PairedDataset`]; every part is padded to its own longest row.

    Args:
        pad_token_id (`int`):
            Id of the padding token; may be the id of EOS.
        pad_to_multiple_of (`int`, *optional*):
            Rounds the length of each part up to a multiple.
        padding_side (`Literal["right", "left"]`, *optional*, defaults to `"right"`):
            Where the padding goes.

    Returns from a call:
        `{"forget": {"input_ids", "attention_mask", "labels", "index"[, "alternative": {...}]}, "retain": {name:
        {"input_ids", "attention_mask", "labels"}}}`, tensors (B, T) with a T for each part. `alternative` is the
        refusal twin (`alt_input_ids`, `alt_labels`), there if the rows have one. Rows that are not paired (an
        evaluation dataset) come back as one flat part.

    Raises:
        ValueError: no padding token, an unknown side, or `pad_to_multiple_of` below 1.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    padding_side: PaddingSide = "right"

    def __post_init__(self) -> None:
        if self.pad_token_id is None:
            raise ValueError("pad_token_id is None. Set `tokenizer.pad_token = tokenizer.eos_token` and pass its id.")
        if self.padding_side not in ("right", "left"):
            raise ValueError(f"padding_side is {self.padding_side!r}; expected 'right' or 'left'.")
        if self.pad_to_multiple_of is not None and self.pad_to_multiple_of < 1:
            raise ValueError(f"pad_to_multiple_of is {self.pad_to_multiple_of}; expected None or at least 1.")

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Pads a list of items into one batch."""
        if not items or "forget" not in items[0]:
            return self._part(items)
        return {
            "forget": self._part([item["forget"] for item in items]),
            "retain": {name: self._part([item["retain"][name] for item in items]) for name in items[0]["retain"]},
        }

    def _part(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = self._pad(rows)
        if rows and all("alt_input_ids" in row for row in rows):
            twins = [{"input_ids": row["alt_input_ids"], "labels": row["alt_labels"]} for row in rows]
            batch["alternative"] = self._pad(twins)
        return batch

    def _pad(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        return pad_rows(
            rows,
            pad_token_id=self.pad_token_id,
            pad_to_multiple_of=self.pad_to_multiple_of,
            padding_side=self.padding_side,
        )
