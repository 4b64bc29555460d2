"""Edits as a frozen LoRA adapter, alone or on top of those that a model has, and every trace of it removed again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import PeftMixedModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..trainers.model_setup import is_peft_model
from .peft_folder import common_rank, lora_config, padded_factors
from .plan import EditPlan

# where Transformers (5.x) keeps the hooks of enable_input_require_grads, which overwrites those of an earlier call
_INPUT_HOOKS = ("_require_grads_hooks", "_require_grads_hook")


def check_stackable(model: Any, name: str) -> None:
    """
    Refuses a model on which the edit could not be active as a LoRA adapter beside what is active already.

    Raises:
        ValueError: what the model is or carries, and what to do.
    """
    if not name or "." in name:
        raise ValueError(f"adapter_name is {name!r}; expected a name without dots.")
    if any(isinstance(getattr(model, key, None), nn.Module) for key in ("module", "_orig_mod")):
        raise ValueError(
            f"The model is inside a {type(model).__name__}, which does not see adapters that come later. Apply the "
            "edit before the engine (or torch.compile) wraps the model, to the model inside of it, or pass merge=True."
        )
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if isinstance(model, PeftMixedModel):
        raise ValueError(
            "The model is a PeftMixedModel, on which an edit cannot be stacked. Merge its adapters first "
            "(model.merge_and_unload()) and plan the edit for the result, or apply it to the base model."
        )
    if not is_peft_model(model):
        if layers:
            raise ValueError(
                "The model has adapters but is no PeftModel (Transformers' own add_adapter or load_adapter). Load "
                "them with PeftModel.from_pretrained(base, ...), or pass merge=True."
            )
        return
    if name in model.peft_config:
        raise ValueError(
            f"The model has an adapter {name!r} already (it has {', '.join(model.peft_config)}). Give another "
            "adapter_name, or undo the edit that it is."
        )
    others = sorted({str(getattr(c.peft_type, "value", c.peft_type)) for c in model.peft_config.values()} - {"LORA"})
    if others:
        raise ValueError(
            f"The model has adapters of type {', '.join(others)}, on which PEFT stacks no LoRA. Merge them first "
            "(model.merge_and_unload()) where they can be, or plan and apply the edit on the base model."
        )
    if any(layer.merged for layer in layers):
        raise ValueError(
            "The model's adapters are merged, and PEFT ignores a new one meanwhile. Call model.unmerge_adapter() or "
            "model.merge_and_unload() first."
        )
    if any(layer.disable_adapters for layer in layers):
        raise ValueError(
            "The model's adapters are disabled, and the edit would be too. Apply it outside of "
            "model.disable_adapter()."
        )


def add_edit_adapter(model: Any, plan: EditPlan, name: str) -> tuple[Any, Callable[[], Any]]:
    """
    Puts a plan's edits on a model as a LoRA adapter in float32 that is active, together with those that are, and
    frozen. Nothing else changes: neither what is trained nor the state of random numbers.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The model, which [`check_stackable`] and [`EditPlan.check_model`] have accepted.
        plan ([`EditPlan`]):
            The edits.
        name (`str`):
            The adapter's name.

    Returns:
        `tuple[PeftModel, Callable]`: the model to call from now on, and what removes the adapter and returns the model
        that was given.
    """
    before = _Before(model, plan)
    try:
        with torch.random.fork_rng(devices=[]):  # PEFT draws factors, on the CPU, which are overwritten
            if before.stacked:
                model.add_adapter(name, lora_config(plan))
                model.base_model.set_adapter([*before.active, name])
                edited = model
            else:
                edited = get_peft_model(model, lora_config(plan), adapter_name=name)
        _fill(edited, plan, name)
        before.leave_the_rest(edited)
    except BaseException:
        before.come_back(name)
        raise

    def remove() -> Any:
        before.check_removable(edited, name)
        return before.come_back(name)

    return edited, remove


@torch.no_grad()
def _fill(model: Any, plan: EditPlan, name: str) -> None:
    base = model.get_base_model()
    for edit in plan.edits:
        layer = base.get_submodule(edit.path)
        assert layer.scaling[name] == 1.0, "lora_alpha = r"
        pairs = (layer.lora_A[name], layer.lora_B[name])
        for linear, factor in zip(pairs, padded_factors(edit, common_rank(plan)), strict=True):
            # float32 whatever the base's type is: rounded factors would be another edit
            device = linear.weight.device
            # A buffer, not a parameter: PEFT (0.21) unfreezes whatever is active at the end of disable_adapter(), in
            # which trainers compute their reference. The edit would get gradients from then on, count in the norm that
            # is clipped, and break activation checkpointing in the middle of a step.
            del linear.weight
            linear.register_buffer("weight", factor.to(device))


class _Before:
    """What a model was before the adapter came: everything that PEFT changes on the way."""

    def __init__(self, model: Any, plan: EditPlan) -> None:
        self.model = model
        self.stacked = is_peft_model(model)
        self.base = model.get_base_model() if self.stacked else model
        self.requires_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        self.training = [(module, module.training) for module in model.modules()]
        self.layers = {edit.path: self.base.get_submodule(edit.path) for edit in plan.edits}
        self.hooks = {key: vars(self.base)[key] for key in _INPUT_HOOKS if key in vars(self.base)}
        self.pretraining_tp = getattr(getattr(self.base, "config", None), "pretraining_tp", None)
        self.active: list[str] = list(model.active_adapters) if self.stacked else []
        self.main: Any = model.active_adapter if self.stacked else None

    def leave_the_rest(self, edited: Any) -> None:
        """Gives back what PEFT has changed beside the adapter."""
        for parameter, wanted in self.requires_grad:
            parameter.requires_grad_(wanted)
        known = {id(module) for module, _ in self.training}
        for module in edited.modules():
            if id(module) not in known:
                module.training = self.model.training
        for module, training in self.training:
            module.training = training
        if self.pretraining_tp is not None:
            self.base.config.pretraining_tp = self.pretraining_tp
        if vars(self.base).get(_INPUT_HOOKS[0]) is not self.hooks.get(_INPUT_HOOKS[0]):
            self.base.disable_input_require_grads()  # under checkpointing PEFT asks for gradients of the embeddings
            for key in _INPUT_HOOKS:
                vars(self.base).pop(key, None)
            vars(self.base).update(self.hooks)

    def check_removable(self, edited: Any, name: str) -> None:
        """Refuses to undo what others have built upon."""
        if name not in edited.peft_config:
            raise RuntimeError(f"The model has no adapter {name!r} any more: it was deleted, merged or unloaded.")
        later = sorted(set(edited.peft_config) - {name})
        if later and not self.stacked:
            raise RuntimeError(
                f"Adapters {later} were added on top of the edit {name!r}; delete them (model.delete_adapter), then "
                "undo."
            )
        if any(name in layer.merged_adapters for layer in edited.modules() if isinstance(layer, BaseTunerLayer)):
            raise RuntimeError(f"The adapter {name!r} is merged; call model.unmerge_adapter(), then undo.")

    def come_back(self, name: str) -> Any:
        """Removes the adapter, complete or half made."""
        if self.stacked:
            if name in self.model.peft_config:
                self.model.delete_adapter(name)
            if self.active:
                self.model.base_model.set_adapter(list(self.active))
            self.model.base_model.active_adapter = self._like(self.active)
            self.model.active_adapter = self.main
        elif hasattr(self.base, "peft_config"):
            del self.base.peft_config
        for path, layer in self.layers.items():  # a layer that only the edit had wrapped is itself again
            parent, _, child = path.rpartition(".")
            setattr(self.base.get_submodule(parent), child, layer)
        self.leave_the_rest(self.model)
        return self.model

    def _like(self, active: list[str]) -> Any:
        return active[0] if len(active) == 1 else list(active)
