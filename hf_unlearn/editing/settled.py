"""A plan that the model has really taken: planned, applied and measured, and made anew where rounding has eaten it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from transformers.utils import logging

from .apply import AppliedEdit
from .config import EditConfig
from .mlp import mlp_output
from .plan import EditPlan, base_matrix

logger = logging.get_logger(__name__)

_TRIES = 3  # plans that aim lower and lower
ROUNDING = 1.001  # factor of a probability that another batch may differ by


@dataclass(frozen=True, kw_only=True)
class Stages:
    """
    What one try consists of; an engine adds its agreement between processes.

    Args:
        plan (`Callable[[EditConfig], EditPlan]`):
            Makes a plan.
        apply (`Callable[[EditPlan], AppliedEdit]`):
            Applies it.
        verify (`Callable[[EditPlan, AppliedEdit], dict]`):
            Measures the model as it is then, see [`verify_plan`].
        undo (`Callable[[AppliedEdit], Any]`):
            Takes it off.
        is_main (`bool`, *optional*, defaults to `True`):
            Whether this process is the one that warns.
    """

    plan: Callable[[EditConfig], EditPlan]
    apply: Callable[[EditPlan], AppliedEdit]
    verify: Callable[[EditPlan, AppliedEdit], dict[str, Any]]
    undo: Callable[[AppliedEdit], Any]
    is_main: bool = True


def settled_edit(config: EditConfig, stages: Stages, *, model: Any, merge: bool) -> tuple[EditPlan, AppliedEdit]:
    """
    A plan, with `measures` of the model that has it, and what was applied. Where rounding to 16 bits has eaten a part
    of a merged edit, so that somewhere the plan's probability is missed, it is made anew for a lower one, up to three
    times.

    Args:
        config ([`EditConfig`]):
            What is wanted.
        stages ([`Stages`]):
            How.
        model (`Any`):
            The model, for messages.
        merge (`bool`):
            Whether the edit goes into the weights.

    Raises:
        ValueError: an edit that aims lower is needed, and there is none. Whatever fails, the model is as it was.
    """
    asked, wanted = config, config.probability
    plan = stages.plan(asked)
    for number in range(_TRIES + 1):
        applied = stages.apply(plan)
        try:
            found = stages.verify(plan, applied)
        except BaseException:
            stages.undo(applied)
            raise
        reached, planned = largest_probability(found), largest_probability(plan.measures)
        lost = merge and config.searches and reached > max(wanted, planned) * ROUNDING
        if not lost or number == _TRIES:
            break
        stages.undo(applied)
        asked = replace(asked, probability=asked.probability * wanted / reached / 2.0)
        if stages.is_main:
            logger.warning(
                f"The merged weights have taken {min(applied.realised.values()):.0%} of the edit, and a word still "
                f"has a probability of {reached:.2g}: planning anew for {asked.probability:.2g}."
            )
        try:
            plan = stages.plan(asked)
        except ValueError as error:
            raise ValueError(
                f"Merged into {_types(model, plan)}, the edit leaves a word a probability of {reached:.2g}, above "
                f"{wanted:g}, and none that aims lower was found. The model is as it was. Apply the edit as an "
                "adapter, or merge into float32 weights."
            ) from error
    if stages.is_main and config.searches and reached > wanted * ROUNDING:
        logger.warning(
            f"After the edit a word still has a probability of {reached:.4g}, above the wanted {wanted:g}."
            + (" Rounding eats a part: edit float32 weights, or apply the edit as an adapter." if lost else "")
        )
    plan = replace(plan, settings={**plan.settings, "probability": wanted})
    realised = {str(layer): share for layer, share in applied.realised.items()}
    return plan.with_measures(planned_probability=asked.probability, **found, realised=realised), applied


def largest_probability(measures: dict[str, Any]) -> float:
    """Of everything that a plan was asked to bring down, after it; 0 where nothing has a probability."""
    found: float = measures.get("constrained", {}).get("after", 0.0)
    return found


def _types(model: Any, plan: EditPlan) -> str:
    found = {str(base_matrix(mlp_output(model, edit.layer).module).weight.dtype) for edit in plan.edits}
    return ", ".join(sorted(found)).replace("torch.", "")
