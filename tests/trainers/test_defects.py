"""The nine defects of the published reference code (a PDU trainer of a benchmark suite), each shown to be absent."""

from __future__ import annotations

import copy

import pytest
import torch
from kit import Recorder, config, difference, folders, logged, parameters, pd_config, row_nll
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, TrainerCallback

from hf_unlearn.trainers import PrimalDualTrainer, UnlearningTrainer


def primal_dual(lab, folder, *, trained=True, model=None, optimizers=(None, None), callbacks=None, **kwargs):
    recorder = Recorder(lab.tokenizer)
    trainer = PrimalDualTrainer(
        model=model or lab.model(trained=trained),
        args=pd_config(folder, **kwargs),
        data_collator=recorder,
        forget_dataset=lab.forget,
        retain_dataset=lab.retain,
        holdout_dataset=lab.holdout,
        processing_class=lab.tokenizer,
        optimizers=optimizers,
        callbacks=callbacks,
    )
    trainer.recorder = recorder
    return trainer


# ---- 1 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("forget_loss", ["lmf", "grad_ascent", "entropy"])
def test_1_exactly_the_positions_that_predict_the_answer_are_flattened(lab, tmp_path, forget_loss, fused):
    trainer = primal_dual(
        lab,
        tmp_path,
        forget_loss=forget_loss,
        forget_target="none",
        dual_init=0.0,
        max_steps=1,
        dual_warmup_steps=5,
        fused_head=fused,
    )
    captured = []

    def keep(module, inputs, output):
        if output.requires_grad:
            output.retain_grad()
            captured.append(output)

    trainer.model.model.norm.register_forward_hook(keep)  # what the head reads
    trainer.train()
    hidden = captured[0]
    touched = hidden.grad.abs().sum(-1) > 0
    for number, item in enumerate(trainer.recorder.batches[0]):
        labels = item["forget"]["labels"]
        expected = [t for t in range(len(labels) - 1) if labels[t + 1] != -100]
        assert touched[number].nonzero().flatten().tolist() == expected
        first = next(t for t, label in enumerate(labels) if label != -100)
        assert expected[0] == first - 1, "the first answer token is predicted by the prompt's last position"
        assert labels[expected[-1] + 1] == lab.tokenizer.eos_token_id, "and the end of the answer is forgotten too"


# ---- 2 ---------------------------------------------------------------------------------------------------------------


def test_2_multipliers_move_once_per_optimizer_step_and_not_within_it(lab, tmp_path):
    trainer = primal_dual(
        lab,
        tmp_path,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=5,
        dual_warmup_steps=0,
        dual_lr=2.0,
        max_steps=4,
        learning_rate=5e-3,
    )
    used, inner = [], trainer.retain_weights

    def spy():
        weights = inner()
        used.append((trainer.state.global_step, float(weights["retain"])))
        return weights

    trainer.retain_weights = spy
    trainer.train()
    during = [entry for entry in used if entry[0] < 4]
    assert len(during) == 20
    assert len(set(during)) == 4, "one multiplier for the five micro-batches of a step"
    assert trainer.duals.updates == 4
    multiplier = 1.0
    for (_, weight), loss in zip(sorted(set(during)), logged(trainer, "loss/retain/retain"), strict=True):
        assert weight == pytest.approx(multiplier, abs=1e-6)
        multiplier = max(0.0, multiplier + 2.0 * (loss - trainer.duals.eps["retain"]))
    assert float(trainer.duals.multipliers) == pytest.approx(multiplier, abs=1e-6)


# 3 and 4, which need two processes, are in test_two_ranks.py


# ---- 5 ---------------------------------------------------------------------------------------------------------------


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step
        return control


@pytest.mark.parametrize(("kind", "stop"), [("primal_dual", 4), ("primal_dual", 6), ("lora_dropout", 4), ("npo", 4)])
def test_5_stop_and_resume_is_the_uninterrupted_run_bit_for_bit(lab, tmp_path, kind, stop):
    """Epochs of three steps with accumulation, stopped within one (4) or at its end (6): AdamW's state, the
    multipliers, the order of the data, and dropout all have to continue."""

    def build(folder, callbacks=None):
        shared = {
            "max_steps": 8,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "save_strategy": "steps",
            "save_steps": 2,
        }
        peft_config = None
        if kind == "npo":
            args, trainer_class = config(folder, forget_loss="npo", retain_loss="kl", **shared), UnlearningTrainer
        else:
            args = pd_config(
                folder, dual_warmup_steps=1, dual_lr=2.0, dual_smoothing=0.5, learning_rate=5e-3, **shared
            )
            trainer_class = PrimalDualTrainer
        if kind == "lora_dropout":
            from peft import LoraConfig

            peft_config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.2)
        torch.manual_seed(0)  # LoRA draws its matrices from the global state
        return trainer_class(
            model=lab.model(trained=True),
            args=args,
            forget_dataset=lab.forget,
            retain_dataset=lab.retain,
            holdout_dataset=lab.holdout,
            processing_class=lab.tokenizer,
            peft_config=peft_config,
            callbacks=callbacks,
        )

    whole = build(tmp_path / "whole")
    whole.train()
    stopped = build(tmp_path / "parts", [StopAt(stop)])
    stopped.train()
    assert stopped.state.global_step == stop
    resumed = build(tmp_path / "parts")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 8
    assert difference(parameters(whole.model), parameters(resumed.model)) == 0
    expected, got = whole.method_state(), resumed.method_state()
    assert got == expected
    if kind != "npo":
        assert got["duals"]["updates"] == 8
        assert got["duals"]["multipliers"] != [1.0]
    times = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss"}

    def steps(trainer):
        return [entry for entry in trainer.state.log_history if not times & entry.keys()]

    assert steps(resumed) == steps(whole)
    if kind == "npo":
        assert torch.equal(resumed.reference_logps["answer"], whole.reference_logps["answer"])


# ---- 6 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "accumulation", "epochs", "expected"),
    [(2, 2, 2.0, 6), (2, 4, 1.0, 2), (3, 3, 1.0, 2), (2, 2, 0.5, 2), (5, 1, 2.0, 4), (1, 4, 1.0, 3)],
)
def test_6_warm_up_epochs_are_whole_optimizer_steps(lab, tmp_path, batch, accumulation, epochs, expected):
    """10 rows; (2, 2): 5 micro-batches an epoch are 3 steps, so two epochs are 6 steps and not 5."""
    trainer = primal_dual(
        lab,
        tmp_path,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        dual_warmup_epochs=epochs,
        num_train_epochs=3,
        retain_eps=0.0,
    )
    trainer.train()
    assert logged(trainer, "dual_warmup_steps") == [expected]
    multipliers = logged(trainer, "dual/retain")
    # the multiplier of step k is the one before its own update: the first that may differ is step expected + 2
    assert multipliers[: expected + 1] == [1.0] * (expected + 1)
    assert all(value > 1.0 for value in multipliers[expected + 1 :])
    assert len(multipliers) > expected + 1
    if epochs == 2.0:
        ends = [entry["epoch"] for entry in trainer.state.log_history if "dual/retain" in entry]
        assert ends[expected - 1] == pytest.approx(2.0), "the last step of the warm start ends epoch 2"


# ---- 7 ---------------------------------------------------------------------------------------------------------------


def test_7_the_end_token_stays_visible_and_a_label_when_it_is_also_the_padding(lab, tmp_path):
    tokenizer = copy.deepcopy(lab.tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    end = tokenizer.eos_token_id
    seen = []

    def keep(module, args, kwargs):
        if module.training:  # not the measurements before step 0
            seen.append((kwargs["input_ids"].clone(), kwargs["attention_mask"].clone()))

    recorder = Recorder(tokenizer)
    model = lab.model(trained=True)
    trainer = PrimalDualTrainer(
        model=model,
        args=pd_config(tmp_path, max_steps=1, dual_warmup_steps=0),
        data_collator=recorder,
        forget_dataset=lab.forget,
        retain_dataset=lab.retain,
        processing_class=tokenizer,
    )
    handle = model.register_forward_pre_hook(keep, with_kwargs=True)
    trainer.train()
    handle.remove()
    rows = [item["forget"] for item in recorder.batches[0]] + [
        item["retain"]["retain"] for item in recorder.batches[0]
    ]
    ((ids, mask),) = seen
    lengths = [len(row["input_ids"]) for row in rows]
    assert mask.sum(-1).tolist() == lengths
    assert (ids == end).sum() > sum(row["input_ids"].count(end) for row in rows), "there is padding in this batch"
    for row, row_ids, row_mask in zip(rows, ids, mask, strict=True):
        assert row["input_ids"][-1] == row["labels"][-1] == end
        assert row["input_ids"].count(end) == 2, "one closes the question, one the answer"
        assert ((row_ids == end) & (row_mask == 1)).sum() == 2
    # the model ends an answer as it did: a masked or unlabelled EOS would not be part of the retain loss
    loss = torch.cat([row_nll(lab.model(trained=True), row) for row in rows[4:]]).mean().item()
    assert logged(trainer, "loss/retain/retain")[0] == pytest.approx(loss, rel=1e-5)


# ---- 8 ---------------------------------------------------------------------------------------------------------------


class CountReads(TorchDispatchMode):
    """Counts values that are read back from tensors: each would be a wait for the device."""

    def __init__(self, model):
        super().__init__()
        self.reads, self.inside = 0, False
        # what the architecture itself reads (transformers looks at masks on the CPU) is not ours
        model.register_forward_pre_hook(lambda *_: setattr(self, "inside", True))
        model.register_forward_hook(lambda *_: setattr(self, "inside", False))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.reads += func is torch.ops.aten._local_scalar_dense.default and not self.inside
        return func(*args, **(kwargs or {}))


def test_8_logs_only_at_logging_steps(lab, tmp_path):
    class Logs(TrainerCallback):
        def __init__(self):
            self.steps = []

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "learning_rate" in logs:
                self.steps.append((state.global_step, logs))

    logs = Logs()
    trainer = primal_dual(
        lab, tmp_path, logging_steps=3, max_steps=7, gradient_accumulation_steps=2, callbacks=[logs], dual_lr=2.0
    )
    every = primal_dual(lab, tmp_path, logging_steps=1, max_steps=7, gradient_accumulation_steps=2, dual_lr=2.0)
    trainer.train()
    every.train()
    assert [step for step, _ in logs.steps] == [3, 6]
    for key in ("loss/forget", "loss/retain/retain", "violation/retain", "dual/retain"):
        values = logged(every, key)
        means = [sum(values[:3]) / 3, sum(values[3:6]) / 3]
        assert [entry[key] for _, entry in logs.steps] == pytest.approx(means, rel=1e-6), key


def test_8_values_read_from_the_device_do_not_grow_with_the_micro_batches(lab, tmp_path):
    def reads(accumulation):
        trainer = primal_dual(
            lab,
            tmp_path,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=accumulation,
            logging_steps=100,
            max_steps=2,
        )
        inner, counter = trainer.training_step, CountReads(trainer.model)

        def counted(*args, **kwargs):
            with counter:
                return inner(*args, **kwargs)

        trainer.training_step = counted
        trainer.train()
        return counter.reads

    once = reads(1)
    assert once == reads(5)
    assert once <= 2 * 2, "two optimizer steps: one check for NaN and one token counter each"


# ---- 9 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        ({"retain_eps": 0.4}, lambda reference: 0.4),
        ({"retain_tolerance": 0.5}, lambda reference: 1.5 * reference),
        ({"retain_margin": 0.25}, lambda reference: reference + 0.25),
        ({}, lambda reference: reference + 0.03),
    ],
)
def test_9_eps_is_absolute_or_calibrated_before_step_0(lab, tmp_path, limit, expected):
    trainer = primal_dual(lab, tmp_path, max_steps=1, **limit)
    trainer.train()
    model = lab.model(trained=True)
    with torch.no_grad():
        reference = torch.cat([row_nll(model, row) for row in trainer.data.retain_eval["retain"]]).mean().item()
    assert trainer.duals.eps == {"retain": pytest.approx(expected(reference), rel=1e-5)}
    assert logged(trainer, "eps/retain") == [trainer.duals.eps["retain"]]


def test_9_the_multiplier_has_a_cap(lab, tmp_path):
    trainer = primal_dual(
        lab, tmp_path, max_steps=4, retain_eps=0.0, dual_lr=1e3, dual_max=7.5, dual_warmup_steps=0, learning_rate=1e-4
    )
    trainer.train()
    assert logged(trainer, "dual/retain") == [1.0, 7.5, 7.5, 7.5]


def test_9_the_best_feasible_checkpoint_is_returned_and_not_the_last(lab, tmp_path):
    """Ascent with multipliers that stay at 0: gentle for two epochs, then far too fast. Epochs 1 and 2 satisfy the
    limit, and 2 has forgotten more; epochs 3 and 4 have forgotten most of all, and violate it."""
    model = lab.model(trained=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.005)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < 4 else 100.0)
    trainer = primal_dual(
        lab,
        tmp_path,
        model=model,
        optimizers=(optimizer, schedule),
        checkpoints=True,
        save_total_limit=None,
        forget_loss="grad_ascent",
        forget_target="none",
        per_device_train_batch_size=5,
        num_train_epochs=4,
        dual_init=0.0,
        dual_warmup_epochs=10.0,
        retain_margin=0.5,
    )
    output = trainer.train()
    feasible, forget = logged(trainer, "eval_feasible"), logged(trainer, "eval_loss/forget")
    assert feasible == [1.0, 1.0, 0.0, 0.0]
    assert forget[0] > forget[1] > forget[2]
    assert folders(tmp_path) == ["checkpoint-2", "checkpoint-4", "checkpoint-6", "checkpoint-8"]
    best = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    last = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-8")
    assert difference(parameters(trainer.model), parameters(best)) == 0
    assert difference(parameters(trainer.model), parameters(last)) > 1e-2

    # what is reported is the returned model, not the last iterate
    (row,) = trainer.feasibility
    assert row["feasible"] is True
    assert row["loss"] <= row["eps"]
    assert row["loss"] == pytest.approx(logged(trainer, "eval_loss/retain/retain")[1], rel=1e-5)
    assert output.metrics["final_feasible"] == 1.0
    assert output.metrics["final_loss/forget"] == pytest.approx(forget[1], rel=1e-5)


def test_9_with_a_forget_target_the_feasible_checkpoint_nearest_to_the_level_is_returned(lab, tmp_path):
    model = lab.model(trained=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    trainer = primal_dual(
        lab,
        tmp_path,
        model=model,
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)),
        checkpoints=True,
        save_total_limit=None,
        forget_loss="grad_ascent",
        forget_target=0.2,
        per_device_train_batch_size=5,
        num_train_epochs=4,
        dual_init=0.0,
        dual_warmup_epochs=10.0,
        retain_margin=1e3,
    )
    trainer.train()
    distances = []
    for step in (2, 4, 6, 8):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / f"checkpoint-{step}")
        with torch.no_grad():
            means = [row_nll(model, row).mean().item() for row in trainer.data.forget]
        distances.append(sum(max(0.2 - mean, 0.25 * (mean - 0.2)) / 0.2 for mean in means) / len(means))
    assert logged(trainer, "eval_selection_score") == pytest.approx(distances, rel=1e-4)
    best = min(range(4), key=distances.__getitem__)
    chosen = AutoModelForCausalLM.from_pretrained(tmp_path / f"checkpoint-{2 * (best + 1)}")
    assert difference(parameters(trainer.model), parameters(chosen)) == 0
    assert trainer.duals.updates == 2 * (best + 1), "multipliers that are reported belong to the returned checkpoint"


def test_9_an_infeasible_run_ends_says_so_and_returns_the_least_violation(lab, tmp_path, caplog):
    trainer = primal_dual(
        lab,
        tmp_path,
        checkpoints=True,
        retain_eps=1e-4,
        num_train_epochs=3,
        dual_warmup_epochs=0.0,
        learning_rate=3e-3,
    )
    with caplog.at_level("WARNING"):
        output = trainer.train()
    assert "below half of the loss before step 0" in caplog.text
    assert "Infeasible: the loss on retain set 'retain'" in caplog.text
    assert output.metrics["final_feasible"] == 0.0
    assert [row["feasible"] for row in trainer.feasibility] == [False]
    losses = logged(trainer, "eval_loss/retain/retain")
    assert trainer.feasibility[0]["loss"] == pytest.approx(min(losses), rel=1e-5)
