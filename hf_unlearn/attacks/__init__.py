"""Attacks on unlearned models: what brings back what was forgotten; and defences to compare with."""

from .defences import SmoothLLMConfig, self_reminder, smooth_llm
from .refusal import attack_succeeds, is_refusal
from .relearn import RelearnConfig, RelearnResult, relearn

__all__ = [
    "RelearnConfig",
    "RelearnResult",
    "SmoothLLMConfig",
    "attack_succeeds",
    "is_refusal",
    "relearn",
    "self_reminder",
    "smooth_llm",
]
