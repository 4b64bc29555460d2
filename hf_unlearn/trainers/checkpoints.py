"""Checkpoints that are complete or absent: the list of their files is written last, and is checked before a resume."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from .state import STATE_FILE

logger = logging.get_logger(__name__)

TRAINER_STATE_FILE = "trainer_state.json"
_TRASH = ".deleted-"  # a folder that is being deleted has another name, so that half of it is never taken for a whole
_REPLICATED = "replicated"
_RANDOM_STATE = "rng_state"  # every process writes a file of this name, on every engine, unless save_only_model is on


# ---- complete or absent -------------------------------------------------------------------------------------


def what_is_missing(folder: Path) -> str | None:
    """Why a checkpoint is not complete, or None when every file is there with the size it was written with."""
    try:
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"it has no {STATE_FILE}, which is written last"
    files = state.get("files")
    if files is None or TRAINER_STATE_FILE not in files:
        return f"it has no {TRAINER_STATE_FILE}: it is a saved model, not a checkpoint"
    for name, size in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes and was written with {size}"
    return None


def resolve_checkpoint(resume_from_checkpoint: str | bool | None, output_dir: str) -> str | None:
    """
    The checkpoint folder that `train(resume_from_checkpoint=...)` means, or None for a new run. `True` means the last
    complete one: what a killed process left half-written is skipped with a warning.

    Raises:
        ValueError: a folder was asked for that is not there or not complete, none is complete, or it has weights only.
    """
    if isinstance(resume_from_checkpoint, str) and resume_from_checkpoint.lower() in ("true", "false"):
        resume_from_checkpoint = resume_from_checkpoint.lower() == "true"  # from a command line
    if not resume_from_checkpoint:
        return None
    if resume_from_checkpoint is not True:
        folder = Path(resume_from_checkpoint)
        if not folder.is_dir():
            raise ValueError(f"resume_from_checkpoint={resume_from_checkpoint!r} is not a folder.")
        reason = what_is_missing(folder)
        if reason is not None:
            raise ValueError(_incomplete(folder, reason) + " Resume from another checkpoint, or start anew.")
        _check_not_only_weights(folder)
        return str(folder)
    reasons: list[str] = []
    for folder in reversed(_by_step(Path(output_dir))):
        reason = what_is_missing(folder)
        if reason is None:
            for text in reasons:
                logger.warning(f"{text} It is skipped: the run is resumed from {folder}.")
            _check_not_only_weights(folder)
            return str(folder)
        reasons.append(_incomplete(folder, reason))
    advice = " ".join(["Start a new run.", *reasons])
    raise ValueError(f"resume_from_checkpoint=True, but {output_dir} holds no checkpoint to resume from. {advice}")


def _check_not_only_weights(folder: Path) -> None:
    files = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))["files"]
    if not any(name.startswith(_RANDOM_STATE) for name in files):
        raise ValueError(
            f"{folder} was written with save_only_model=True: it has no optimizer, scheduler and random state, so a "
            "resumed run would be another one. Expected a checkpoint that was written with save_only_model=False. "
            f"Resume from such a one, or begin a new run from these weights, without resuming: model={str(folder)!r}."
        )


def _incomplete(folder: Path, reason: str) -> str:
    return f"{folder} is not a complete checkpoint: {reason}. It was not written by this library, or not completely."


def _by_step(output_dir: Path) -> list[Path]:
    numbered = [
        (int(folder.name.rpartition("-")[2]), folder)
        for folder in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if folder.is_dir() and folder.name.rpartition("-")[2].isdecimal()
    ]
    return [folder for _, folder in sorted(numbered)]


def delete_folder(folder: Path) -> None:
    """Deletes a checkpoint; from its first moment on it is no longer found under its name."""
    if folder.is_dir():
        trash = folder.with_name(f"{_TRASH}{folder.name}")
        shutil.rmtree(trash, ignore_errors=True)
        folder.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)


def rotate(output_dir: Path, newest: Path, *, limit: int | None, best: str | None) -> None:
    """Deletes the oldest checkpoints beyond `limit`, never the newest and never the best one."""
    for trash in output_dir.glob(f"{_TRASH}*"):
        shutil.rmtree(trash, ignore_errors=True)  # of a process that was killed while it deleted
    if limit is None or limit <= 0:
        return
    kept = {newest.resolve()} | ({Path(best).resolve()} if best is not None else set())
    others = [folder for folder in _by_step(output_dir) if folder.resolve() not in kept]
    # oldest by time: an output folder may hold the higher steps of an earlier run
    others.sort(key=lambda folder: folder.stat().st_mtime)
    for folder in others[: max(0, len(others) + len(kept) - max(limit, len(kept)))]:
        delete_folder(folder)


# ---- which run a checkpoint belongs to ------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """
    What a resumed run must have in common with the one that wrote the checkpoint.

    Args:
        engine (`str`):
            `"replicated"` (one process, DDP), `"zero-1"`, `"zero-2"`, `"zero-3"`, `"fsdp"`.
        processes (`int`):
            Number of processes.
        rows_per_step (`int`):
            Forget rows of an optimizer step, over all micro-batches and processes.
        data (`Mapping[str, int]`):
            Rows of every dataset that is read in order, and the seed of the order.
        model (`Mapping[str, Any]`):
            Class, number of parameters, and a digest of their names, shapes and which are trained.
    """

    engine: str
    processes: int
    rows_per_step: int
    data: Mapping[str, int]
    model: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """As it is written to the checkpoint."""
        return asdict(self)


def describe_model(model: Any) -> dict[str, Any]:
    """Class, number of parameters, and a digest of names, shapes and what is trained; the same on every engine."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    digest, total, trained = hashlib.sha256(), 0, 0
    for name, parameter in sorted(model.named_parameters()):
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 keeps an empty tensor in its place
        size = 1
        for width in shape:
            size *= int(width)
        total += size
        trained += size if parameter.requires_grad else 0
        digest.update(f"{name} {shape} {parameter.requires_grad}\n".encode())
    return {
        "class": type(base).__name__,
        "parameters": total,
        "trained": trained,
        "digest": digest.hexdigest()[:16],
    }


def engine_name(trainer: Any) -> str:
    """The form in which the engine writes a model and its optimizer: `"replicated"`, `"zero-2"`, `"fsdp"`, ..."""
    if trainer.is_deepspeed_enabled:
        return f"zero-{trainer.accelerator.state.deepspeed_plugin.zero_stage}"
    sharded = getattr(trainer, "is_distributed_loading_by_transformers", False)
    return "fsdp" if trainer.is_fsdp_enabled or sharded else _REPLICATED


def check_same_run(
    saved: Mapping[str, Any] | None, now: RunRecord, folder: str, *, ignore_data_skip: bool = False
) -> None:
    """
    Refuses a checkpoint that this run cannot continue.

    Another number of processes is fine where the engine keeps whole weights (one process, DDP) or reshards them
    (FSDP), as long as a step has as many rows as before: then the position in the data is the same.

    Raises:
        ValueError: another model, another engine, another number of ZeRO processes, or another order of the data.
    """
    if saved is None:
        return
    if saved["model"] != dict(now.model):
        raise ValueError(
            f"{folder} holds {_model_text(saved['model'])}; this run trains {_model_text(now.model)}. The names or "
            "shapes of their parameters differ, or which of them are trained. Resume with the same model and "
            "peft_config, or start a new run."
        )
    if saved["engine"] != now.engine:
        raise ValueError(
            f"{folder} was written by the engine {saved['engine']!r}; this run uses {now.engine!r}, which cannot read "
            "its optimizer state. Resume with the same engine and stage, or start a new run from its weights."
        )
    if now.engine.startswith("zero") and saved["processes"] != now.processes:
        raise ValueError(
            f"{folder} was written by {saved['processes']} processes, this run has {now.processes}, and DeepSpeed's "
            f"optimizer shards ({now.engine}) belong to a number of processes. Resume with {saved['processes']}."
        )
    if ignore_data_skip:
        return
    if saved["rows_per_step"] != now.rows_per_step:
        raise ValueError(
            f"{folder} was written with {saved['rows_per_step']} rows a step, this run has {now.rows_per_step}, so "
            "the position in the data would be another. Make per_device_train_batch_size * "
            f"gradient_accumulation_steps * processes {saved['rows_per_step']} again, or set ignore_data_skip=True."
        )
    changed = sorted(
        key for key in saved["data"].keys() | now.data.keys() if saved["data"].get(key) != now.data.get(key)
    )
    if changed:
        before, after = ({key: data.get(key) for key in changed} for data in (saved["data"], now.data))
        raise ValueError(
            f"{folder} was written with {before}, this run has {after}, so the order of the data would be another. "
            "Resume with the same datasets, retain_eval_size and seed, or set ignore_data_skip=True."
        )


def _model_text(model: Mapping[str, Any]) -> str:
    return f"a {model['class']} with {model['parameters']:,} parameters, {model['trained']:,} of them trained"
