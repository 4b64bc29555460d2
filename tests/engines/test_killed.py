"""kill -9: whatever a run was doing, what is left resumes to the run that was never killed; lost ranks are named."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from cases import make_trainer
from conftest import start
from restarts import ARGUMENTS
from test_trajectories import same_weights
from transformers import TrainerCallback

from hf_unlearn.trainers.checkpoints import what_is_missing

pytestmark = pytest.mark.timeout(600)
STEPS, KILLS = 16, 10
WATCHED = ("open", "os.rename", "os.remove", "os.mkdir", "shutil.rmtree")  # what a save and a rotation do


class Moments(TrainerCallback):
    """Counts what a run does, file by file and step by step, and kills this process at one of these moments."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count, self.fatal = str(folder), 0, 0

    def watch(self) -> None:
        """From now on; cannot be taken back, so only a process that ends soon may call it."""
        sys.addaudithook(self._see)

    def _see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in WATCHED and self.folder in str(arguments[0]):
            self.happen()

    def happen(self) -> None:
        self.count += 1
        if self.count == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_step_begin(self, args, state, control, **kwargs):
        self.happen()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.happen()


def live(trainer: Any, moments: Moments, where: Path, fatal: int) -> int:
    """A child process trains, from the last complete checkpoint if there is one; its exit status."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            moments.fatal = fatal
            moments.watch()
            output = Path(trainer.args.output_dir)
            trainer.train(resume_from_checkpoint=any(output.glob("checkpoint-*")) and any_complete(output))
            trainer.save_model(str(where))
            summary = {
                "moments": moments.count,
                "state": trainer.method_state(),
                "best": [trainer.state.best_global_step, trainer.state.best_metric],
            }
            (where / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]


def any_complete(folder: Path) -> bool:
    return any(what_is_missing(path) is None for path in folder.glob("checkpoint-*"))


def test_a_run_that_is_killed_ten_times_ends_like_one_that_never_was(workspace: Path) -> None:
    """Ten lives, each killed at a random file operation or step; then one that may finish."""
    output = workspace / "killed"
    moments = Moments(output)
    arguments = {**ARGUMENTS, "max_steps": STEPS, "save_total_limit": 2}
    trainer = make_trainer(workspace, "lmf", output, callbacks=[moments], **arguments)
    assert live(trainer, moments, workspace / "undisturbed", fatal=0) == 0
    undisturbed = json.loads((workspace / "undisturbed" / "summary.json").read_text(encoding="utf-8"))
    shutil.rmtree(output)

    chance = random.Random(0)
    two_saves = 4 * undisturbed["moments"] // STEPS
    left_behind = set()
    for _ in range(KILLS):
        status = live(trainer, moments, workspace / "survivor", fatal=chance.randint(1, two_saves))
        assert os.WIFSIGNALED(status), "the run ended before it was killed ten times: kill earlier"
        assert os.WTERMSIG(status) == signal.SIGKILL
        left_behind |= {what_is_missing(path) is None for path in output.glob("checkpoint-*")}
    assert left_behind == {True, False}, "some kills must have hit a save, and some must have left a checkpoint"
    assert live(trainer, moments, workspace / "survivor", fatal=0) == 0

    survivor = json.loads((workspace / "survivor" / "summary.json").read_text(encoding="utf-8"))
    assert survivor["state"] == undisturbed["state"], "multipliers, limits, level, tokens"
    assert survivor["best"] == undisturbed["best"]
    first, second = ((workspace / name / "model.safetensors").read_bytes() for name in ("undisturbed", "survivor"))
    assert first == second
    assert not list(output.glob(".deleted-*")), "what a killed process was deleting is gone too"


def test_a_finished_run_that_is_resumed_trains_no_further(workspace: Path) -> None:
    """A process may be killed between the last checkpoint and the end; max_steps lies within an epoch here."""
    arguments = {**ARGUMENTS, "max_steps": 3, "load_best_model_at_end": False}
    first = make_trainer(workspace, "lmf", workspace / "finished", **arguments)
    first.train()
    again = make_trainer(workspace, "lmf", workspace / "finished", **arguments)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3
    same_weights(dict(first.model.named_parameters()), dict(again.model.named_parameters()), 0.0)
    assert again.method_state() == first.method_state()


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3", "fsdp2_accelerate"])
def test_a_rank_that_is_killed_ends_the_run_on_all_within_a_minute(workspace: Path, engine: str) -> None:
    process = start(workspace, "lose-a-rank", engine)
    try:
        output, _ = process.communicate(timeout=540)
    finally:
        process.kill()
    ended = time.time()
    killed = float((workspace / f"killed-at-{engine}").read_text(encoding="utf-8"))
    assert ended - killed < 60
    assert process.returncode != 0
    assert "process 0 of 2: another process is gone or does not answer" in output
    assert "train(resume_from_checkpoint=True) continues from the last complete checkpoint" in output
