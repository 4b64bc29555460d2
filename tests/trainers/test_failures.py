"""Losses that become NaN, disks that fill up, checkpoints that do not fit."""

from __future__ import annotations

import errno

import pytest
import torch
from kit import build, difference, folders, parameters
from transformers import AutoModelForCausalLM, TrainerCallback

from hf_unlearn.trainers import UnlearningTrainer

# ---- numbers and disks that fail while training --------------------------------------------------------------------------------


class BreakLoss:
    """From training step `step` on, the hidden states of the retain rows (or all) are NaN."""

    def __init__(self, model, step, rows):
        self.calls, self.step, self.rows = 0, step, rows
        model.model.register_forward_hook(self)

    def __call__(self, module, inputs, output):
        if module.training:
            self.calls += 1
            if self.calls >= self.step:
                output.last_hidden_state[self.rows] = float("nan")


class Remember(TrainerCallback):
    def __init__(self):
        self.steps = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.steps.append(parameters(model))


@pytest.mark.parametrize(
    ("rows", "term"), [(slice(5, None), "retain/retain"), (slice(0, 5), "forget"), (slice(None), "forget")]
)
def test_a_nan_names_step_and_term_and_leaves_the_weights_of_the_step_before(lab, tmp_path, rows, term):
    remember = Remember()
    trainer = build(lab, tmp_path, callbacks=[remember], max_steps=5, per_device_train_batch_size=5)
    BreakLoss(trainer.model, 3, rows)
    with pytest.raises(FloatingPointError, match=rf"Step 3: the loss term .*{term}.* is not finite") as error:
        trainer.train()
    assert "nan" in str(error.value)
    assert trainer.state.global_step == 2
    assert difference(parameters(trainer.model), remember.steps[-1]) == 0
    assert all(value.isfinite().all() for value in trainer.model.parameters())
    assert trainer.duals.multipliers.isfinite().all()


def test_broken_weights_are_reported_when_they_are_measured_and_are_not_saved(lab, tmp_path):
    """The last step of an epoch can break the weights without any training loss seeing it."""
    trainer = build(lab, tmp_path, checkpoints=True, max_steps=6)

    def broken(module, inputs, output):
        if not module.training and trainer.state.global_step == 6:
            output.last_hidden_state[:] = float("nan")

    trainer.model.model.register_forward_hook(broken)
    with pytest.raises(FloatingPointError, match=r"Evaluation after step 6: forget = nan, retain/retain = nan"):
        trainer.train()
    assert folders(tmp_path) == ["checkpoint-3"]


def full_disk(monkeypatch, module, name, matching, error=None):
    """`module.name` fails with ENOSPC for paths that contain `matching`, after having written a part."""
    inner = getattr(module, name)

    def fail(content, path, *args, **kwargs):
        if matching in str(path):
            with open(path, "wb") as file:
                file.write(b"half")
            raise error or OSError(errno.ENOSPC, "No space left on device", str(path))
        return inner(content, path, *args, **kwargs)

    monkeypatch.setattr(module, name, fail)


@pytest.mark.parametrize("what", ["weights", "training_args", "optimizer", "state"])
def test_a_full_disk_leaves_the_earlier_checkpoint_intact_and_says_what_to_do(lab, tmp_path, monkeypatch, what):
    import transformers.modeling_utils

    import hf_unlearn.trainers.state as state

    def new():
        return build(
            lab,
            tmp_path,
            checkpoints=True,
            save_strategy="steps",
            eval_strategy="steps",
            save_steps=2,
            eval_steps=2,
            max_steps=4,
            dual_warmup_steps=1,
            load_best_model_at_end=False,
        )

    trainer = new()
    with monkeypatch.context() as patch:
        if what == "weights":
            full_disk(patch, transformers.modeling_utils, "safe_save_file", "checkpoint-4")
        elif what == "state":
            full_disk(patch, state.os, "replace", "checkpoint-4")
        else:
            full_disk(patch, torch, "save", f"checkpoint-4/{what}")
        with pytest.raises(OSError, match=r"Saving to .*checkpoint-4 failed.*No space left.*Free space") as error:
            trainer.train()
    assert "resume_from_checkpoint=True" in str(error.value)
    assert folders(tmp_path) == ["checkpoint-2"], "nothing half-written is left"
    AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    resumed = new()
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    whole = build(lab, tmp_path / "whole", max_steps=4, dual_warmup_steps=1)
    whole.train()
    assert resumed.duals.multipliers.tolist() == whole.duals.multipliers.tolist()


@pytest.mark.parametrize(
    "message",
    [  # what torch.save and safetensors say on a real full file system
        "[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534",
        "Error while serializing: I/O error: No space left on device (os error 28)",
        "basic_ios::clear: iostream error",
    ],
)
def test_a_full_disk_is_recognised_behind_the_errors_of_torch_and_safetensors(lab, tmp_path, monkeypatch, message):
    trainer = build(lab, tmp_path)
    full_disk(monkeypatch, torch, "save", "training_args", RuntimeError(message))
    with pytest.raises(OSError, match=r"Saving to .* failed: .*Is the disk full\?"):
        trainer.save_model(str(tmp_path / "model"))


def test_other_errors_while_saving_stay_what_they_are(lab, tmp_path, monkeypatch):
    trainer = build(lab, tmp_path)
    for error in (RuntimeError("shapes differ"), OSError("the server did not answer")):
        full_disk(monkeypatch, torch, "save", "training_args", error)
        with pytest.raises(type(error), match=f"^{error}$"):
            trainer.save_model(str(tmp_path / "model"))


# ---- checkpoints that do not fit ---------------------------------------------------------------------------------------------


def test_a_checkpoint_of_another_method_is_refused_before_anything_is_loaded(lab, tmp_path):
    first = build(lab, tmp_path, UnlearningTrainer, save_strategy="steps", save_steps=1, max_steps=1)
    first.train()
    model = lab.model(trained=True)
    second = build(lab, tmp_path, model=model)
    with pytest.raises(ValueError, match=r"checkpoint of method 'unlearning'.*this trainer is 'primal-dual'"):
        second.train(resume_from_checkpoint=True)
    assert difference(parameters(model), parameters(lab.target)) == 0


def test_a_checkpoint_without_our_state_is_refused(lab, tmp_path):
    trainer = build(lab, tmp_path)
    with pytest.raises(ValueError, match="holds no checkpoint to resume from"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="is not a folder"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "nowhere"))
    (tmp_path / "checkpoint-1").mkdir()
    with pytest.raises(ValueError, match=r"has no unlearning_state.json.*not completely"):
        trainer.train(resume_from_checkpoint=True)


def test_a_checkpoint_with_other_retain_sets_is_refused(lab, tmp_path):
    build(lab, tmp_path, save_strategy="steps", save_steps=1, max_steps=1).train()
    other = build(lab, tmp_path, retain_dataset={"people": lab.retain})
    with pytest.raises(
        ValueError, match=r"written with \{.*'retain/retain': 14\}, this run has \{'retain/people': 14"
    ):
        other.train(resume_from_checkpoint=True)
