"""Evaluation during training: the numbers of `evaluate_tofu`, no trace in the run, and the checkpoint it chooses."""

from __future__ import annotations

import copy
import json
import random
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from kit import QUIET, difference, lora, parameters, pd_config
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from hf_unlearn.data import pad_rows, prepare_dataset
from hf_unlearn.lab.world import make_world
from hf_unlearn.metrics import evaluate_tofu, evenly_spaced
from hf_unlearn.metrics.scores import TofuScores
from hf_unlearn.reports.eval_callback import UnlearningEvalCallback
from hf_unlearn.reports.eval_composite import compose
from hf_unlearn.trainers import PrimalDualTrainer

ARGUMENTS = {name: value for name, value in QUIET.items() if name != "max_length"}
NAMES = ["1-forget_probability", "retain_probability"]


@pytest.fixture(scope="module")
def parts() -> dict[str, Any]:
    """Rows with paraphrases and wrong answers: 4 to forget, 36 to keep, and a general part of 4."""
    world = make_world(seed=0, num_authors=10, questions_per_author=4)
    return {
        "forget": world.split("forget10_perturbed"),
        "retain": world.split("retain_perturbed"),
        "general": {"strangers": world.split("holdout10_perturbed")},
    }


@pytest.fixture
def rows(lab) -> Dataset:
    return prepare_dataset(lab.forget, lab.tokenizer, name="rows").select_columns(["input_ids", "labels"])


def watch(parts: dict[str, Any], **options: Any) -> UnlearningEvalCallback:
    return UnlearningEvalCallback(**{**parts, "limits": {"retain": 7}, **options})


def _plain_on(rows, lab, folder, callbacks, **changes) -> Trainer:
    return plain(lab, folder, rows, callbacks, **changes)


def plain(lab, folder, rows, callbacks, *, model=None, **changes) -> Trainer:
    """Trains on what is to be forgotten: its probability rises."""

    def collate(items):
        batch = pad_rows(items, pad_token_id=lab.tokenizer.pad_token_id)
        return {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}

    arguments = {"output_dir": str(folder), "max_steps": 4, "save_strategy": "no", "seed": 3, **ARGUMENTS, **changes}
    trainer = Trainer(
        model if model is not None else lab.model(),
        TrainingArguments(**arguments),
        train_dataset=rows,
        eval_dataset=rows.select(range(2)),
        data_collator=collate,
        processing_class=lab.tokenizer,
        callbacks=callbacks,
    )
    for callback in callbacks:
        if isinstance(callback, UnlearningEvalCallback):
            callback.trainer = trainer
    return trainer


def sft(lab, folder, callbacks, *, attach: bool = True, model=None, **changes) -> SFTTrainer:
    arguments = {"output_dir": str(folder), "max_steps": 4, "save_strategy": "no", **ARGUMENTS, **changes}
    peft_config = arguments.pop("peft_config", None)
    rows = Dataset.from_list([{"prompt": row["question"], "completion": row["answer"]} for row in lab.forget])
    trainer = SFTTrainer(
        model if model is not None else lab.model(),
        SFTConfig(**{**arguments, "max_length": 128}),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=lab.tokenizer,
        callbacks=callbacks,
        peft_config=peft_config,
    )
    for callback in callbacks:
        if attach and isinstance(callback, UnlearningEvalCallback):
            callback.trainer = trainer
    return trainer


def primal_dual(lab, folder, callbacks, *, model=None, **changes) -> PrimalDualTrainer:
    trainer = PrimalDualTrainer(
        model=model if model is not None else lab.model(trained=True),
        args=pd_config(folder, **{"max_steps": 4, "dual_warmup_steps": 1, **changes}),
        forget_dataset=lab.forget,
        retain_dataset=lab.retain,
        processing_class=lab.tokenizer,
        callbacks=callbacks,
    )
    for callback in callbacks:
        if isinstance(callback, UnlearningEvalCallback):
            callback.trainer = trainer
    return trainer


def entries(trainer: Any) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "unlearn/seconds" in entry]


def scripted(values: list[float]):
    """A composite that goes through the values, whatever the model does; the first call is that of the check."""
    left = iter([0.0, *values])
    return lambda metrics: next(left)


class States(TrainerCallback):
    """Random states, modes, gradients and config, as they are at the end of a step."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_step_end(self, args, state, control, **kwargs):
        model = kwargs["model"]
        self.seen.append(
            (
                torch.get_rng_state().tolist(),
                random.getstate(),
                [np.asarray(part).tolist() for part in np.random.get_state()],
                [module.training for module in model.modules()],
                [None if p.grad is None else p.grad.double().sum().item() for p in model.parameters()],
                [p.requires_grad for p in model.parameters()],
                json.dumps(model.config.to_dict(), sort_keys=True, default=str),
                json.dumps(model.generation_config.to_dict(), sort_keys=True, default=str),
                control.should_log,
                control.should_save,
            )
        )


class After(States):
    """The same, further down the list of callbacks."""


# ------------------------------------------------------------------------------------------------- the numbers


def test_metrics_are_those_of_evaluate_tofu_on_the_same_rows(lab, tmp_path, parts, rows):
    callback = watch(parts, every_n_steps=3, batch_size=5)
    trainer = plain(lab, tmp_path, rows, [callback])
    trainer.train()
    twin = evaluate_tofu(trainer.model, lab.tokenizer, **parts, retain_limit=7, generate=False, batch_size=3)
    last = entries(trainer)[-1]
    expected = twin.summary()
    assert {name.removeprefix("unlearn/") for name in last} - {"seconds", "epoch", "step"} == set(expected)
    for name, value in expected.items():
        assert last[f"unlearn/{name}"] == pytest.approx(value, rel=1e-6, abs=1e-9), name
    for name, part in twin.parts.items():
        np.testing.assert_allclose(callback.scores.parts[name].nll, part.nll, rtol=1e-6)
        assert callback.scores.parts[name].fingerprint == part.fingerprint
    assert [entry["step"] for entry in callback.history] == [3, 4], "after every third step, and after the last one"
    assert callback.history == entries(trainer)
    assert callback.history[0]["unlearn/forget_nll"] > callback.history[1]["unlearn/forget_nll"], "it was trained on"


def test_answers_give_rouge_and_model_utility(lab, tmp_path, parts, rows):
    callback = watch(parts, every_n_steps=2, generate=True, max_new_tokens=5)
    trainer = plain(lab, tmp_path, rows, [callback], model=lab.model(trained=True), max_steps=2)
    trainer.train()
    twin = evaluate_tofu(trainer.model, lab.tokenizer, **parts, retain_limit=7, max_new_tokens=5)
    assert callback.scores.parts["retain"].generations == twin.parts["retain"].generations
    assert callback.history[-1]["unlearn/model_utility"] == pytest.approx(twin.summary()["model_utility"], rel=1e-6)


def test_rows_without_further_columns_and_general_parts_are_enough(lab, tmp_path, rows):
    callback = UnlearningEvalCallback(lab.forget.to_list(), lab.retain, every_n_steps=4)
    trainer = plain(lab, tmp_path, rows, [callback])
    trainer.train()
    names = {"forget_probability", "forget_nll", "retain_probability", "seconds"}
    assert {name.removeprefix("unlearn/") for name in entries(trainer)[-1]} == {*names, "epoch", "step"}


def test_forget_quality_is_against_the_reference_cut_to_the_same_rows(lab, tmp_path, parts, rows):
    target = lab.model(trained=True)
    shown = {**parts, "forget": parts["retain"]}  # 36 rows to choose from
    whole = evaluate_tofu(target, lab.tokenizer, **shown, generate=False)
    callback = watch(shown, reference=whole, limits=9, every_n_steps=2)
    trainer = plain(lab, tmp_path, rows, [callback], max_steps=2)
    trainer.train()
    chosen = evenly_spaced(36, 9)
    cut = evaluate_tofu(
        target, lab.tokenizer, forget=shown["forget"].select(chosen), retain=parts["retain"], generate=False
    )
    mine = evaluate_tofu(
        trainer.model, lab.tokenizer, forget=shown["forget"].select(chosen), retain=parts["retain"], generate=False
    )
    last = callback.history[-1]
    assert last["unlearn/forget_quality"] == pytest.approx(mine.forget_quality_against(cut))
    assert last["unlearn/forget_quality_log10"] == pytest.approx(mine.forget_quality_log10_against(cut))
    assert last["unlearn/mia_auc"] == pytest.approx(mine.mia_auc_against(cut))
    # scored on the same nine rows from the start
    assert watch(shown, reference=cut, limits=9).reference is cut


def test_composite_of_names_is_their_harmonic_mean():
    values = {"a": 0.5, "b": 0.2, "c": 0.0}
    assert compose(["a", "b"], values) == pytest.approx(2 / (1 / 0.5 + 1 / 0.2))
    assert compose(["a", "1-b"], values) == pytest.approx(2 / (1 / 0.5 + 1 / 0.8))
    assert compose(["a", "c"], values) == 0
    assert compose(["1-c"], values) == 1
    assert compose(lambda found: found["a"] - found["b"], values) == pytest.approx(0.3)
    with pytest.raises(TypeError, match="composite returned None"):
        compose(lambda found: None, values)
    with pytest.raises(ValueError, match=r"composite returned NaN .*return -inf"):
        compose(lambda found: float("nan"), values)
    assert compose(lambda found: -float("inf"), values) == -float("inf")


# ----------------------------------------------------------------------------------------------------- no trace


@pytest.mark.parametrize(("kind", "generate"), [("plain", False), ("sft", True), ("primal_dual", True)])
def test_a_run_with_the_callback_ends_with_the_same_weights_bit_for_bit(
    lab, tmp_path, parts, rows, kind: str, generate: bool
):
    ends, logs, first, second = [], [], States(), After()
    for evaluated in (False, True):
        callback = watch(parts, every_n_steps=1, generate=generate, max_new_tokens=3)
        model = lab.model(trained=kind == "primal_dual")
        model.config.attention_dropout = 0.2  # random numbers matter
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.2
        model.lm_head.eval()  # a module with a mode of its own
        torch.manual_seed(5)
        callbacks = [first, callback, second] if evaluated else []
        make: dict[str, Any] = {"plain": partial(_plain_on, rows), "sft": sft, "primal_dual": primal_dual}
        changes = {"logging_steps": 2, "gradient_accumulation_steps": 2, "seed": 3}
        trainer = make[kind](lab, tmp_path / str(evaluated), callbacks, model=model, **changes)
        trainer.train()
        ends.append(parameters(trainer.model))
        logs.append([entry for entry in trainer.state.log_history if "learning_rate" in entry])
        assert [entry["step"] for entry in callback.history][:4] == ([1, 2, 3, 4] if evaluated else [])
    assert difference(*ends) == 0
    assert difference(ends[0], parameters(lab.model(trained=kind == "primal_dual"))) > 0
    assert len(first.seen) == 4
    assert first.seen == second.seen
    assert [{**entry, "time": 0} for entry in logs[0]] == [{**entry, "time": 0} for entry in logs[1]]
    assert [entry["step"] for entry in logs[1]] == [2, 4]


def test_dropout_would_have_been_seen(lab, tmp_path, rows):
    """The test above has something to find: another random state gives other weights."""

    class Draw(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            torch.rand(1)

    ends = []
    for callbacks in ([], [Draw()]):
        model = lab.model()
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.2
        trainer = plain(lab, tmp_path, rows, callbacks, model=model)
        trainer.train()
        ends.append(parameters(trainer.model))
    assert difference(*ends) > 0


def test_what_trl_gathers_between_two_logs_stays_in_its_own(lab, tmp_path, parts):
    callback = watch(parts, every_n_steps=1)
    trainer = sft(lab, tmp_path, [callback], logging_steps=4, include_num_input_tokens_seen="no")
    trainer.train()
    assert not any("entropy" in key or "accuracy" in key for entry in entries(trainer) for key in entry)
    (log,) = [entry for entry in trainer.state.log_history if "learning_rate" in entry]
    assert "mean_token_accuracy" in log


# ------------------------------------------------------------------------------------------ the best checkpoint


@pytest.mark.parametrize(
    ("kind", "asked"),
    [("plain", "unlearn/composite"), ("sft", "eval_unlearn/composite"), ("primal_dual", "unlearn/composite")],
)
def test_the_checkpoint_with_the_best_composite_is_the_one_that_is_loaded(lab, tmp_path, parts, rows, kind, asked):
    callback = watch(parts, composite=scripted([0.1, 0.7, 0.3, 0.6, 0.0]))
    changes = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": None,
        "load_best_model_at_end": True,
        "metric_for_best_model": asked,
        "greater_is_better": True,
    }
    make: dict[str, Any] = {"plain": partial(_plain_on, rows), "sft": sft, "primal_dual": primal_dual}
    trainer = make[kind](lab, tmp_path, [callback], **changes)
    trainer.train()
    assert [entry["unlearn/composite"] for entry in callback.history][:4] == [0.1, 0.7, 0.3, 0.6]
    assert trainer.state.best_metric == 0.7
    assert trainer.state.best_global_step == 2
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-2"
    best, last = (load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors") for step in (2, 4))
    mine = {name: value for name, value in parameters(trainer.model).items() if name in best}
    assert difference(mine, {name: best[name] for name in mine}) == 0
    assert difference(mine, {name: last[name] for name in mine}) > 0
    # and the model that is left is scored anew, though its step is that of the last evaluation
    if kind != "primal_dual":  # which measures it itself
        again = trainer.evaluate()
        assert again["eval_unlearn/composite"] == 0.0
    assert callback.history[4]["unlearn/forget_nll"] == callback.history[1]["unlearn/forget_nll"]


def test_composite_of_names_chooses_too_and_save_strategy_best_keeps_only_better_ones(lab, tmp_path, parts, rows):
    callback = watch(parts, composite=NAMES)
    changes = {"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 1}
    trainer = plain(lab, tmp_path, rows, [callback], metric_for_best_model="unlearn/composite", **changes)
    trainer.train()
    found = [entry["unlearn/composite"] for entry in callback.history]
    for entry in callback.history:
        pair = (1 - entry["unlearn/forget_probability"], entry["unlearn/retain_probability"])
        assert entry["unlearn/composite"] == pytest.approx(2 / sum(1 / value for value in pair))
    assert trainer.state.best_metric == max(found)
    kept = {int(folder.name.split("-")[1]) for folder in tmp_path.glob("checkpoint-*")}
    assert kept == {step for step in range(1, 5) if found[step - 1] > max([-1.0, *found[: step - 1]])}


def test_early_stopping_reads_it(lab, tmp_path, parts, rows):
    callback = watch(parts, composite=scripted([0.5, 0.4, 0.9]))
    stop = EarlyStoppingCallback(early_stopping_patience=1)
    changes = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    changes |= {"load_best_model_at_end": True, "metric_for_best_model": "unlearn/composite"}
    trainer = plain(lab, tmp_path, rows, [callback, stop], **changes)
    trainer.train()
    assert trainer.state.global_step == 2


def test_several_eval_datasets_are_one_evaluation(lab, tmp_path, parts, rows):
    callback = watch(parts, composite=scripted([0.1, 0.2, 0.3, 0.4]))
    changes = {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "unlearn/composite"}
    trainer = plain(lab, tmp_path, rows, [callback], eval_on_start=True, **changes)
    trainer.eval_dataset = {"one": rows.select(range(2)), "two": rows.select(range(2, 5))}
    trainer.train()
    assert [entry["step"] for entry in callback.history] == [0, 2, 4]
    assert trainer.state.best_metric == 0.3
    metrics = trainer.evaluate()
    assert len(callback.history) == 4
    assert {"eval_one_loss", "eval_two_loss", "eval_unlearn/composite"} <= set(metrics)


def test_evaluations_at_steps_and_of_the_trainer_do_not_double(lab, tmp_path, parts, rows):
    callback = watch(parts, every_n_steps=2)
    trainer = plain(lab, tmp_path, rows, [callback], eval_strategy="steps", eval_steps=4)
    trainer.train()
    assert [entry["step"] for entry in callback.history] == [2, 4]
    alone = watch(parts, every_n_epochs=1, at_evaluate=False)
    trainer = plain(lab, tmp_path, rows, [alone], max_steps=-1, num_train_epochs=2, eval_strategy="epoch")
    trainer.train()
    assert [entry["epoch"] for entry in alone.history] == [1, 2]
    assert "eval_unlearn/forget_nll" not in trainer.evaluate()


# --------------------------------------------------------------------------------------------- logs and history


@pytest.mark.parametrize("attached", [True, False])
def test_reports_see_the_metrics_once_the_callback_knows_its_trainer(lab, tmp_path, parts, attached: bool):
    seen: list[str] = []

    class Report(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.extend(key for key in logs if key.startswith("unlearn/"))

    callback = watch(parts, every_n_steps=4)
    trainer = sft(lab, tmp_path, [Report(), callback], attach=attached)
    trainer.train()
    assert bool(seen) == attached
    assert len(entries(trainer)) == 1
    assert callback.history == entries(trainer)


def test_history_goes_on_when_a_run_is_resumed(lab, tmp_path, parts, rows):
    first = watch(parts, every_n_steps=1)
    plain(lab, tmp_path, rows, [first], max_steps=2, save_strategy="steps", save_steps=2).train()
    second = watch(parts, every_n_steps=1)
    trainer = plain(lab, tmp_path, rows, [second], max_steps=4)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [entry["step"] for entry in second.history] == [1, 2, 3, 4]
    assert second.history[:2] == first.history


def test_adapters_are_evaluated_too(lab, tmp_path, parts):
    torch.manual_seed(0)
    callback = watch(parts, every_n_steps=4)
    trainer = sft(lab, tmp_path, [callback], peft_config=lora(), learning_rate=1e-2, bf16=False)
    trainer.train()
    twin = evaluate_tofu(trainer.model, lab.tokenizer, **parts, retain_limit=7, generate=False)
    assert callback.history[-1]["unlearn/forget_nll"] == pytest.approx(twin.summary()["forget_nll"], rel=1e-6)


def test_evaluate_works_before_training(lab, tmp_path, parts, rows):
    callback = watch(parts)
    metrics = plain(lab, tmp_path, rows, [callback]).evaluate()
    twin = evaluate_tofu(lab.model(), lab.tokenizer, **parts, retain_limit=7, generate=False)
    assert metrics["eval_unlearn/forget_nll"] == pytest.approx(twin.summary()["forget_nll"], rel=1e-6)


# ---------------------------------------------------------------------------------------------------- bad input


def without(rows: Any, *columns: str) -> Any:
    return rows.remove_columns(list(columns))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"forget": []}, ValueError, "forget part: There are no rows"),
        ({"retain": [{"question": "a"}]}, ValueError, "retain part: Row 0 has no `answer`"),
        ({"retain": [{"question": "a", "answer": 3}]}, TypeError, "retain part: `answer` of row 0 is 3"),
        ({"forget": iter([])}, TypeError, "forget part is a list_iterator; expected a Dataset"),
        ({"forget": {"train": []}}, TypeError, "forget part is a dict; expected a Dataset"),
        ({"general": {"retain": [{"question": "a", "answer": "b"}]}}, ValueError, "general has a part named 'retain'"),
        ({"general": {"facts": [{"question": "a", "answer": "b"}]}}, ValueError, "facts part has no `perturbed_ans"),
        ({"limits": 0}, ValueError, "limit is 0"),
        ({"limits": 2.5}, TypeError, "limit of the forget part is 2.5"),
        ({"limits": {"world": 3}}, ValueError, r"limits names \['world'\], but the parts are"),
        ({"every_n_steps": 0}, ValueError, "every_n_steps is 0; expected a whole number"),
        ({"batch_size": True}, ValueError, "batch_size is True"),
        ({"every_n_steps": 1, "every_n_epochs": 1}, ValueError, "two ways to say when"),
        ({"at_evaluate": False}, ValueError, "nothing would be evaluated"),
        ({"reference": "retain90.json"}, TypeError, "reference is a str; expected TofuScores"),
        ({"composite": ["forget_quality"]}, ValueError, "Forget quality needs a reference"),
        ({"composite": ["forget_rouge"]}, ValueError, r"composite names \['forget_rouge'\]; expected metrics in"),
        ({"composite": ["forget_nll"]}, ValueError, r"composite names \['forget_nll'\]"),
        ({"composite": []}, ValueError, "composite names no metric"),
        ({"composite": 3}, TypeError, "composite is 3; expected a function"),
        ({"composite": lambda found: found["forget_probabilty"]}, KeyError, "forget_probabilty"),
        ({"composite": lambda found: "good"}, TypeError, "composite returned 'good'"),
    ],
)
def test_bad_arguments_are_refused_at_construction(parts, changes, error, message):
    with pytest.raises(error, match=message):
        watch(parts, **changes)


def test_references_of_other_rows_are_refused_at_construction(lab, parts):
    def score(forget) -> TofuScores:
        return evaluate_tofu(lab.model(), lab.tokenizer, forget=forget, retain=parts["retain"], generate=False)

    with pytest.raises(ValueError, match="different forget rows"):
        watch(parts, reference=score(parts["general"]["strangers"]))
    with pytest.raises(ValueError, match="different forget rows"):
        watch(parts, reference=score(parts["general"]["strangers"]), limits=2)
    plainly = without(parts["forget"], "perturbed_answer")
    with pytest.raises(ValueError, match="Forget quality needs truth ratios"):
        UnlearningEvalCallback(plainly, parts["retain"], reference=score(plainly))


@pytest.mark.parametrize(
    ("options", "arguments", "error", "message"),
    [
        ({}, {"metric_for_best_model": "unlearn/composite"}, ValueError, "the callback has no composite; Unl"),
        ({}, {"metric_for_best_model": "eval_unlearn/forget_quality"}, ValueError, "UnlearningEvalCallback has: unl"),
        ({}, {"metric_for_best_model": "unlearn/forget_probability"}, ValueError, "Set greater_is_better=False"),
        (
            {"composite": NAMES},
            {"metric_for_best_model": "unlearn/composite", "greater_is_better": False},
            ValueError,
            "Set greater_is_better=True",
        ),
        (
            {"composite": NAMES, "at_evaluate": False, "every_n_steps": 1},
            {"metric_for_best_model": "unlearn/composite"},
            ValueError,
            "Leave at_evaluate=True",
        ),
        ({"max_length": 4}, {}, ValueError, "is left within max_length=4 tokens"),
        ({"tokenizer": "gpt2"}, {}, TypeError, "tokenizer is a str; pass the trainer a processing_class"),
    ],
)
def test_a_run_that_could_not_be_evaluated_does_not_start(
    lab, tmp_path, parts, rows, options, arguments, error, message
):
    arguments = {"eval_strategy": "steps", "eval_steps": 1, **arguments}
    trainer = plain(lab, tmp_path, rows, [watch(parts, **options)], **arguments)
    with pytest.raises(error, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


def test_texts_longer_than_the_model_can_read_are_refused_before_training(lab, tmp_path, parts, rows):
    long = [{"question": "Who?", "answer": "nobody " * 200}]
    trainer = plain(lab, tmp_path, rows, [UnlearningEvalCallback(long, parts["retain"], every_n_steps=1)])
    with pytest.raises(ValueError, match="LlamaForCausalLM has 128 positions"):
        trainer.train()
    cut = UnlearningEvalCallback(long, parts["retain"], every_n_steps=4, max_length=128, limits=3)
    plain(lab, tmp_path, rows, [cut]).train()
    assert len(cut.history) == 1


def test_answers_are_refused_on_sharded_weights(lab, tmp_path, parts, rows):
    model = lab.model()
    next(model.parameters()).ds_id = 0  # what ZeRO-3 marks its parameters with
    trainer = plain(lab, tmp_path, rows, [watch(parts, generate=True, every_n_steps=1)], model=model)
    with pytest.raises(ValueError, match="generate=True on a model whose weights are sharded"):
        trainer.train()


def test_a_broken_model_stops_the_run_with_a_reason(lab, tmp_path, parts, rows):
    class Break(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            kwargs["model"].lm_head.weight.data.fill_(float("nan"))

    trainer = plain(lab, tmp_path, rows, [Break(), watch(parts, every_n_steps=1)])
    with pytest.raises(FloatingPointError, match="after step 1: the model gives NaN or infinite losses for"):
        trainer.train()


def test_a_callback_that_would_never_evaluate_warns(lab, tmp_path, parts, rows, caplog):
    from transformers.utils import logging

    logging.enable_propagation()
    try:
        plain(lab, tmp_path, rows, [watch(parts)], max_steps=1).train()
    finally:
        logging.disable_propagation()
    assert 'eval_strategy is "no"' in caplog.text


def test_rows_are_copied(parts):
    forget = copy.deepcopy(parts["forget"].to_list())
    callback = watch({**parts, "forget": forget})
    forget[0]["answer"] = "changed"
    assert callback.rows.parts["forget"].rows[0]["answer"] != "changed"
