"""
Metrics of unlearning: functions over arrays, and the evaluation of a model.

Importing this package loads numpy only; scipy and rouge-score load at their first use, torch and transformers with the
first name of the evaluation.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hf_unlearn.metrics import functional
from hf_unlearn.metrics.functional import *  # noqa: F403

if TYPE_CHECKING:
    from hf_unlearn.metrics.generate import greedy as greedy
    from hf_unlearn.metrics.likelihood import mean_nll as mean_nll
    from hf_unlearn.metrics.runner import evaluate_part as evaluate_part
    from hf_unlearn.metrics.runner import evaluate_tofu as evaluate_tofu
    from hf_unlearn.metrics.runner import evenly_spaced as evenly_spaced
    from hf_unlearn.metrics.scores import PartScores as PartScores
    from hf_unlearn.metrics.scores import TofuScores as TofuScores

# Lazy: these need torch and transformers, which the functions over arrays do not.
_OWNERS = {
    "PartScores": "scores",
    "TofuScores": "scores",
    "evaluate_part": "runner",
    "evaluate_tofu": "runner",
    "evenly_spaced": "runner",
    "greedy": "generate",
    "mean_nll": "likelihood",
}

__all__ = [*functional.__all__, *_OWNERS]


def __getattr__(name: str) -> Any:
    if name not in _OWNERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_OWNERS[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
