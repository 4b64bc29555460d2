"""Runs that are stopped in mid-epoch and continued, on two processes; and a loss that is NaN on one of them."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import torch.distributed
from cases import make_trainer, report
from trajectories import engine_arguments, forget_engine
from transformers import TrainerCallback

from hf_unlearn.trainers.preemption import Preempted

# Two steps an epoch, so that step 3 is in the middle of the second one.
ARGUMENTS: dict[str, Any] = {
    "max_steps": 6,
    "eval_strategy": "steps",
    "save_strategy": "steps",
    "eval_steps": 2,
    "save_steps": 2,
    "save_total_limit": 1,
    "load_best_model_at_end": True,
    "dual_smoothing": 0.5,
}
TWO_PROCESSES = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}


class Terminate(TrainerCallback):
    """Sends SIGTERM to this process in the middle of a step, as a scheduler does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_step_begin(self, args, state, control, **kwargs):
        if args.gradient_accumulation_steps == 1:
            self.on_substep_end(args, state, control)


def stop_and_resume(folder: Path, engine: str) -> None:
    """An undisturbed run, and one that SIGTERM on rank 1 stops in step 3 and that is then resumed."""
    rank = os.environ["RANK"]
    arguments = {**ARGUMENTS, **TWO_PROCESSES, **engine_arguments(engine)}
    whole = make_trainer(folder, "lmf", folder / f"whole-{engine}", **arguments)
    whole.train()
    report(whole, folder / f"whole-{engine}-{rank}")
    forget_engine()

    stopped = make_trainer(
        folder,
        "lmf",
        folder / f"parts-{engine}",
        callbacks=[Terminate(3)] if rank == "1" else [],
        **{**ARGUMENTS, **TWO_PROCESSES, **engine_arguments(engine)},
    )
    end: dict[str, Any] = {"code": None}
    try:
        stopped.train()
    except Preempted as exit_:
        end = {"code": exit_.code, "step": exit_.step}
    (folder / f"stopped-{engine}-{rank}.json").write_text(json.dumps(end), encoding="utf-8")
    forget_engine()
    if rank == "0":
        shutil.copytree(folder / f"parts-{engine}", folder / f"stopped-{engine}")
        (folder / f"parts-{engine}" / "checkpoint-5").mkdir()  # a later process was killed while it saved
        (folder / f"parts-{engine}" / "checkpoint-5" / "model.safetensors").write_bytes(b"half")
    torch.distributed.barrier()

    resumed = make_trainer(
        folder, "lmf", folder / f"parts-{engine}", **{**ARGUMENTS, **TWO_PROCESSES, **engine_arguments(engine)}
    )
    resumed.train(resume_from_checkpoint=True)
    report(resumed, folder / f"parts-{engine}-{rank}")
    forget_engine()


def continue_with_two(folder: Path) -> None:
    """Continues what one process has begun."""
    trainer = make_trainer(folder, "lmf", folder / "begun-by-one", **ARGUMENTS, **TWO_PROCESSES)
    trainer.train(resume_from_checkpoint=True)
    report(trainer, folder / f"one-then-two-{os.environ['RANK']}")
    forget_engine()


def break_one_rank(folder: Path) -> None:
    """From step 2 on the model of rank 1 returns NaN; writes what each rank says."""
    rank = os.environ["RANK"]
    trainer = make_trainer(folder, "lmf", folder / "broken", **TWO_PROCESSES)

    def break_it(module, inputs, output):
        if rank == "1" and trainer.state.global_step == 1 and module.training:
            output[0][:] = float("nan")

    trainer.model.model.norm.register_forward_hook(lambda module, inputs, output: break_it(module, inputs, [output]))
    try:
        trainer.train()
        message = "no error"
    except FloatingPointError as error:
        message = str(error)
    (folder / f"nan-{rank}.txt").write_text(message, encoding="utf-8")
    forget_engine()
