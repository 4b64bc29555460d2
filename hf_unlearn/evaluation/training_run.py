"""What a trainer left in its output folder: the log, the limits and how they ended."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# what transformers and this library's trainers call them; no trainer is imported for a name
TRAINER_STATE_FILE, METHOD_STATE_FILE = "trainer_state.json", "unlearning_state.json"


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """
    A finished run of training.

    Args:
        method (`str`): name of the method; empty where the trainer was none of this library's.
        history (`tuple[Mapping[str, Any], ...]`): the trainer's log.
        constraints (`tuple[Mapping[str, Any], ...]`): name, eps, loss, multiplier and feasible of each limit.
        forget_level (`float`, *optional*): mean NLL in nats at which forgetting stopped.
        seconds (`float`, *optional*): wall time of training.
    """

    method: str
    history: tuple[Mapping[str, Any], ...]
    constraints: tuple[Mapping[str, Any], ...]
    forget_level: float | None
    seconds: float | None


def read_training_run(folder: str | os.PathLike[str]) -> TrainingRun:
    """
    Reads the output folder of a trainer: its own files, else those of its last checkpoint.

    Args:
        folder (`str` or `os.PathLike`):
            `output_dir` of the run, or a checkpoint in it.

    Raises:
        FileNotFoundError: no trainer has written there.
        ValueError: a file is no JSON.
    """
    folder = Path(folder)
    states, methods = (_newest(folder, name) for name in (TRAINER_STATE_FILE, METHOD_STATE_FILE))
    if states is None and methods is None:
        raise FileNotFoundError(
            f"{folder} holds neither {TRAINER_STATE_FILE} nor {METHOD_STATE_FILE}, and no checkpoint that does; "
            "expected the output_dir of a trainer (trainer.save_state() writes the log)."
        )
    state, method = ({} if path is None else _read(path) for path in (states, methods))
    history = tuple(state.get("log_history") or ())
    runtimes = [entry["train_runtime"] for entry in history if "train_runtime" in entry]
    return TrainingRun(
        method=str(method.get("method") or ""),
        history=history,
        constraints=tuple(row for row in method.get("feasibility") or () if row.get("loss") is not None),
        forget_level=method.get("forget_level"),
        seconds=float(runtimes[-1]) if runtimes else None,
    )


def _newest(folder: Path, name: str) -> Path | None:
    """The folder's own file, else that of the checkpoint with the most steps."""
    if (folder / name).is_file():
        return folder / name
    found = [path for path in folder.glob(f"checkpoint-*/{name}") if path.parent.name.split("-")[-1].isdigit()]
    return max(found, key=lambda path: int(path.parent.name.split("-")[-1]), default=None)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); expected what a trainer wrote.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected the object that a trainer wrote.")
    return content
