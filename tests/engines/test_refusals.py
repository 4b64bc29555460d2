"""Engines, launches and checkpoints that do not fit, each refused before compute is spent."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from cases import make_trainer
from transformers import AutoModelForCausalLM
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from hf_unlearn.trainers import PrimalDualConfig, UnlearningConfig
from hf_unlearn.trainers.checkpoints import RunRecord, check_same_run
from hf_unlearn.trainers.engines import check_parallelism

SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}


def settings(tmp_path: Path, **arguments: Any) -> UnlearningConfig:
    return UnlearningConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", **arguments)


@pytest.fixture
def _no_engine_is_left():
    yield
    unset_hf_deepspeed_config()
    AcceleratorState._reset_state(reset_partial_state=True)


# ---- launches ----------------------------------------------------------------------------------------------------------


def test_two_engines_at_once_are_refused_however_they_are_asked_for(tmp_path, monkeypatch):
    zero = {"zero_optimization": {"stage": 2}}
    with pytest.raises(ValueError, match=r"DeepSpeed \(by args.deepspeed\) and FSDP \(by args.fsdp\) are both asked"):
        settings(tmp_path, deepspeed=zero, fsdp=True)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"FSDP \(by ACCELERATE_USE_FSDP=true\).*Choose one"):
        settings(tmp_path, deepspeed=zero)


@pytest.mark.usefixtures("_no_engine_is_left")
@pytest.mark.parametrize(
    ("number", "given", "expected"),
    [
        ("train_batch_size", 24, "train_batch_size=24 vs hf train_batch_size .calculated.=8"),
        ("train_micro_batch_size_per_gpu", 3, "=3 vs hf per_device_train_batch_size=4"),
        ("gradient_accumulation_steps", 5, "=5 vs hf gradient_accumulation_steps=2"),
        ("gradient_clipping", 1.0, "=1.0 vs hf max_grad_norm=0.5"),
    ],
)
def test_batch_sizes_and_clipping_that_contradict_deepspeeds_are_refused(tmp_path, number, given, expected):
    with pytest.raises(ValueError, match=rf"(?s)disagree.*{expected}.*Give a number in one place only.*4 \* 2 \* 1"):
        settings(
            tmp_path,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            max_grad_norm=0.5,
            deepspeed={"zero_optimization": {"stage": 2}, number: given},
        )


def test_loaders_that_split_batches_are_refused(tmp_path):
    for option in ("split_batches", "dispatch_batches"):
        with pytest.raises(ValueError, match=r"nested .* batches cannot be. Leave both off"):
            settings(tmp_path, accelerator_config={option: True})


def test_the_checkpoint_on_sigterm_of_transformers_is_refused_for_our_own(tmp_path):
    with pytest.raises(ValueError, match="Leave it off: save_on_sigterm"):
        settings(tmp_path, enable_jit_checkpoint=True)


@pytest.mark.parametrize(("size", "name"), [("cp_size", "Context"), ("sp_size", "Sequence"), ("tp_size", "Tensor")])
def test_parallelism_in_which_processes_share_rows_is_refused(workspace, tmp_path, size, name):
    args = PrimalDualConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    args.parallelism_config = SimpleNamespace(**{size: 2})
    model = AutoModelForCausalLM.from_pretrained(workspace / "model")
    with pytest.raises(ValueError, match=f"{size}=2. {name} parallelism .*Turn it off"):
        check_parallelism(args, model)
    args.parallelism_config = SimpleNamespace(cp_size=1, sp_size=1, tp_size=1, dp_shard_size=2)
    check_parallelism(args, model)
    if size == "tp_size":
        model.config.distributed_config = SimpleNamespace(tp_size=2, fsdp_size=2)
        with pytest.raises(ValueError, match=r"loaded with distributed_config.tp_size=2.*fsdp_size"):
            make_trainer(workspace, "lmf", tmp_path, load=lambda path: model)


# ---- checkpoints -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(workspace: Path) -> Path:
    make_trainer(workspace, "lmf", workspace / "one-step", **SAVING).train()
    return workspace / "one-step" / "checkpoint-1"


def test_a_checkpoint_of_another_model_is_refused(workspace, checkpoint, tmp_path):
    def deeper(path: Path) -> Any:
        config = AutoModelForCausalLM.from_pretrained(path).config
        config.num_hidden_layers = 3
        return AutoModelForCausalLM.from_config(config)

    trainer = make_trainer(workspace, "lmf", tmp_path, load=deeper, **SAVING)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with pytest.raises(ValueError, match=r"holds a LlamaForCausalLM with 4.,... parameters.*this run trains a Llama"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


def test_a_checkpoint_of_the_whole_model_is_not_one_of_an_adapter(workspace, checkpoint, tmp_path):
    trainer = make_trainer(workspace, "lora", tmp_path, **SAVING)
    with pytest.raises(ValueError, match=r"Resume with the same model and peft_config"):
        trainer.train(resume_from_checkpoint=str(checkpoint))


def test_a_checkpoint_without_multipliers_is_refused(workspace, checkpoint, tmp_path):
    copy = tmp_path / "checkpoint-1"
    copy.mkdir()
    for file in checkpoint.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    state = json.loads((copy / "unlearning_state.json").read_text(encoding="utf-8"))
    state["duals"] = None
    (copy / "unlearning_state.json").write_text(json.dumps(state), encoding="utf-8")
    trainer = make_trainer(workspace, "lmf", tmp_path, **SAVING)
    with pytest.raises(ValueError, match="The checkpoint has no multipliers"):
        trainer.train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda path: (path / "optimizer.pt").unlink(), "optimizer.pt is missing"),
        (lambda path: (path / "model.safetensors").write_bytes(b"half"), "model.safetensors has 4 bytes and was"),
        (
            lambda path: (path / "unlearning_state.json").unlink(),
            "has no unlearning_state.json, which is written last",
        ),
        (lambda path: (path / "unlearning_state.json").write_text('{"ver'), "has no unlearning_state.json"),
    ],
)
def test_an_incomplete_checkpoint_is_skipped_with_a_warning_and_refused_by_name(
    workspace, tmp_path, caplog, harm, reason
):
    arguments = {**SAVING, "max_steps": 2, "save_total_limit": 2}
    make_trainer(workspace, "lmf", tmp_path, **arguments).train()
    harm(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match=rf"checkpoint-2 is not a complete checkpoint: .*{reason}"):
        make_trainer(workspace, "lmf", tmp_path, **arguments).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-2")
        )
    again = make_trainer(workspace, "lmf", tmp_path, **arguments)
    with caplog.at_level("WARNING"):
        again.train(resume_from_checkpoint="True")  # as a command line says it
    assert again.state.global_step == 2
    assert reason in caplog.text
    assert f"It is skipped: the run is resumed from {tmp_path / 'checkpoint-1'}" in caplog.text


def test_a_saved_model_is_no_checkpoint(workspace, tmp_path):
    trainer = make_trainer(workspace, "lmf", tmp_path, **SAVING)
    trainer.save_model(str(tmp_path / "model"))
    with pytest.raises(ValueError, match=r"has no trainer_state.json: it is a saved model, not a checkpoint"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "model"))


def test_a_checkpoint_of_weights_only_is_refused_before_anything_is_loaded(workspace, tmp_path):
    """The Trainer would go on with a fresh optimizer, and say nothing."""
    arguments = {
        **SAVING,
        "save_only_model": True,
        "max_steps": 2,
        "save_total_limit": 2,
        "eval_strategy": "steps",
        "eval_steps": 1,
    }
    first = make_trainer(workspace, "lmf", tmp_path, **arguments, load_best_model_at_end=True)
    first.train()
    best = tmp_path / f"checkpoint-{first.state.best_global_step}"
    kept = AutoModelForCausalLM.from_pretrained(best).state_dict()
    assert all(torch.equal(value, kept[name]) for name, value in first.model.state_dict().items())
    for given, named in ((True, "checkpoint-2"), (str(best), best.name)):
        trainer = make_trainer(workspace, "lmf", tmp_path, **SAVING)
        before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        with pytest.raises(
            ValueError, match=rf"{named} was written with save_only_model=True.*Expected .*=False.*begin a new run"
        ):
            trainer.train(resume_from_checkpoint=given)
        assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
        assert trainer.optimizer is None


def test_zero_shards_belong_to_a_number_of_processes():
    now = RunRecord(engine="zero-2", processes=4, rows_per_step=8, data={"forget": 16}, model={"class": "Llama"})
    saved = {**now.to_json(), "processes": 2}
    with pytest.raises(ValueError, match=r"written by 2 processes, this run has 4.*Resume with 2"):
        check_same_run(saved, now, "checkpoint-1")
    replicated = RunRecord(**{**now.to_json(), "engine": "replicated"})
    check_same_run({**saved, "engine": "replicated"}, replicated, "checkpoint-1")
    check_same_run({**saved, "engine": "replicated", "rows_per_step": 4}, replicated, "x", ignore_data_skip=True)
