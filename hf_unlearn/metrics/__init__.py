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
    from hf_unlearn.metrics.harness import evaluate_with_harness as evaluate_with_harness
    from hf_unlearn.metrics.likelihood import mean_nll as mean_nll
    from hf_unlearn.metrics.modules import load_metric as load_metric
    from hf_unlearn.metrics.modules import module_path as module_path
    from hf_unlearn.metrics.multiple_choice import Accuracy as Accuracy
    from hf_unlearn.metrics.multiple_choice import ChoiceScores as ChoiceScores
    from hf_unlearn.metrics.multiple_choice import choice_scores as choice_scores
    from hf_unlearn.metrics.multiple_choice import evaluate_multiple_choice as evaluate_multiple_choice
    from hf_unlearn.metrics.muse import PrivacyLeakage as PrivacyLeakage
    from hf_unlearn.metrics.muse import knowledge_memorization as knowledge_memorization
    from hf_unlearn.metrics.muse import privacy_leakage as privacy_leakage
    from hf_unlearn.metrics.muse import text_min_k_scores as text_min_k_scores
    from hf_unlearn.metrics.muse import verbatim_memorization as verbatim_memorization
    from hf_unlearn.metrics.runner import evaluate_part as evaluate_part
    from hf_unlearn.metrics.runner import evaluate_tofu as evaluate_tofu
    from hf_unlearn.metrics.runner import evenly_spaced as evenly_spaced
    from hf_unlearn.metrics.scores import PartScores as PartScores
    from hf_unlearn.metrics.scores import TofuScores as TofuScores
    from hf_unlearn.metrics.token_scores import TokenScores as TokenScores
    from hf_unlearn.metrics.token_scores import gradient_norms as gradient_norms
    from hf_unlearn.metrics.token_scores import score_tokens as score_tokens

# Lazy: these need torch and transformers, which the functions over arrays do not.
_OWNERS = {
    "Accuracy": "multiple_choice",
    "ChoiceScores": "multiple_choice",
    "PartScores": "scores",
    "PrivacyLeakage": "muse",
    "TofuScores": "scores",
    "TokenScores": "token_scores",
    "choice_scores": "multiple_choice",
    "evaluate_multiple_choice": "multiple_choice",
    "evaluate_part": "runner",
    "evaluate_tofu": "runner",
    "evaluate_with_harness": "harness",
    "evenly_spaced": "runner",
    "gradient_norms": "token_scores",
    "greedy": "generate",
    "knowledge_memorization": "muse",
    "load_metric": "modules",
    "mean_nll": "likelihood",
    "module_path": "modules",
    "privacy_leakage": "muse",
    "score_tokens": "token_scores",
    "text_min_k_scores": "muse",
    "verbatim_memorization": "muse",
}

__all__ = [*functional.__all__, *_OWNERS]


def __getattr__(name: str) -> Any:
    if name not in _OWNERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_OWNERS[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
