"""Plan, apply and verify in one call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..attacks.refusal import attack_succeeds
from .apply import AppliedEdit, apply_edit
from .config import EditConfig
from .measures import Judge
from .plan import EditPlan
from .planning import plan_edit, verify_plan
from .settled import Stages, settled_edit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
    stages = Stages(
        plan=lambda asked: plan_edit(model, tokenizer, dataset, asked, **shared),
        apply=lambda plan: apply_edit(model, plan, as_adapter=as_adapter, merge=merge, adapter_name=adapter_name),
        verify=lambda plan, applied: verify_plan(applied.model, tokenizer, dataset, config, plan, **shared),
        undo=AppliedEdit.undo,
    )
    plan, applied = settled_edit(config, stages, model=model, merge=merge)
    return EditResult(model=applied.model, plan=plan, applied=applied)
