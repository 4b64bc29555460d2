"""What torchrun starts: everything that needs two processes, in one launch, since starting them is what takes time."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch
from cases import make_trainer, quiet
from restarts import FULL, RESUMED, break_one_rank, continue_with_two, save_to_a_full_disk, stop_and_resume
from trajectories import RUNS, engine_arguments, run_to_the_end

from hf_unlearn.trainers import UnlearningConfig


def forget_the_backend(folder: Path) -> None:
    """The commonest mistake on CPUs: without use_cpu every process trains alone, and nothing says so."""
    try:
        UnlearningConfig(output_dir=str(folder / "out"))
        message = "no error"
    except ValueError as error:
        message = str(error)
    (folder / f"backend-{os.environ['RANK']}.txt").write_text(message, encoding="utf-8")


def lose_a_rank(folder: Path, engine: str) -> None:
    """Rank 1 is killed in the middle of step 2, as by the kernel when memory runs out."""
    trainer = make_trainer(
        folder,
        "lmf",
        folder / f"lost-{engine}",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        **engine_arguments(engine),
    )

    def die(module, inputs, output):
        if os.environ["RANK"] == "1" and trainer.state.global_step == 1 and module.training:
            (folder / f"killed-at-{engine}").write_text(str(time.time()), encoding="utf-8")
            os.kill(os.getpid(), 9)

    trainer.model.model.norm.register_forward_hook(die)
    trainer.train()


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    quiet()
    torch.set_num_threads(1)
    if sys.argv[2] == "lose-a-rank":
        lose_a_rank(folder, sys.argv[3])
    else:
        forget_the_backend(folder)
        for case, engine in RUNS:
            run_to_the_end(folder, case, engine)
        for case, engine in RESUMED:
            stop_and_resume(folder, case, engine)
        continue_with_two(folder)
        break_one_rank(folder)
        for engine, rank in FULL:
            save_to_a_full_disk(folder, engine, rank)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()  # its threads may abort a process that ends with them running
