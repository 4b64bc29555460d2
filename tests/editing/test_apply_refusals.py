"""What cannot be applied is refused, and what fails in the middle is undone, with the model as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import IA3Config, LoraConfig, PeftMixedModel, PromptTuningConfig
from peft import get_peft_model as peft
from planned import close, logits, make_plan, same, state, with_lora
from test_capture import build
from torch import Tensor, nn

from hf_unlearn.editing import adapter
from hf_unlearn.editing import merge as merging
from hf_unlearn.editing.added import edits_in_force
from hf_unlearn.editing.apply import apply_edit
from hf_unlearn.editing.held import Part
from hf_unlearn.editing.mlp import mlp_output
from hf_unlearn.editing.plan import LayerEdit, base_matrix

# ---- nothing is half done ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("lora", [False, True])
def test_a_failure_at_the_second_matrix_restores_the_first(
    error: type[BaseException], lora: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_lora(build()) if lora else build()
    plan = make_plan(model)
    before = state(model)
    second = base_matrix(mlp_output(model, 3).module).weight
    first = base_matrix(mlp_output(model, 1).module).weight
    hold, seen = merging.hold, []

    def failing_hold(matrix: Any) -> Any:
        held = hold(matrix)
        if matrix.weight is not second:
            return held
        part, calls = held.parts[0], [0]

        def write(values: Tensor) -> None:
            calls[0] += 1
            if calls[0] == 1:
                seen.append(not torch.equal(first, before["weights"][first_name][1]))
                part.write(values)  # even a part that was written is put back
                raise error("the disk, the user, the driver")
            part.write(values)

        broken = Part(name="weight", read=part.read, write=write, cut=part.cut)
        return merging.Held(parts=(broken,), groups=(), device=held.device)

    first_name = next(name for name, value in model.named_parameters() if value is first)
    monkeypatch.setattr(merging, "hold", failing_hold)
    with pytest.raises(error, match="the disk, the user"):
        apply_edit(model, plan, merge=True)
    assert seen == [True], "the first matrix had been written"
    same(before, state(model))


@pytest.mark.parametrize("lora", [False, True])
def test_a_failure_in_peft_leaves_the_model_as_it_was(lora: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_lora(build()) if lora else build()
    before = state(model)

    def broken(edit: LayerEdit, rank: int) -> Any:
        if edit.layer == 3:
            raise KeyboardInterrupt
        return padded(edit, rank)

    padded = adapter.padded_factors
    monkeypatch.setattr(adapter, "padded_factors", broken)
    with pytest.raises(KeyboardInterrupt):
        apply_edit(model, make_plan(model))
    same(before, state(model))


def test_a_sum_that_overflows_is_refused_before_anything_is_written() -> None:
    model = build().to(torch.float16)
    plan = make_plan(model, scale=1e5)
    before = state(model)
    with pytest.raises(ValueError, match=r"down_proj would hold nan or inf after the edit, in its type torch.float16"):
        apply_edit(model, plan, merge=True)
    same(before, state(model))


def test_a_merge_cannot_be_undone_into_another_type() -> None:
    model = build()
    applied = apply_edit(model, make_plan(model), merge=True)
    model.to(torch.bfloat16)
    before = state(model)
    with pytest.raises(RuntimeError, match="held in other parts, or in another type"):
        applied.undo()
    same(before, state(model))


# ---- refusals, with the model unchanged --------------------------------------------------------------------------------


def changed_weight() -> Any:
    model = build()
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.mul_(1.5)
    return model


def other_shape() -> Any:
    model = build()
    model.model.layers[2].mlp.down_proj = nn.Linear(24, 15, bias=False)
    return model


def merged_lora() -> Any:
    model = with_lora(build())
    model.merge_adapter()
    return model


def native_adapter() -> Any:
    model = build()
    model.add_adapter(LoraConfig(r=1, target_modules=["q_proj"]))
    return model


REFUSALS: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "both": (build, {"as_adapter": True, "merge": True}, "expected exactly one of them"),
    "neither": (build, {"as_adapter": False}, "as_adapter=False and merge=False; expected exactly one"),
    "other weights": (changed_weight, {}, "made for another model: model.layers.2.mlp.down_proj has digest"),
    "other weights, merge": (changed_weight, {"merge": True}, "Load the weights that it was made for"),
    "other shape": (other_shape, {}, r"this model has model.layers.2.mlp.down_proj \(15, 24\) there"),
    "other shape, merge": (other_shape, {"merge": True}, "It was made for another model"),
    "other family": (lambda: build("gpt2"), {}, "this model has transformer.h.0.mlp.c_proj"),
    "name taken": (lambda: with_lora(build()), {"adapter_name": "default"}, "has an adapter 'default' already"),
    "name": (build, {"adapter_name": "an.edit"}, "expected a name without dots"),
    "prompts": (
        lambda: peft(build(), PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")),
        {},
        "adapters of type PROMPT_TUNING, on which PEFT stacks no LoRA",
    ),
    "IA3": (
        lambda: peft(build(), IA3Config(target_modules=["down_proj"], feedforward_modules=["down_proj"])),
        {},
        "adapters of type IA3",
    ),
    "IA3, merge": (
        lambda: peft(build(), IA3Config(target_modules=["down_proj"], feedforward_modules=["down_proj"])),
        {"merge": True},
        "not a LoRA; it would change what an edit of the weight does",
    ),
    "DoRA, merge": (lambda: with_lora(build(), use_dora=True), {"merge": True}, "DoRA or another variant"),
    "mixed": (lambda: PeftMixedModel(build(), LoraConfig(target_modules=["q_proj"])), {}, "is a PeftMixedModel"),
    "merged": (merged_lora, {}, "adapters are merged, and PEFT ignores a new one"),
    "native": (native_adapter, {}, "has adapters but is no PeftModel"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_done_is_refused_with_the_model_unchanged(case: str) -> None:
    make, arguments, message = REFUSALS[case]
    plan = make_plan(build())
    model = make()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        apply_edit(model, plan, **arguments)
    same(before, state(model))


def test_a_disabled_adapter_is_refused() -> None:
    model = with_lora(build())
    plan, before = make_plan(model), state(model)
    with pytest.raises(ValueError, match=r"outside of model.disable_adapter"), model.disable_adapter():
        apply_edit(model, plan)
    same(before, state(model))


def test_dora_and_the_edit_act_together_as_adapters() -> None:
    model = with_lora(build(), use_dora=True)
    plan = make_plan(model)
    with edits_in_force(model, plan.edits):
        expected = logits(model)
    close(logits(apply_edit(model, plan).model), expected, 2e-6)


@pytest.fixture
def tp_mesh(tmp_path: Path) -> Any:
    """A mesh of one process whose dimension is named as Transformers and PyTorch name that of tensor parallelism."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    from torch.distributed.device_mesh import init_device_mesh

    yield init_device_mesh("cpu", (1,), mesh_dim_names=("tp",))
    dist.destroy_process_group()


@pytest.mark.parametrize("merge", [False, True])
def test_tensor_parallel_weights_are_refused(merge: bool, tp_mesh: Any) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    model = build()
    plan = make_plan(model)
    layer = model.model.layers[0].mlp.down_proj
    layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), tp_mesh, [Shard(1)]))
    before = layer.weight.to_local().clone()
    with pytest.raises(ValueError, match=r"tensor parallel \(weights on a mesh with dimensions \('tp',\)\)"):
        apply_edit(model, plan, merge=merge)
    assert torch.equal(layer.weight.to_local(), before)
    assert not hasattr(model, "peft_config")


def test_a_model_that_says_it_is_tensor_parallel_is_refused() -> None:
    model = build()
    plan = make_plan(model)
    model._tp_size = 2
    with pytest.raises(ValueError, match=r"tensor parallel \(tp_size=2\)"):
        apply_edit(model, plan)


def test_an_adapter_inside_of_a_wrapper_is_refused_and_a_merge_is_not() -> None:
    model = build()
    plan = make_plan(model)
    wrapped = torch.compile(model)  # nothing is compiled before it is called
    with pytest.raises(ValueError, match=r"inside a OptimizedModule.*before the engine"):
        apply_edit(wrapped, plan)
    before = state(model)
    with edits_in_force(model, plan.edits):
        expected = logits(model)
    applied = apply_edit(wrapped, plan, merge=True)
    close(logits(model), expected)
    assert applied.undo() is wrapped
    same(before, state(model))
