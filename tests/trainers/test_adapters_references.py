"""Adapters, reference models, other architectures and memory."""

from __future__ import annotations

import pytest
import torch
from kit import (
    CHECKPOINTING,
    Recorder,
    config,
    difference,
    logged,
    lora,
    parameters,
    pd_config,
    primal_dual,
    row_logits,
    row_nll,
    unlearning,
)
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from hf_unlearn.lab.models import tiny_config, tiny_model
from hf_unlearn.trainers import PrimalDualTrainer, UnlearningConfig, UnlearningTrainer

# ---- adapters and references ---------------------------------------------------------------------------------------


class Copies(TrainerCallback):
    def __init__(self, into):
        self.into = into

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.into.append(parameters(model))


def test_lora_trains_and_saves_the_adapter_only(lab, tmp_path):
    trainer = primal_dual(lab, tmp_path, peft_config=lora(), learning_rate=1e-2)
    base = trainer.model.get_base_model()
    trainable = [name for name, value in trainer.model.named_parameters() if value.requires_grad]
    assert trainable
    assert all("lora_" in name for name in trainable)
    before = parameters(trainer.model)
    trainer.train()
    after = parameters(trainer.model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all("lora_" in name for name in moved)
    assert base.config.model_type == "llama"

    trainer.save_model(str(tmp_path / "adapter"))
    files = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert "adapter_model.safetensors" in files
    assert not {"model.safetensors", "pytorch_model.bin"} & files
    loaded = PeftModel.from_pretrained(lab.model(trained=True), tmp_path / "adapter")
    ids = torch.tensor([trainer.data.forget[0]["input_ids"]])
    torch.testing.assert_close(loaded(ids).logits, trainer.model.eval()(ids).logits)


@pytest.mark.parametrize(("forget_loss", "retain_loss"), [("npo", "kl"), ("undial", "nll")])
def test_the_adapter_switched_off_is_the_frozen_copy(lab, tmp_path, forget_loss, retain_loss):
    results = []
    for policy in ("auto", "adapter", "copy"):
        trainer = unlearning(
            lab,
            tmp_path,
            peft_config=lora(lora_dropout=0.0),
            forget_loss=forget_loss,
            retain_loss=retain_loss,
            reference_policy=policy,
            learning_rate=1e-2,
        )
        assert (trainer.reference._copy is None) == (policy != "copy")
        trainer.train()
        assert all(value.requires_grad for name, value in trainer.model.named_parameters() if "lora_" in name)
        results.append(parameters(trainer.model))
    for other in results[1:]:
        assert difference(results[0], other) < 1e-6


def test_the_reference_of_an_adapter_that_was_trained_before_includes_it(lab, tmp_path):
    first = unlearning(lab, tmp_path, peft_config=lora(), learning_rate=1e-2, forget_loss="grad_ascent")
    first.train()
    second = unlearning(lab, tmp_path, model=first.model, retain_loss="kl", forget_weight=0.0)
    assert second.evaluate()["eval_loss/retain/people"] == pytest.approx(0.0, abs=1e-6)


def test_kl_retain_loss_is_the_divergence_from_the_model_before_step_0(lab, tmp_path):
    recorder = Recorder(lab.tokenizer)
    trainer = unlearning(
        lab,
        tmp_path,
        retain_loss="kl",
        forget_loss="grad_ascent",
        learning_rate=1e-2,
        inputs={"data_collator": recorder},
    )
    reference, weights = lab.model(trained=True), []
    trainer.add_callback(Copies(weights))
    trainer.train()
    values = logged(trainer, "loss/retain/people")
    assert values[0] == pytest.approx(0.0, abs=1e-6)
    twin = lab.model(trained=True)
    for step in (1, 2):
        twin.load_state_dict(weights[step - 1], strict=False)
        rows = [item["retain"]["people"] for item in recorder.batches[step]]
        divergences = []
        with torch.no_grad():
            for row in rows:
                logp, logq = row_logits(twin, row)[0].log_softmax(-1), row_logits(reference, row)[0].log_softmax(-1)
                divergences.append((logq.exp() * (logq - logp)).sum(-1))
        assert values[step] == pytest.approx(torch.cat(divergences).mean().item(), rel=1e-4)
    assert values[2] > 1e-4


def test_primal_dual_limits_a_divergence_without_calibration(lab, tmp_path):
    trainer = primal_dual(lab, tmp_path, retain_loss="kl", retain_eps=0.01, dual_warmup_steps=0)
    trainer.train()
    assert trainer.duals.eps == {"people": 0.01, "facts": 0.01}
    assert logged(trainer, "violation/people")[0] == pytest.approx(-0.01, abs=1e-6)
    assert logged(trainer, "dual/people")[1] == pytest.approx(1.0 - 0.5 * 0.01, abs=1e-6)


def test_npo_keeps_one_number_a_row_and_no_second_model(lab, tmp_path):
    trainer = unlearning(lab, tmp_path, forget_loss="npo")
    trainer.train()
    assert trainer.reference is None
    modules = [value for value in vars(trainer).values() if isinstance(value, nn.Module)]
    assert all(module is trainer.model for module in modules)
    (cache,) = trainer.reference_logps.values()
    model = lab.model(trained=True)
    with torch.no_grad():
        expected = [-row_nll(model, row).sum().item() for row in trainer.data.forget]
    assert cache.tolist() == pytest.approx(expected, rel=1e-4)
    # before the first step model and reference agree: -(2/beta) log sigmoid(0)
    assert logged(trainer, "loss/forget")[0] == pytest.approx(20 * 0.6931472, rel=1e-5)


def test_cached_references_belong_to_their_rows_when_only_some_are_evaluated(lab, tmp_path):
    trainer = unlearning(lab, tmp_path, forget_loss="npo", forget_eval_size=4, learning_rate=0.0)
    trainer.train()
    assert len(trainer.data.forget_eval) == 4
    assert trainer.evaluate()["eval_loss/forget"] == pytest.approx(20 * 0.6931472, rel=1e-5)


# ---- memory and architectures --------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [False, True])
def test_gradient_checkpointing_changes_nothing(lab, tmp_path, adapter):
    results = []
    for on in (False, True):
        trainer = primal_dual(lab, tmp_path, peft_config=lora() if adapter else None, **{CHECKPOINTING: on})
        trainer.train()
        assert trainer.accelerator.unwrap_model(trainer.model).is_gradient_checkpointing == on
        results.append((parameters(trainer.model), trainer.duals.multipliers.tolist()))
    assert difference(results[0][0], results[1][0]) < 1e-6
    assert results[0][1] == pytest.approx(results[1][1], abs=1e-6)


def test_gradient_checkpointing_is_on_unless_it_is_switched_off(tmp_path):

    assert getattr(UnlearningConfig(output_dir=str(tmp_path), use_cpu=True), CHECKPOINTING) is True
    off = UnlearningConfig(output_dir=str(tmp_path), use_cpu=True, **{CHECKPOINTING: False})
    assert getattr(off, CHECKPOINTING) is False


@pytest.mark.parametrize("architecture", ["gpt2", "qwen"])
def test_other_architectures_forget_and_round_trip(lab, tmp_path, architecture):
    shape = tiny_config(lab.tokenizer, architecture, hidden_size=32, num_layers=2, num_heads=4, max_positions=128)
    trainer = primal_dual(lab, tmp_path, model=tiny_model(shape), forget_target="none", max_steps=8, dual_init=0.0)
    before = trainer.evaluate()["eval_loss/forget"]
    trainer.train()
    assert trainer.evaluate()["eval_loss/forget"] * trainer.normalizer < before
    trainer.save_model(str(tmp_path / "model"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert difference(parameters(loaded), parameters(trainer.model)) == 0


def test_a_saved_model_and_its_tokenizer_come_back(lab, tmp_path):
    trainer = primal_dual(lab, tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert difference(parameters(model), parameters(trainer.model)) == 0
    assert tokenizer.chat_template == lab.tokenizer.chat_template
    text = "Who wrote it?<|end|>"
    assert tokenizer(text)["input_ids"] == lab.tokenizer(text)["input_ids"]
    # and a path is enough to go on from there: model and tokenizer are read from it
    again = PrimalDualTrainer(
        model=str(tmp_path / "model"),
        args=pd_config(tmp_path / "again", max_steps=1, model_init_kwargs='{"dtype": "float32"}'),
        forget_dataset=lab.forget,
        retain_dataset=lab.retain,
    )
    again.train()
    assert again.state.global_step == 1


def test_two_runs_are_equal_bit_for_bit(lab, tmp_path):
    runs = []
    for _ in range(2):
        trainer = primal_dual(lab, tmp_path, peft_config=lora(lora_dropout=0.1), dual_warmup_steps=0, max_steps=4)
        trainer.train()
        runs.append(trainer)
    one, two = runs
    assert difference(parameters(one.model), parameters(two.model)) == 0
    assert one.method_state() == two.method_state()
    for key in ("loss", "loss/forget", "loss/retain/people", "grad_norm", "violation/facts"):
        assert logged(one, key) == logged(two, key)


@pytest.mark.parametrize(("dtype", "bf16"), [(torch.float32, True), (torch.bfloat16, False), (torch.bfloat16, True)])
def test_half_precision_trains_and_measures_in_float32(lab, tmp_path, dtype, bf16):
    exact = primal_dual(lab, tmp_path, retain_loss="kl", retain_eps=0.1)
    trainer = primal_dual(
        lab, tmp_path, model=lab.model(trained=True, dtype=dtype), bf16=bf16, retain_loss="kl", retain_eps=0.1
    )
    exact.train()
    trainer.train()
    assert {value.dtype for value in trainer.model.parameters()} == {dtype}
    assert trainer.duals.multipliers.dtype == torch.float64
    assert logged(trainer, "forget_nll")[0] == pytest.approx(logged(exact, "forget_nll")[0], rel=0.1)
    assert logged(trainer, "loss/retain/people")[0] == pytest.approx(0.0, abs=1e-5), "the reference rounds alike"


def test_steps_do_not_depend_on_loader_workers(lab, tmp_path):
    runs = []
    for workers in (0, 2):
        trainer = primal_dual(lab, tmp_path, dataloader_num_workers=workers, max_steps=5)
        trainer.train()
        runs.append(trainer)
    assert difference(parameters(runs[0].model), parameters(runs[1].model)) == 0


def test_the_reference_of_a_model_that_trl_has_just_trained_is_a_copy_and_not_the_model_itself(lab, tmp_path):
    """TRL's SFTTrainer leaves a forward on the model whose closure holds the model's own: deepcopy keeps that."""
    from trl import SFTConfig, SFTTrainer

    model = lab.model()
    quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    SFTTrainer(
        model=model,
        args=SFTConfig(output_dir=str(tmp_path), max_steps=1, **quiet),
        train_dataset=lab.retain.rename_columns({"question": "prompt", "answer": "completion"}),
        processing_class=lab.tokenizer,
    ).train()
    trainer = UnlearningTrainer(
        model,
        config(tmp_path, retain_loss="kl", max_steps=3, learning_rate=1e-2),
        forget_dataset=lab.forget,
        retain_dataset=lab.retain,
        processing_class=lab.tokenizer,
    )
    trainer.train()
    divergence = logged(trainer, "loss/retain/retain")
    assert abs(divergence[0]) < 1e-5
    assert divergence[-1] > 1e-3, "zero if the reference moves along"
