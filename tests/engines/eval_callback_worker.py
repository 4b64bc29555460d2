"""Runs with evaluation in between on two processes, on engines with whole and sharded weights; started by torchrun."""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from cases import make_trainer, quiet, trained_parameters
from safetensors.torch import save_file
from trajectories import engine_arguments, forget_engine

from hf_unlearn.geometry import fsdp2_units
from hf_unlearn.lab.world import make_world
from hf_unlearn.metrics.generate import greedy
from hf_unlearn.reports import eval_spread
from hf_unlearn.reports.eval_callback import UnlearningEvalCallback

ENGINES = ("ddp", "zero3_sharded", "fsdp2_accelerate")
BATCH = 5
ANSWER = 4  # tokens


def parts() -> dict[str, Any]:
    """Rows with paraphrases and wrong answers."""
    world = make_world(seed=0, num_authors=10, questions_per_author=4)
    return {
        "forget": world.split("forget10_perturbed"),
        "retain": world.split("retain_perturbed").select(range(3)),
        "general": {"strangers": world.split("holdout10_perturbed").select(range(1))},
    }


def run(folder: Path, output: Path, engine: str, callbacks: list[Any]) -> Any:
    """Three steps of one engine; its trainer, with sharded weights put away."""
    trainer = make_trainer(
        folder,
        "lmf",
        output,
        callbacks=callbacks,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=3,
        **engine_arguments(engine),
    )
    for callback in callbacks:
        callback.trainer = trainer
    trainer.train()
    for unit in fsdp2_units(trainer.model):
        unit.reshard()
    return trainer


def message(error: type[Exception], function: Any, *args: Any) -> str:
    try:
        function(*args)
    except error as raised:
        return str(raised)
    return "no error"


def watched(folder: Path, engine: str) -> None:
    """A run with the callback and one without; then what is refused, or fails on one process only."""
    rank = os.environ["RANK"]
    where, output = folder / f"{engine}-{rank}", folder / f"out-{engine}"
    found: dict[str, Any] = {}
    whole = engine == "ddp"
    callback = UnlearningEvalCallback(
        **parts(), every_n_steps=2, batch_size=BATCH, generate=whole, max_new_tokens=ANSWER, composite=_composite
    )
    trainer = run(folder, output, engine, [callback])
    assert callback.scores is not None
    found["history"] = callback.history
    found["nll"] = {name: part.nll.tolist() for name, part in callback.scores.parts.items()}
    found["answers"] = {name: part.generations for name, part in callback.scores.parts.items()}
    weights = trained_parameters(trainer)
    forget_engine()
    alone = trained_parameters(run(folder, output, engine, []))
    found["moved"] = [name for name, value in weights.items() if not torch.equal(value, alone[name])]
    forget_engine()
    save_file(weights, where.with_suffix(".safetensors"))
    callback = UnlearningEvalCallback(**parts(), every_n_steps=1, generate=True, max_new_tokens=ANSWER)
    if whole:
        if rank == "1":
            eval_spread.greedy = _broken
        found["failed"] = message(OSError if rank == "1" else RuntimeError, run, folder, output, engine, [callback])
        eval_spread.greedy = greedy
    else:
        found["refused"] = message(ValueError, run, folder, output, engine, [callback])
    forget_engine()
    where.with_suffix(".json").write_text(json.dumps(found), encoding="utf-8")


def _composite(metrics: dict[str, float]) -> float:
    """What no two processes agree on."""
    return float(os.environ["RANK"])


def _broken(*args: Any, **kwargs: Any) -> Any:
    raise OSError("it is broken")


if __name__ == "__main__":
    quiet()
    torch.set_num_threads(1)
    for name in ENGINES:
        try:
            watched(Path(sys.argv[1]), name)
        except Exception:  # whatever it is: written for the test to show, and raised again
            text = traceback.format_exc()
            (Path(sys.argv[1]) / f"{name}-{os.environ['RANK']}.json").write_text(json.dumps({"error": text}))
            raise
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # its threads may abort a process that ends with them running
