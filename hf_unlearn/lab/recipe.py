"""What a lab model is trained on and how: the values whose hash names the cached model."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .models import Architecture

if TYPE_CHECKING:
    from datasets import Dataset

# Raise when a change of the lab's code changes what a recipe trains: cached models of older versions are not reused.
RECIPE_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class LabRecipe:
    """Size and training of a lab model; two equal recipes on equal data give the same model."""

    architecture: Architecture = "llama"
    vocab_size: int = 4096
    hidden_size: int = 192
    num_layers: int = 4
    num_heads: int = 6
    intermediate_size: int = 512
    epochs: float = 30
    learning_rate: float = 2e-3
    batch_size: int = 16
    bf16: bool = False
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class LabData:
    """
    A world to learn and to forget: the training rows, and the evaluation rows with paraphrases and wrong answers.

    Every dataset has `question` and `answer` (`str`); evaluation parts add TOFU's `perturbed_answer` and, where they
    have them, `paraphrased_answer` and `paraphrased_question`. `general` is what every model knows (for TOFU real
    authors and world facts); `holdout` is of the same kind as `forget`, and no model is ever trained on it.
    """

    name: str
    forget: Dataset
    retain: Dataset
    forget_eval: Dataset
    retain_eval: Dataset
    general: Mapping[str, Dataset] = field(default_factory=dict)
    general_eval: Mapping[str, Dataset] = field(default_factory=dict)
    holdout: Dataset | None = None

    def texts(self) -> list[str]:
        """The corpus for the tokenizer: all that is trained on, in a fixed order."""
        parts = [self.retain, self.forget, *self.general.values()]
        return [text for part in parts for row in part for text in (row["question"], row["answer"])]

    def training_rows(self, *, with_forget: bool) -> list[dict[str, str]]:
        """Question-answer rows of the target (`with_forget`) or of the retain-only reference."""
        parts = [self.retain, *([self.forget] if with_forget else []), *self.general.values()]
        return [{"question": row["question"], "answer": row["answer"]} for part in parts for row in part]


def cache_directory() -> Path:
    """`$HF_UNLEARN_CACHE`, else `hf_unlearn` under the user's cache directory (`$XDG_CACHE_HOME` or `~/.cache`)."""
    if os.environ.get("HF_UNLEARN_CACHE"):
        return Path(os.environ["HF_UNLEARN_CACHE"]).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base).expanduser() / "hf_unlearn"


def recipe_hash(recipe: LabRecipe, texts: list[str], rows: list[dict[str, str]]) -> str:
    """16 hexadecimal digits over the recipe, the tokenizer's corpus and the training rows."""
    payload = json.dumps(
        {"version": RECIPE_VERSION, "recipe": asdict(recipe), "texts": texts, "rows": rows},
        sort_keys=True,
        ensure_ascii=False,
    )
    return hashlib.sha256(payload.encode("utf-8")).hexdigest()[:16]
