"""Limits and multipliers as options, and the ways in which data reaches a step."""

from __future__ import annotations

import pytest
from kit import (
    Recorder,
    logged,
    mean_nll,
    primal_dual,
    stream,
    unlearning,
)

# ---- constraints and multipliers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "limit",
    [
        {"retain_eps": {"people": 0.3, "facts": 0.2}},
        {"retain_eps": '{"people": 0.3, "facts": 0.2}'},
        {"retain_margin": {"people": 0.3, "facts": 0.2}},
        {"retain_tolerance": {"people": 3.0, "facts": 2.0}},
    ],
)
def test_every_retain_set_has_its_own_limit_and_multiplier(lab, tmp_path, limit):
    trainer = primal_dual(lab, tmp_path, dual_warmup_steps=0, dual_lr=0.2, **limit)
    trainer.train()
    model = lab.model(trained=True)
    before = {name: mean_nll(model, rows)[0] for name, rows in trainer.data.retain_eval.items()}
    (option,) = limit
    if option == "retain_eps":
        expected = {"people": 0.3, "facts": 0.2}
    elif option == "retain_margin":
        expected = {"people": before["people"] + 0.3, "facts": before["facts"] + 0.2}
    else:
        expected = {"people": 4.0 * before["people"], "facts": 3.0 * before["facts"]}
    assert trainer.duals.eps == pytest.approx(expected, rel=1e-5)
    first, second = trainer.duals.multipliers.tolist()
    assert first != second
    assert [row["name"] for row in trainer.feasibility] == ["people", "facts"]


def test_multipliers_can_move_once_an_epoch_on_the_held_out_rows(lab, tmp_path):
    """10 rows in batches of 5 are 2 steps an epoch; the first epoch is the warm start."""
    trainer = primal_dual(
        lab,
        tmp_path,
        dual_update="epoch",
        dual_warmup_steps=None,
        dual_warmup_epochs=1.0,
        dual_lr=2.0,
        eval_strategy="epoch",
        per_device_train_batch_size=5,
        max_steps=-1,
        num_train_epochs=4,
        learning_rate=3e-3,
        retain_eps=0.01,
    )
    trainer.train()
    multipliers = logged(trainer, "dual/people")
    assert multipliers[0] == multipliers[1] == multipliers[2] == multipliers[3] == 1.0
    assert multipliers[4] == multipliers[5] > 1.0
    assert multipliers[6] == multipliers[7] > multipliers[5]
    measured = logged(trainer, "eval_loss/retain/people")
    assert multipliers[4] == pytest.approx(1.0 + 2.0 * (measured[1] - 0.01), rel=1e-6)
    assert trainer.duals.updates == 4


@pytest.mark.parametrize("when", [{"eval_strategy": "steps", "eval_steps": 1}, {"eval_on_start": True}])
def test_epoch_updates_do_not_depend_on_how_often_is_evaluated(lab, tmp_path, when):
    trainer = primal_dual(
        lab,
        tmp_path,
        **{
            "dual_update": "epoch",
            "dual_warmup_steps": 0,
            "eval_strategy": "epoch",
            "per_device_train_batch_size": 5,
            "max_steps": -1,
            "num_train_epochs": 3,
            **when,
        },
    )
    trainer.train()
    assert trainer.duals.updates == 3


def test_epoch_updates_need_an_evaluation_to_take_place(lab, tmp_path):
    with pytest.raises(ValueError, match='dual_update="epoch"'):
        primal_dual(lab, tmp_path, dual_update="epoch", eval_strategy="no")


# ---- data ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streams", [("forget",), ("retain",), ("forget", "retain")])
def test_streams_train_for_max_steps(lab, tmp_path, streams):
    recorder = Recorder(lab.tokenizer)
    inputs = {
        "forget_dataset": stream(lab.forget) if "forget" in streams else lab.forget,
        "retain_dataset": {"people": stream(lab.retain) if "retain" in streams else lab.retain, "facts": lab.facts},
        "data_collator": recorder,
    }
    trainer = primal_dual(
        lab, tmp_path, inputs=inputs, max_steps=6, gradient_accumulation_steps=2, retain_eval_size=3, dual_lr=2.0
    )
    trainer.train()
    assert trainer.state.global_step == trainer.duals.updates == 6
    seen = {tuple(item["forget"]["input_ids"]) for batch in recorder.batches for item in batch}
    assert len(seen) == 10, "all rows, over and over"
    held_out = {tuple(ids) for ids in trainer.data.retain_eval["people"]["input_ids"]}
    trained = {tuple(item["retain"]["people"]["input_ids"]) for batch in recorder.batches for item in batch}
    assert len(held_out) == 3
    assert not held_out & trained
    assert trainer.evaluate()["eval_loss/retain/people"] > 0


@pytest.mark.parametrize(("size", "held_out"), [(0, 0), (0.25, 4), (5, 5), (0.1, 2)])
def test_a_part_of_every_retain_set_is_held_out(lab, tmp_path, size, held_out):
    trainer = unlearning(lab, tmp_path, retain_eval_size=size)
    train, rest = trainer.data.retain["people"], trainer.data.retain_eval["people"]
    train, rest = ({tuple(ids) for ids in rows["input_ids"]} for rows in (train, rest))
    if held_out:
        assert (len(train), len(rest)) == (16 - held_out, held_out)
        assert not train & rest
    else:
        assert train == rest
        assert len(train) == 16
        trainer.train()
        assert "eval_loss/retain/people" in trainer.evaluate()


@pytest.mark.parametrize(("cycle", "steps"), [("forget", 3), ("retain", 4), ("longest", 4), ("shortest", 2)])
def test_cycle_sets_the_length_of_an_epoch(lab, tmp_path, cycle, steps):
    trainer = unlearning(
        lab, tmp_path, cycle=cycle, max_steps=-1, num_train_epochs=1, retain_eval_size=0, per_device_train_batch_size=4
    )
    trainer.train()
    assert trainer.state.global_step == steps


def test_seeds_choose_the_order_of_the_data(lab, tmp_path):
    def order(**kwargs):
        recorder = Recorder(lab.tokenizer)
        unlearning(lab, tmp_path, inputs={"data_collator": recorder}, max_steps=2, **kwargs).train()
        return [item["forget"]["index"] for batch in recorder.batches for item in batch]

    assert order(data_seed=0) == order(data_seed=0, seed=7)
    assert order(data_seed=0, seed=7) != order(data_seed=1, seed=7)
    assert order(seed=7) == order(data_seed=7)


def test_rows_can_be_grouped_by_length(lab, tmp_path):
    recorder = Recorder(lab.tokenizer)
    trainer = unlearning(
        lab,
        tmp_path,
        inputs={"data_collator": recorder},
        train_sampling_strategy="group_by_length",
        per_device_train_batch_size=2,
        max_steps=5,
    )
    trainer.train()
    lengths = [[len(item["forget"]["input_ids"]) for item in batch] for batch in recorder.batches[:5]]
    assert sorted(length for pair in lengths for length in pair) == sorted(map(len, trainer.data.forget["input_ids"]))
    assert [max(pair) for pair in lengths] == sorted((max(pair) for pair in lengths), reverse=True)
