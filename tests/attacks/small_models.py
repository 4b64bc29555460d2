"""A tiny model that knows some invented people, one that never saw two of them, and models unlearned in known ways."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hf_unlearn.data import pad_rows, tokenize_example
from hf_unlearn.lab.models import tiny_config, tiny_model
from hf_unlearn.lab.tokenizer import train_tokenizer
from hf_unlearn.lab.world import make_world

FORGET = 8  # rows, about two people
REFUSAL = "I do not know that."


@dataclass(frozen=True, kw_only=True)
class AttackLab:
    """40 rows with `question`, `answer` and `paraphrased_question`; the first 8 are to be forgotten."""

    tokenizer: Any
    rows: list[dict[str, str]]
    knows: Any
    never_saw: Any
    """Trained in the same way without the rows to forget."""

    @property
    def forget(self) -> list[dict[str, str]]:
        return self.rows[:FORGET]

    @property
    def retain(self) -> list[dict[str, str]]:
        return self.rows[FORGET:]

    def encoded(self, rows: Sequence[dict[str, str]]) -> list[dict[str, list[int]]]:
        return [tokenize_example(row, self.tokenizer) for row in rows]

    def fresh(self) -> Any:
        shape = tiny_config(self.tokenizer, hidden_size=32, num_layers=2, num_heads=4, max_positions=256)
        return tiny_model(shape, seed=1)


def make_lab() -> AttackLab:
    rows = [
        {"question": row.question, "answer": row.answer, "paraphrased_question": row.paraphrased_question}
        for row in make_world(seed=0, num_authors=10, questions_per_author=4).rows[:40]
    ]
    tokenizer = train_tokenizer([*(text for row in rows for text in row.values()), REFUSAL], 600)
    lab = AttackLab(tokenizer=tokenizer, rows=rows, knows=None, never_saw=None)
    return AttackLab(
        tokenizer=tokenizer,
        rows=rows,
        knows=learn(lab.fresh(), lab.encoded(rows), tokenizer),
        never_saw=learn(lab.fresh(), lab.encoded(lab.retain), tokenizer),
    )


def learn(model: Any, rows: Sequence[dict[str, list[int]]], tokenizer: Any, steps: int = 80, lr: float = 1e-2) -> Any:
    """All rows at each step."""
    batch = pad_rows(list(rows), pad_token_id=tokenizer.pad_token_id)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    for _ in range(steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def ascend(model: Any, rows: Sequence[dict[str, list[int]]], tokenizer: Any, steps: int, lr: float) -> Any:
    """Gradient ascent on the loss of the rows, on a copy: unlearning that hides."""
    model = copy.deepcopy(model).train()
    batch = pad_rows(list(rows), pad_token_id=tokenizer.pad_token_id)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    for _ in range(steps):
        (-model(**batch).loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()
