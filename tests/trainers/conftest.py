"""One small world for all trainer tests; built once a session, copied by every test."""

from __future__ import annotations

import pytest
import torch
from kit import Lab

from hf_unlearn.data import pad_rows, prepare_dataset
from hf_unlearn.lab.models import tiny_config, tiny_model
from hf_unlearn.lab.tokenizer import train_tokenizer
from hf_unlearn.lab.world import make_world


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Matrices this small are faster on one thread, and their sums then always run in one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def lab() -> Lab:
    world = make_world(seed=0, num_authors=10, questions_per_author=4)
    rows = world.full.select_columns(["question", "answer"])
    texts = [text for row in rows for text in (row["question"], row["answer"])]
    tokenizer = train_tokenizer(texts, 600)
    shape = tiny_config(tokenizer, hidden_size=32, num_layers=2, num_heads=4, max_positions=128)
    parts = {"forget": range(10), "retain": range(10, 26), "facts": range(26, 33)}
    blank = tiny_model(shape, seed=1)
    known = prepare_dataset(rows.select(range(33)), tokenizer, name="lab")
    return Lab(
        tokenizer=tokenizer,
        blank=blank,
        target=_learn(tiny_model(shape, seed=1), list(known), tokenizer.pad_token_id),
        holdout=world.holdout.select_columns(["question", "answer"]),
        **{name: rows.select(indices) for name, indices in parts.items()},
    )


def _learn(model, rows, pad_token_id):
    """A model that knows its rows (NLL about 0.07), in three seconds."""
    batch = pad_rows(rows, pad_token_id=pad_token_id)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(60):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()
