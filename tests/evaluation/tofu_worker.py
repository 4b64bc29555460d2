"""TOFU on two processes, told of each other by the environment; or on one that is killed after some pieces. What was seen is written."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from tofu_kit import ANSWER, build, parts, tokenizer

from hf_unlearn.evaluation import session as session_module
from hf_unlearn.evaluation.pieces import Pieces
from hf_unlearn.evaluation.session import Session
from hf_unlearn.evaluation.tofu import run_tofu

BATCH = 2


def count_items() -> dict[str, int]:
    """From now on the items that each scoring function is given on this process."""
    counts: dict[str, int] = {}
    for name, place in (("mean_nll", 1), ("score_tokens", 1), ("greedy", 2)):

        def counted(*args: Any, _name: str = name, _place: int = place, _inner: Any = None, **kwargs: Any) -> Any:
            counts[_name] = counts.get(_name, 0) + len(args[_place])
            return _inner(*args, **kwargs)

        inner = getattr(session_module, name)
        setattr(
            session_module,
            name,
            lambda *args, _counted=counted, _inner=inner, **kw: _counted(*args, _inner=_inner, **kw),
        )
    return counts


def evaluate(model: Any, output: Path) -> Any:
    arguments = {**parts(), "max_new_tokens": ANSWER, "resamples": 20}
    return run_tofu(model, tokenizer(), **arguments, batch_size=BATCH, output_dir=output)


def message(error: type[Exception], function: Any, *args: Any, **kwargs: Any) -> str:
    try:
        function(*args, **kwargs)
    except error as raised:
        return f"{type(raised).__name__}: {raised}"
    return "no error"


def two_processes(folder: Path) -> None:
    """A whole evaluation, and what only one of the processes cannot do."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    rank = accelerator.process_index
    counts = count_items()
    found = evaluate(torch.nn.parallel.DistributedDataParallel(build()), folder / "two")  # as a trainer leaves it
    seen: dict[str, Any] = {"counts": dict(counts), "values": found.evaluation.values()}
    seen["processes"] = found.evaluation.settings["processes"]
    seen["answers"] = {name: part.generations for name, part in found.scores.parts.items()}
    seen["different"] = message(ValueError, Session, build(rank), tokenizer(), accelerator=accelerator)
    session = Session(build(), tokenizer(), output_dir=folder / "failing", accelerator=accelerator, batch_size=1)

    def score(items: list[Any], text: str | None) -> list[Any]:
        if rank == 1 and 0 in items:
            raise MemoryError("it is full")
        return items

    items = list(range(12))
    arguments: dict[str, Any] = {"lengths": items, "settings": {}}
    seen["failed"] = message(Exception, session.map, "numbers", items, score, **arguments)
    (folder / "file").write_text("")
    seen["unwritable"] = message(
        Exception, Session, build(), tokenizer(), output_dir=folder / "file", accelerator=accelerator
    )
    (folder / f"seen-{rank}.json").write_text(json.dumps(seen), encoding="utf-8")
    accelerator.wait_for_everyone()
    torch.distributed.destroy_process_group()  # its threads may abort a process that ends with them running


def killed(folder: Path, pieces: int) -> None:
    """Ends by SIGKILL, which nothing can catch, once so many pieces are written."""
    write, left = Pieces.write, [pieces]

    def writing(*args: Any) -> None:
        write(*args)
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    with patch.object(Pieces, "write", writing):
        evaluate(build(), folder / "killed")


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        two_processes(Path(sys.argv[1]))
    else:
        killed(Path(sys.argv[1]), int(sys.argv[2]))
