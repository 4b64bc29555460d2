"""Plan, apply and verify in one call."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from transformers.utils import logging

from ..attacks.refusal import attack_succeeds
from .apply import AppliedEdit, apply_edit
from .config import EditConfig
from .measures import Judge
from .mlp import mlp_output
from .plan import EditPlan, base_matrix
from .planning import plan_edit, verify_plan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.get_logger(__name__)

_TRIES = 3  # plans that aim lower where rounding has eaten a merged edit
_SLACK = 1.05  # of the wanted probability, that a merge may miss


@dataclass
class EditResult:
    """
    An edited model.

    Args:
        model (`Any`):
            The model to call.
        plan ([`EditPlan`]):
            What was applied, with `measures` of the model as it is now.
        applied ([`AppliedEdit`]):
            How much of it the model has taken, and `undo()`.
    """

    model: Any
    plan: EditPlan
    applied: AppliedEdit


def constrained_edit(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Any,
    config: EditConfig | None = None,
    *,
    retain_dataset: Any = None,
    attack_dataset: Any = None,
    judge: Judge = attack_succeeds,
    as_adapter: bool | None = None,
    merge: bool = False,
    adapter_name: str = "edit",
    accelerator: Any = None,
    progress: bool = True,
) -> EditResult:
    """
    Makes words unreachable, or a model safer: [`plan_edit`], [`apply_edit`], and a real forward pass of the edited
    model. Where rounding to 16 bits has eaten a part of a merged edit, so that a word is above the wanted probability,
    the plan is made anew with a lower one, up to three times.

    Args:
        model, tokenizer, dataset, config, retain_dataset, accelerator, progress:
            As in [`plan_edit`].
        attack_dataset (`Dataset` or `list[dict]`, *optional*):
            Jailbreak prompts (`prompt`, or `question`), to be answered before and after: attack success and refusals.
            They are only measured on.
        judge (`Callable[[str, str], bool]`, *optional*):
            Whether an answer to a prompt is a success of the attack; by default one that does not refuse.
        as_adapter, merge, adapter_name:
            As in [`apply_edit`].

    Returns:
        [`EditResult`].

    Raises:
        ValueError: as in [`plan_edit`] and [`apply_edit`]; the model is then as it was.
    """
    config = config or EditConfig()
    shared: dict[str, Any] = {
        "retain_dataset": retain_dataset,
        "attack_dataset": attack_dataset,
        "judge": judge,
        "accelerator": accelerator,
        "progress": progress,
    }
    plan = plan_edit(model, tokenizer, dataset, config, **shared)
    asked = config
    for number in range(_TRIES + 1):
        applied = apply_edit(model, plan, as_adapter=as_adapter, merge=merge, adapter_name=adapter_name)
        try:
            found = verify_plan(applied.model, tokenizer, dataset, config, plan, **shared)
        except BaseException:
            applied.undo()
            raise
        reached = found.get("reach", {}).get("after", {}).get("largest_first_probability", 0.0)
        planned = plan.measures.get("reach", {}).get("after", {}).get("largest_first_probability", 0.0)
        lost = merge and config.searches and reached > max(config.probability, planned) * _SLACK
        if not lost:
            break
        if number == _TRIES:
            logger.warning(
                "Rounding still eats a part of the merged edit: see measures['reach']. Apply it as an adapter, or "
                "merge into float32 weights."
            )
            break
        applied.undo()
        asked = replace(asked, probability=asked.probability * config.probability / reached / 2.0)
        logger.warning(
            f"The merged weights have taken {min(applied.realised.values()):.0%} of the edit, and a word still has a "
            f"probability of {reached:.2g}: planning anew for {asked.probability:.2g}."
        )
        try:
            plan = plan_edit(model, tokenizer, dataset, asked, **shared)
        except ValueError as error:
            raise ValueError(
                f"Merged into {_types(model, plan)}, the edit leaves a word a probability of {reached:.2g}, above "
                f"{config.probability:g}, and none that aims lower was found. The model is as it was. Apply the edit "
                "as an adapter, or merge into float32 weights."
            ) from error
    plan = replace(plan, settings={**plan.settings, "probability": config.probability})
    plan = plan.with_measures(
        planned_probability=asked.probability,
        **found,
        realised={str(layer): share for layer, share in applied.realised.items()},
    )
    return EditResult(model=applied.model, plan=plan, applied=applied)


def _types(model: Any, plan: EditPlan) -> str:
    found = {str(base_matrix(mlp_output(model, edit.layer).module).weight.dtype) for edit in plan.edits}
    return ", ".join(sorted(found)).replace("torch.", "")
