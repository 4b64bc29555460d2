"""The model as a callback finds it in the middle of a Trainer, and as an edit needs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.utils import extract_model_from_parallel


def inside(model: Any) -> Any:
    """The model without what an engine or `torch.compile` has put around it."""
    return extract_model_from_parallel(model, keep_torch_compile=False)


@contextmanager
def without_autocast(model: Any) -> Iterator[None]:
    """
    Context without the autocast that accelerate (1.15) puts around the forward pass for mixed precision: what is saved
    runs without it, so without it is measured. Flash attention needs its 16 bits, and keeps it.
    """
    implementation = getattr(getattr(model, "config", None), "_attn_implementation", None) or ""
    kept = {name: vars(model)[name] for name in ("forward", "_original_forward") if name in vars(model)}
    if "_original_forward" not in kept or "flash" in implementation:
        yield
        return
    extract_model_from_parallel(model, keep_fp32_wrapper=False)
    try:
        yield
    finally:
        vars(model).update(kept)
