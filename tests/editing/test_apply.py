"""An edit in force is one edit, as an adapter, merged, or from its folder; and it leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel
from planned import close, logits, make_plan, same, state, with_lora
from test_capture import FAMILIES, build
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hf_unlearn.editing import peft_folder
from hf_unlearn.editing.added import edits_in_force
from hf_unlearn.editing.apply import apply_edit
from hf_unlearn.editing.peft_folder import to_peft


@pytest.mark.parametrize("family", FAMILIES)
def test_adapter_merge_and_folder_are_the_edit_in_every_family(family: str, tmp_path: Path) -> None:
    model = build(family)
    plan = make_plan(model)
    plain = logits(model)
    with edits_in_force(model, plan.edits):
        expected = logits(model)
    assert (expected - plain).abs().max() > 1e-2, "the edit is felt"
    before = state(model)

    applied = apply_edit(model, plan)
    assert isinstance(applied.model, PeftModel)
    assert applied.realised == {1: 1.0, 2: 1.0, 3: 1.0}
    close(logits(applied.model), expected)
    assert applied.undo() is model
    same(before, state(model))

    applied = apply_edit(model, plan, merge=True)
    assert applied.model is model
    assert applied.realised == pytest.approx({1: 1.0, 2: 1.0, 3: 1.0}, abs=1e-5)
    close(logits(model), expected)
    assert applied.undo() is model
    same(before, state(model))

    loaded = PeftModel.from_pretrained(build(family), to_peft(plan, tmp_path / "adapter"))
    close(logits(loaded), expected)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("how", ["adapter", "merge"])
def test_on_a_lora_both_act_together_and_undo_is_exact(family: str, how: str) -> None:
    model = with_lora(build(family))
    model.get_base_model().lm_head.weight.requires_grad_(True)  # a state that PEFT would not leave by itself
    next(value for name, value in model.named_parameters() if "lora_A" in name).requires_grad_(False)
    plan = make_plan(model)
    with edits_in_force(model, plan.edits):
        expected = logits(model)
    before = state(model)
    applied = apply_edit(model, plan, merge=how == "merge")
    assert applied.model is model
    close(logits(model), expected, 2e-6)
    if how == "adapter":
        assert model.active_adapters == ["default", "edit"]
        factors = {name: value for name, value in model.named_buffers() if ".edit." in name}
        assert len(factors) == 6
        assert all(value.dtype == torch.float32 for value in factors.values())
        kept = {name: value for name, value in model.named_parameters() if ".default." in name}
        assert {(id(value), value.requires_grad) for value in kept.values()} == {
            before["requires_grad"][name] for name in kept
        }
        assert model.get_base_model().lm_head.weight.requires_grad
        assert torch.get_rng_state().tolist() == before["rng"]
        with model.disable_adapter():  # at its end PEFT makes all active parameters trainable
            pass
        assert not any(value.requires_grad for value in factors.values())
        assert not [name for name, _ in model.named_parameters() if ".edit." in name]
    assert applied.undo() is model
    same(before, state(model))


def test_several_adapters_modules_to_save_and_the_training_mode_come_back() -> None:
    model = with_lora(build(), modules_to_save=["lm_head"])
    model.add_adapter("idle", LoraConfig(r=1, target_modules=["q_proj"]))
    model.train()
    model.get_base_model().model.layers[0].eval()
    before = state(model)
    with edits_in_force(model, make_plan(model).edits):
        expected = logits(model)
    applied = apply_edit(model, make_plan(model))
    assert model.active_adapters == ["default", "edit"]
    close(logits(model), expected, 2e-6)
    applied.undo()
    same(before, state(model))


def test_two_edits_stack_and_come_off_in_turn() -> None:
    model = build()
    plan = make_plan(model)
    first = apply_edit(model, plan)
    before = state(first.model)
    with edits_in_force(first.model, plan.edits):
        expected = logits(first.model)
    second = apply_edit(first.model, plan, adapter_name="again")
    close(logits(second.model), expected, 2e-6)
    with pytest.raises(RuntimeError, match=r"Adapters \['again'\] were added on top of the edit 'edit'"):
        first.undo()
    second.undo()
    same(before, state(first.model))
    assert first.undo() is model


@pytest.mark.parametrize("asked", [False, True])
def test_a_checkpointed_model_is_not_asked_for_gradients_of_its_embeddings(asked: bool) -> None:
    model = build()
    model.gradient_checkpointing_enable()
    if asked:
        model.enable_input_require_grads()
    before, hooks = state(model), vars(model).get("_require_grads_hooks")
    applied = apply_edit(model, make_plan(model))
    assert sum(len(module._forward_hooks) for module in model.modules()) == before["hooks"]
    applied.undo()
    same(before, state(model))
    assert vars(model).get("_require_grads_hooks") is hooks


@pytest.mark.parametrize("how", ["adapter", "merge"])
def test_a_second_undo_is_an_error(how: str) -> None:
    model = build()
    applied = apply_edit(model, make_plan(model), merge=how == "merge")
    applied.undo()
    with pytest.raises(RuntimeError, match="undone already"):
        applied.undo()


# ---- 16-bit weights ----------------------------------------------------------------------------------------------------


def test_a_bf16_merge_says_how_much_of_the_edit_is_left() -> None:
    """Weights are about .02, with steps of 2^-13 to 2^-14 between neighbours; entries of Delta about 1e-6 or 1e-2."""
    shares = {}
    for scale in (1e-6, 1e-2):
        model = build().to(torch.bfloat16)
        before = state(model)
        plan = make_plan(model, scale=scale, ranks={1: 2})
        weight = model.model.layers[0].mlp.down_proj.weight
        old, delta = weight.detach().double(), plan.edits[0].delta().double()
        applied = apply_edit(model, plan, merge=True)
        assert torch.equal(weight, (old.float() + delta.float()).bfloat16())
        shares[scale] = applied.realised[1]
        moved = weight.detach().double() - old
        assert shares[scale] == pytest.approx(float((moved * delta).sum() / delta.square().sum()), rel=1e-6)
        applied.undo()
        same(before, state(model))
    assert shares[1e-6] < 0.3
    assert shares[1e-2] == pytest.approx(1.0, abs=0.01)


def test_an_adapter_on_a_bf16_model_keeps_its_factors_in_float32() -> None:
    model = build().to(torch.bfloat16)
    plan = make_plan(model, scale=1e-6, ranks={3: 2})
    inner = model.model.layers[2].mlp.down_proj
    inputs = torch.randn(4, 24).bfloat16()
    with edits_in_force(model, plan.edits):
        expected, whole = inner(inputs), logits(model)
    applied = apply_edit(model, plan)
    layer = model.model.layers[2].mlp.down_proj
    assert torch.equal(layer.lora_A["edit"].weight, plan.edits[0].lora_a)
    assert torch.equal(layer.lora_B["edit"].weight, plan.edits[0].lora_b)
    assert torch.equal(layer(inputs), expected)
    assert torch.equal(logits(applied.model), whole)
    large = make_plan(build(), scale=0.3)
    applied.undo()
    with edits_in_force(model, large.edits):
        whole = logits(model)
    close(logits(apply_edit(model, large).model), whole, 2e-2)


# ---- quantised bases ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_takes_the_adapter_and_refuses_the_merge(bits: int, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="the quantization extra is not installed")
    config = FAMILIES["llama"].__class__(
        **{**FAMILIES["llama"].to_dict(), "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
    )
    config.head_dim = 32
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    options = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=options)
    # On a CPU the first pass of bitsandbytes (0.50) packs 4-bit weights anew, which gives them another digest; and its
    # state_dict() unpacks them in place, but not their scales: the next pass computes something else.
    logits(model)
    plan = make_plan(model)
    parameters = nn.Module.named_parameters
    before, plain = state(model, parameters), logits(model)
    with pytest.raises(ValueError, match=r"quantised weights .*Pass as_adapter=True, or load the model in bfloat16"):
        apply_edit(model, plan, merge=True)
    same(before, state(model, parameters))
    with edits_in_force(model, plan.edits):
        expected = logits(model)
    applied = apply_edit(model, plan)
    difference = (logits(applied.model) - expected).abs().max()
    assert difference < 0.02 * (expected - plain).abs().max(), "both compute in the base's 16-bit type"
    assert torch.equal(logits(applied.undo()), plain)
    same(before, state(model, parameters))


# ---- folders -----------------------------------------------------------------------------------------------------------


def test_a_plan_of_rank_zero_is_still_an_adapter(tmp_path: Path) -> None:
    model = build()
    plan = make_plan(model, ranks={1: 0, 2: 0})
    plain = logits(model)
    loaded = PeftModel.from_pretrained(build(), to_peft(plan, tmp_path))
    assert loaded.peft_config["default"].r == 1
    assert torch.equal(logits(loaded), plain)
    applied = apply_edit(model, plan)
    assert torch.equal(logits(applied.model), plain)
    applied.undo()
    before = state(model)
    assert apply_edit(model, plan, merge=True).realised == {1: 1.0, 2: 1.0}
    same(before, state(model))


def test_the_folder_names_full_paths_and_its_base(tmp_path: Path) -> None:
    model = build("gpt2")
    model.save_pretrained(tmp_path / "base")
    plan = make_plan(model)
    folder = to_peft(plan, tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "base"))
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["target_modules"] == [edit.path for edit in plan.edits]
    assert (config["r"], config["lora_alpha"], config["fan_in_fan_out"]) == (4, 4, True)
    with edits_in_force(model, plan.edits):
        close(logits(AutoPeftModelForCausalLM.from_pretrained(folder)), logits(model))


def test_an_interrupted_write_leaves_no_mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    old, new = make_plan(model), make_plan(model, scale=0.7)
    to_peft(old, tmp_path)
    (tmp_path / "edit_plan.json").write_text("of another")
    content = (tmp_path / "adapter_model.safetensors").read_bytes()

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(peft_folder, "save_file", full)
        with pytest.raises(OSError, match="no space"):
            to_peft(new, tmp_path)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == content
    assert PeftModel.from_pretrained(build(), tmp_path).peft_config["default"].r == 4
    replace = peft_folder.os.replace

    def stop_before_the_config(source: Path, target: Path) -> None:
        if target.name == "adapter_config.json":
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(peft_folder.os, "replace", stop_before_the_config)
        with pytest.raises(KeyboardInterrupt):
            to_peft(new, tmp_path)
    assert not (tmp_path / "adapter_config.json").exists(), "PEFT loads nothing without it"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_model.safetensors", "edit_plan.json"]
