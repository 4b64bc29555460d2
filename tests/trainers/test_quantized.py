"""QLoRA: an adapter on a 4-bit base, as `load_in_4bit` of TRL's ModelConfig loads it. bitsandbytes runs on the CPU too."""

from __future__ import annotations

import pytest
import torch
from kit import Lab, difference, lora, parameters, pd_config
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hf_unlearn.lab.models import tiny_config, tiny_model
from hf_unlearn.trainers import PrimalDualTrainer

bnb = pytest.importorskip("bitsandbytes", reason="the quantization extra is not installed")


@pytest.fixture
def folder(lab: Lab, tmp_path):
    shape = tiny_config(lab.tokenizer, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=2)
    model = tiny_model(shape, seed=1)
    model.save_pretrained(tmp_path / "base")
    lab.tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def four_bit() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


def run(lab: Lab, model, tmp_path, **kwargs):
    settings = {"max_steps": 20, "learning_rate": 5e-2, "forget_loss": "grad_ascent", "forget_target": None}
    args = pd_config(tmp_path / "out", retain_margin=5.0, **{**settings, **kwargs})
    trainer = PrimalDualTrainer(
        model=model,
        args=args,
        forget_dataset=lab.forget,
        retain_dataset=lab.retain,
        processing_class=lab.tokenizer,
        peft_config=lora(),
    )
    before = parameters(trainer.model)
    start = trainer.measure_forget(trainer.model)["nll"]
    trainer.train()
    return trainer, before, start


def test_qlora_forgets_with_the_adapter_alone(lab: Lab, folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=four_bit())
    trainer, before, start = run(lab, model, tmp_path)
    layer = trainer.model.get_base_model().model.layers[0].mlp.down_proj.base_layer
    assert isinstance(layer, bnb.nn.Linear4bit)
    after = parameters(trainer.model)
    moved = {name for name in before if before[name].shape == after[name].shape and "lora_" in name}
    assert any(not torch.equal(before[name], after[name]) for name in moved)
    assert all("lora_" in name for name, value in trainer.model.named_parameters() if value.requires_grad)
    assert trainer.measure_forget(trainer.model)["nll"] > start + 0.1
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", quantization_config=four_bit())
    kept = {name: value for name, value in parameters(loaded).items() if "lora_" in name}
    assert difference(kept, {name: after[name].to(value) for name, value in kept.items()}) == 0.0


def test_qlora_from_a_name_and_a_quantization_config(lab: Lab, folder, tmp_path):
    trainer, _, _ = run(lab, str(folder), tmp_path, max_steps=1, model_init_kwargs={"quantization_config": four_bit()})
    assert trainer.model.get_base_model().is_loaded_in_4bit


def test_a_quantised_model_without_adapter_is_refused(lab: Lab, folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=four_bit())
    with pytest.raises(ValueError, match="adapters"):
        PrimalDualTrainer(
            model=model,
            args=pd_config(tmp_path / "out"),
            forget_dataset=lab.forget,
            retain_dataset=lab.retain,
            processing_class=lab.tokenizer,
        )
