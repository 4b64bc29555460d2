"""DeepSpeed's part of a checkpoint: a process whose disk is full still gets to where the others wait."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

# What DeepSpeed (0.18, 0.19) does between the first and the last barrier of save_checkpoint: weights and optimizer
# shards are written, and nothing is sent. The third is the file "latest", written by save_checkpoint itself.
_WRITE = ("_save_checkpoint", "_save_zero_checkpoint")


@contextmanager
def writes_deferred(engine: Any, deferring: Callable[[str], AbstractContextManager[None]]) -> Iterator[None]:
    """
    Context in which `engine.save_checkpoint` passes all its barriers, whatever cannot be written.

    Args:
        engine (`DeepSpeedEngine` or another model):
            What is trained; a model that is not DeepSpeed's is left alone.
        deferring (`Callable`):
            Of the folder; makes the context that keeps storage errors.
    """
    if not hasattr(engine, _WRITE[-1]):
        yield
        return

    def deferred(write: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(write)
        def call(save_dir: str, *args: Any, **kwargs: Any) -> Any:
            with deferring(save_dir):
                return write(save_dir, *args, **kwargs)

        return call

    def without_latest(save: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(save)  # the Trainer looks at the signature
        def call(save_dir: str, *args: Any, **kwargs: Any) -> Any:
            saved = save(save_dir, *args, **kwargs, save_latest=False)
            if engine.global_rank == 0:
                with deferring(save_dir):
                    (Path(save_dir) / "latest").write_text(f"global_step{engine.global_steps}", encoding="utf-8")
            return saved

        return call

    replaced = {name: deferred(getattr(engine, name)) for name in _WRITE}
    replaced["save_checkpoint"] = without_latest(engine.save_checkpoint)
    vars(engine).update(replaced)
    try:
        yield
    finally:
        for name in replaced:
            del vars(engine)[name]
