"""A tiny model that knows some sentences about invented people, for tests of plans; built in a few seconds."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset

from hf_unlearn.data import pad_rows, prepare_dataset
from hf_unlearn.lab.models import tiny_config, tiny_model
from hf_unlearn.lab.tokenizer import train_tokenizer
from hf_unlearn.lab.world import make_world


@dataclass(frozen=True, kw_only=True)
class SmallLab:
    """Rows with `question` and `answer`, the tokenizer, and a model that answers them word by word."""

    tokenizer: Any
    forget: Dataset  # 6 rows
    retain: Dataset  # 12 rows
    target: Any

    def model(self, dtype: torch.dtype = torch.float32) -> Any:
        return copy.deepcopy(self.target).to(dtype)

    def rows(self, name: str = "forget") -> list[dict[str, list[int]]]:
        """Tokenised."""
        prepared = prepare_dataset(getattr(self, name), self.tokenizer, name=name)
        return [{"input_ids": list(row["input_ids"]), "labels": list(row["labels"])} for row in prepared]


def make_lab() -> SmallLab:
    rows = make_world(seed=0, num_authors=10, questions_per_author=4).full.select_columns(["question", "answer"])
    rows = rows.select(range(18))
    tokenizer = train_tokenizer([text for row in rows for text in (row["question"], row["answer"])], 600)
    shape = tiny_config(tokenizer, hidden_size=32, num_layers=2, num_heads=4, max_positions=128)
    model = tiny_model(shape, seed=1)
    batch = pad_rows(list(prepare_dataset(rows, tokenizer, name="lab")), pad_token_id=tokenizer.pad_token_id)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(60):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return SmallLab(
        tokenizer=tokenizer, forget=rows.select(range(6)), retain=rows.select(range(6, 18)), target=model.eval()
    )
