"""Scores of lab models: before, after, and the reference that never saw what was forgotten."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..metrics.runner import evaluate_tofu
from ..metrics.scores import TofuScores
from .recipe import LabData


def score_model(
    model: Any,
    tokenizer: Any,
    data: LabData,
    *,
    retain_limit: int | None = None,
    max_new_tokens: int = 200,
    batch_size: int = 64,
    description: str | None = None,
    cache: str | Path | None = None,
) -> TofuScores:
    """
    TOFU's scores on every part of the world.

    Args:
        model, tokenizer:
            What to score.
        data ([`LabData`]):
            Its `forget_eval`, `retain_eval` and `general_eval` parts.
        retain_limit (`int`, *optional*):
            Score only so many retain rows, evenly spaced.
        max_new_tokens (`int`, *optional*, defaults to `200`):
            Longest generated answer.
        batch_size (`int`, *optional*, defaults to `64`):
            Sequences a forward pass.
        description (`str`, *optional*):
            Text in front of the progress bars.
        cache (`str` or `Path`, *optional*):
            A JSON file: read if it is there, else written.
    """
    if cache is not None and Path(cache).is_file():
        return TofuScores.load(cache)
    scores = evaluate_tofu(
        model,
        tokenizer,
        forget=data.forget_eval,
        retain=data.retain_eval,
        general=data.general_eval,
        retain_limit=retain_limit,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        description=description,
    )
    if cache is not None:
        Path(cache).parent.mkdir(parents=True, exist_ok=True)
        scores.save(cache)
    return scores
