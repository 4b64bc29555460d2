"""Constrained weight edits: the smallest change of one matrix that keeps its outputs away from named points."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .certificate import Certificate
    from .dinkelbach import SingleActivation, solve_single_activation
    from .metric import Metric
    from .problem import Kind
    from .single_pair import closed_form
    from .solve import Edit, solve_pcr

_OWNERS = {
    "Certificate": "certificate",
    "Edit": "solve",
    "Kind": "problem",
    "Metric": "metric",
    "SingleActivation": "dinkelbach",
    "closed_form": "single_pair",
    "solve_pcr": "solve",
    "solve_single_activation": "dinkelbach",
}
__all__ = [
    "Certificate",
    "Edit",
    "Kind",
    "Metric",
    "SingleActivation",
    "closed_form",
    "solve_pcr",
    "solve_single_activation",
]


def __getattr__(name: str) -> Any:
    if name not in _OWNERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_OWNERS[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
