"""Rows of a small world in TOFU's parts, and tiny models on which they differ; for tests and their workers."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from hf_unlearn.evaluation.tofu import run_tofu
from hf_unlearn.evaluation.tofu_files import TofuEvaluation
from hf_unlearn.lab.models import tiny_config, tiny_model
from hf_unlearn.lab.tokenizer import train_tokenizer
from hf_unlearn.lab.world import make_world

ANSWER = 6  # tokens of an answer
_TEXTS = ("question", "answer", "perturbed_answer")


@cache
def parts() -> dict[str, Any]:
    """Arguments of [`run_tofu`]: 8 forget rows, 7 retain rows, two general parts of 4, 8 holdout rows."""
    world, other = make_world(seed=0, num_authors=20, questions_per_author=4), make_world(seed=1, num_authors=10)
    general = [{name: row[name] for name in _TEXTS} for row in other.split("retain_perturbed").select(range(8))]
    return {
        "forget": [dict(row) for row in world.split("forget10_perturbed")],
        "retain": [dict(row) for row in world.split("retain_perturbed").select(range(7))],
        "general": {"real_authors": general[:4], "world_facts": general[4:]},
        "holdout": [dict(row) for row in world.split("holdout10_perturbed")],
    }


@cache
def tokenizer() -> Any:
    """Trained on these rows."""
    rows = [*parts()["forget"], *parts()["retain"], *parts()["general"]["real_authors"]]
    return train_tokenizer([text for row in rows for text in (row["question"], row["answer"])], 400)


def build(seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A random model that is far from uniform, so that order and masks matter."""
    model = tiny_model(tiny_config(tokenizer(), hidden_size=32, num_layers=2, num_heads=4, max_positions=256), seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
    return model.to(dtype)


def run(model: Any = None, **changes: Any) -> TofuEvaluation:
    """A run with few resamples and without holdout rows; `changes` win."""
    arguments = {**parts(), "holdout": None, "max_new_tokens": ANSWER, "resamples": 10, **changes}
    return run_tofu(build() if model is None else model, tokenizer(), **arguments)
