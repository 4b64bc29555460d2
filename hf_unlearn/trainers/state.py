"""The method's own state beside each checkpoint: JSON for numbers, safetensors for cached log-probabilities."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.trainer_utils import get_last_checkpoint

STATE_FILE = "unlearning_state.json"
LOGPS_FILE = "reference_log_probs.safetensors"
STATE_VERSION = 1
_STORAGE_ERRORS = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT}
)


def resolve_checkpoint(resume_from_checkpoint: str | bool | None, output_dir: str) -> str | None:
    """
    The checkpoint folder that `train(resume_from_checkpoint=...)` means, or None for a new run.

    Raises:
        ValueError: a folder was asked for and is not there.
    """
    if not resume_from_checkpoint:
        return None
    if resume_from_checkpoint is True:
        path = get_last_checkpoint(output_dir) if Path(output_dir).is_dir() else None
        if path is None:
            raise ValueError(f"resume_from_checkpoint=True, but {output_dir} holds no checkpoint to resume from.")
        return path
    if not Path(resume_from_checkpoint).is_dir():
        raise ValueError(f"resume_from_checkpoint={resume_from_checkpoint!r} is not a folder.")
    return str(resume_from_checkpoint)


class SaveError(OSError):
    """A model or checkpoint could not be written; the message names the folder and what to do."""


@contextmanager
def explain_storage_errors(folder: str | Path) -> Iterator[None]:
    """
    Turns what a full or missing disk raises within the block into one clear error.

    Raises:
        SaveError: with the folder, the cause and what to do.
    """
    try:
        yield
    except SaveError:  # explained already by an inner block
        raise
    except Exception as error:
        if not _is_storage_error(error):
            raise
        raise SaveError(
            f"Saving to {folder} failed: {error}. Is the disk full? Free space or choose another output_dir; what "
            "this folder holds may be incomplete. Earlier checkpoints are untouched: continue with "
            "train(resume_from_checkpoint=True) after removing this folder."
        ) from error


def _is_storage_error(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno in _STORAGE_ERRORS  # a failed upload is an OSError too
    # safetensors and torch.save report a full disk as errors of their own (seen: "I/O error: No space left on device",
    # "[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534", "PytorchStreamWriter failed")
    text = str(error).lower()
    return any(sign in text for sign in ("no space left", "i/o error", "inline_container", "pytorchstreamwriter"))


def save_method_state(folder: str | Path, method: str, state: Mapping[str, Any], logps: Mapping[str, Tensor]) -> None:
    """Writes the state to a folder that exists; each file appears whole or not at all."""
    folder = Path(folder)
    if logps:
        scratch = folder / f".{LOGPS_FILE}.partial"
        save_file({key: value.detach().cpu().contiguous() for key, value in logps.items()}, scratch)
        os.replace(scratch, folder / LOGPS_FILE)
    scratch = folder / f".{STATE_FILE}.partial"
    payload = {"version": STATE_VERSION, "method": method, **state}
    scratch.write_text(json.dumps(payload, indent=2, allow_nan=False), encoding="utf-8")
    os.replace(scratch, folder / STATE_FILE)


def load_method_state(folder: str | Path, method: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """
    Reads what [`save_method_state`] wrote.

    Raises:
        ValueError: no state there, or the state of another method.
    """
    file = Path(folder) / STATE_FILE
    if not file.is_file():
        raise ValueError(
            f"{folder} has no {STATE_FILE}: it was not written by this library, or not completely. Resuming without "
            "it would restart multipliers and calibration from zero. Resume from another checkpoint, or start anew."
        )
    state = json.loads(file.read_text(encoding="utf-8"))
    if state.get("method") != method or state.get("version") != STATE_VERSION:
        raise ValueError(
            f"{folder} holds a checkpoint of method {state.get('method')!r} (state version {state.get('version')!r}); "
            f"this trainer is {method!r} (version {STATE_VERSION}). Resume it with the trainer that wrote it."
        )
    logps = load_file(Path(folder) / LOGPS_FILE) if (Path(folder) / LOGPS_FILE).is_file() else {}
    return state, logps
