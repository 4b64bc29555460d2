"""From a plan to an edited model, and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..probes.taps import base_model
from .adapter import add_edit_adapter, check_stackable
from .held import settle, tensor_parallel
from .merge import check_mergeable, merge_edits
from .mlp import mlp_output
from .plan import EditPlan


@dataclass
class AppliedEdit:
    """
    An edit in force.

    Args:
        model (`PeftModel`, or the model that was given):
            The model to call: with the edit as an adapter, or merged.
        realised (`dict[int, float]`):
            By block, the share of the edit that the model has taken, `<W' - W, Delta>_F / ||Delta||_F^2`. 1 for an
            adapter and where nothing was to be done; far below 1 where a 16-bit weight has rounded a small edit away:
            verify such an edit anew, or apply it as an adapter.
    """

    model: Any
    realised: dict[int, float]
    _undo: Callable[[], Any] | None = field(repr=False)

    def undo(self) -> Any:
        """
        Puts everything back, bit for bit, and returns the model that was given to [`apply_edit`].

        Merged weights and masters become what they were before the edit, so steps of training since are lost on these
        matrices. An adapter is deleted; adapters that were active, and what is trained, are as before. Collective on
        sharded models.

        Raises:
            RuntimeError: the edit has been undone already, or the model has changed so that it cannot be.
        """
        if self._undo is None:
            raise RuntimeError("This edit has been undone already; apply the plan again to have it back.")
        self.model = self._undo()
        self._undo = None
        return self.model


def apply_edit(
    model: Any,
    plan: EditPlan,
    *,
    as_adapter: bool | None = None,
    merge: bool = False,
    adapter_name: str = "edit",
) -> AppliedEdit:
    """
    Applies a plan: as a frozen adapter (the default), or merged into the weights.

    All checks come before anything is changed. Merging works on plain and DDP models, under FSDP2, and under ZeRO-1, 2
    and 3, where float32 masters get the edit too; call it on all processes. It is collective there. DeepSpeed's stage
    0 in 16 bits has masters that the edit cannot reach: it is refused where the engine is given, and cannot be told
    from a plain model where only the model inside is, whose next step then takes the edit away.

    Args:
        model (`PreTrainedModel`, `PeftModel`, or for `merge` also what an engine has made of it):
            The model that the plan was made for. Quantised models take an adapter only.
        plan ([`EditPlan`]):
            The edits.
        as_adapter (`bool`, *optional*):
            Whether to add a LoRA adapter, active together with the model's own; the opposite of `merge` when left out.
        merge (`bool`, *optional*, defaults to `False`):
            Whether to add the edits to the weights, in float32 and then rounded to their type.
        adapter_name (`str`, *optional*, defaults to `"edit"`):
            The adapter's name.

    Returns:
        [`AppliedEdit`]: the model, how much of each edit it has taken, and the way back.

    Raises:
        ValueError: both or neither of the two ways; a model that the plan was not made for; tensor parallelism; a
            quantised weight to merge into, or one with masters out of reach; an adapter that cannot be stacked, or
            whose name is taken.

    Example:
        ```python
        applied = apply_edit(model, EditPlan.load("plan"))
        model = applied.model  # a PeftModel
        model = applied.undo()  # as it was
        ```
    """
    adapter = (not merge) if as_adapter is None else as_adapter
    if adapter == merge:
        raise ValueError(
            f"Got as_adapter={as_adapter} and merge={merge}; expected exactly one of them: as_adapter=True (the "
            "default) for an adapter, or merge=True for the weights."
        )
    _check_whole(model)
    if adapter:
        check_stackable(model, adapter_name)
    else:
        for edit in plan.edits:
            check_mergeable(model, mlp_output(model, edit.layer))
    found = plan.check_model(model)
    if adapter:
        settle(model)
        edited, remove = add_edit_adapter(model, plan, adapter_name)
        return AppliedEdit(model=edited, realised={edit.layer: 1.0 for edit in plan.edits}, _undo=remove)
    realised, restore = merge_edits(model, found, plan.edits)

    def put_back() -> Any:
        restore()
        return model

    return AppliedEdit(model=model, realised=realised, _undo=put_back)


def _check_whole(model: Any) -> None:
    sign = tensor_parallel(base_model(model), model.parameters())
    if sign is not None:
        raise ValueError(
            f"The model is tensor parallel ({sign}): its matrices are split inside, in ways that an edit does not "
            "follow. Load it without (no tp_plan, no DistributedConfig(tp_size=...)), apply the edit and save it; or "
            "shard it with FSDP2 or ZeRO-3."
        )
