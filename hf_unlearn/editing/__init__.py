"""
Constrained weight edits: the smallest change of a matrix that makes words unreachable, or bounded ones that make a
model safer.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .agreement import EditError
    from .algebra.certificate import Certificate
    from .algebra.dinkelbach import SingleActivation, solve_single_activation
    from .algebra.metric import Metric
    from .algebra.problem import Kind
    from .algebra.single_pair import closed_form
    from .algebra.solve import Edit, solve_pcr
    from .apply import AppliedEdit, apply_edit
    from .callback import ConstrainedEditCallback
    from .concepts import Concept, word_concepts
    from .config import EditConfig
    from .constrained import EditResult, constrained_edit
    from .peft_folder import to_peft
    from .plan import EditPlan, LayerEdit
    from .planning import plan_edit
    from .regions.config import RegionConfig
    from .regions.plans import plan_arr, plan_tsr

_OWNERS = {
    "AppliedEdit": "apply",
    "ConstrainedEditCallback": "callback",
    "Certificate": "algebra.certificate",
    "Concept": "concepts",
    "Edit": "algebra.solve",
    "EditConfig": "config",
    "EditError": "agreement",
    "EditPlan": "plan",
    "EditResult": "constrained",
    "Kind": "algebra.problem",
    "LayerEdit": "plan",
    "Metric": "algebra.metric",
    "RegionConfig": "regions.config",
    "SingleActivation": "algebra.dinkelbach",
    "apply_edit": "apply",
    "closed_form": "algebra.single_pair",
    "constrained_edit": "constrained",
    "plan_arr": "regions.plans",
    "plan_edit": "planning",
    "plan_tsr": "regions.plans",
    "solve_pcr": "algebra.solve",
    "solve_single_activation": "algebra.dinkelbach",
    "to_peft": "peft_folder",
    "word_concepts": "concepts",
}
__all__ = [
    "AppliedEdit",
    "Certificate",
    "Concept",
    "ConstrainedEditCallback",
    "Edit",
    "EditConfig",
    "EditError",
    "EditPlan",
    "EditResult",
    "Kind",
    "LayerEdit",
    "Metric",
    "RegionConfig",
    "SingleActivation",
    "apply_edit",
    "closed_form",
    "constrained_edit",
    "plan_arr",
    "plan_edit",
    "plan_tsr",
    "solve_pcr",
    "solve_single_activation",
    "to_peft",
    "word_concepts",
]


def __getattr__(name: str) -> Any:
    if name not in _OWNERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_OWNERS[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
