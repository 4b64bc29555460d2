"""SIGTERM at moments where something else is due: an evaluation, the end of an epoch, the end of training."""

from __future__ import annotations

import os
import signal

import pytest
from cases import make_trainer
from restarts import ARGUMENTS, Terminate
from test_trajectories import same_state, same_weights

from hf_unlearn.trainers.preemption import Preempted, Preemption

EPOCHS = {"eval_strategy": "epoch", "save_strategy": "epoch", "dual_update": "epoch", "dual_warmup_steps": 0}
BEST = {"save_strategy": "best"}


@pytest.mark.parametrize(
    ("strategy", "step", "evaluations"),
    [
        (EPOCHS, 3, 1),  # in mid-epoch: nothing is measured before the process has to go
        (EPOCHS, 4, 2),  # at the end of an epoch: its evaluation moves the multipliers, so it is not left out
        (EPOCHS, 6, 3),  # at the very end
        (BEST, 3, 1),
        (BEST, 4, 2),
    ],
)
def test_a_stop_neither_loses_nor_repeats_an_evaluation(workspace, tmp_path, strategy, step, evaluations):
    arguments = {**ARGUMENTS, **strategy}
    whole = make_trainer(workspace, "lmf", tmp_path / "whole", **arguments)
    whole.train()
    stopped = make_trainer(workspace, "lmf", tmp_path / "parts", callbacks=[Terminate(step)], **arguments)
    with pytest.raises(Preempted) as end:
        stopped.train()
    assert (end.value.code, end.value.step) == (0, step)
    assert sum("eval_loss" in entry for entry in stopped.state.log_history) == evaluations
    resumed = make_trainer(workspace, "lmf", tmp_path / "parts", **arguments)
    resumed.train(resume_from_checkpoint=True)
    same_weights(dict(whole.model.named_parameters()), dict(resumed.model.named_parameters()), 0.0)
    same_state(whole.method_state(), resumed.method_state(), 0.0)
    assert resumed.state.best_global_step == whole.state.best_global_step
    assert sum("eval_loss" in entry for entry in resumed.state.log_history) == 3


def fail_after_a_signal() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    raise FloatingPointError("the error")


def test_a_signal_that_comes_too_late_for_a_checkpoint_is_delivered_and_an_error_is_not_hidden():
    received = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        with Preemption(True).listening():
            os.kill(os.getpid(), signal.SIGTERM)
            assert received == []
        assert received == [signal.SIGTERM]
        with pytest.raises(FloatingPointError, match="the error"), Preemption(True).listening():
            fail_after_a_signal()
        assert received == [signal.SIGTERM]
        with Preemption(False).listening():
            os.kill(os.getpid(), signal.SIGTERM)
            assert len(received) == 2
    finally:
        signal.signal(signal.SIGTERM, before)
