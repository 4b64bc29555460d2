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

STATE_FILE = "unlearning_state.json"
LOGPS_FILE = "reference_log_probs.safetensors"
STATE_VERSION = 1
_STORAGE_ERRORS = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT}
)


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
            f"Saving to {folder} failed: {error}. Is the disk full? Free space or choose another output_dir. A saved "
            "model may be incomplete; of an incomplete checkpoint nothing is kept. Earlier checkpoints are untouched: "
            "continue with train(resume_from_checkpoint=True), which takes the last complete one."
        ) from error


def _is_storage_error(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno in _STORAGE_ERRORS  # a failed upload is an OSError too
    # safetensors and torch.save report a full disk as errors of their own (seen: "I/O error: No space left on device",
    # "[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534", "PytorchStreamWriter failed",
    # "basic_ios::clear: iostream error")
    text = str(error).lower()
    signs = ("no space left", "i/o error", "inline_container", "pytorchstreamwriter", "iostream error")
    return any(sign in text for sign in signs)


def list_files(folder: Path) -> dict[str, int]:
    """Sizes in bytes of the files below a folder, by relative path, without the state's own."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != STATE_FILE)
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def save_method_state(
    folder: str | Path,
    method: str,
    state: Mapping[str, Any],
    logps: Mapping[str, Tensor],
    *,
    run: Mapping[str, Any] | None = None,
) -> None:
    """
    Writes the state to a folder that exists; each file appears whole or not at all.

    Args:
        folder (`str` or `Path`):
            Where to.
        method (`str`):
            Name of the method.
        state (`Mapping[str, Any]`):
            JSON-able values.
        logps (`Mapping[str, Tensor]`):
            Cached log-probabilities of the reference by kind, `(rows,)`.
        run (`Mapping[str, Any]`, *optional*):
            Of a checkpoint: which run it belongs to. The state is then the last file written and lists the others.
    """
    folder = Path(folder)
    if logps:
        scratch = folder / f".{LOGPS_FILE}.partial"
        save_file({key: value.detach().cpu().contiguous() for key, value in logps.items()}, scratch)
        os.replace(scratch, folder / LOGPS_FILE)
    scratch = folder / f".{STATE_FILE}.partial"
    payload = {"version": STATE_VERSION, "method": method, **state}
    if run is not None:
        payload |= {"run": run, "files": list_files(folder)}
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
