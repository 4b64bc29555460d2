"""A plan as a LoRA adapter of PEFT: its configuration, its padded factors, and a folder that plain PEFT loads.

Shapes: r the adapter's rank, m inner width of the MLP, d model width.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

if TYPE_CHECKING:
    from .plan import EditPlan, LayerEdit

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def common_rank(plan: EditPlan) -> int:
    """r: the largest rank of the plan's edits, at least 1 (PEFT has no adapter of rank 0)."""
    return max(1, plan.rank)


def lora_config(plan: EditPlan) -> Any:
    """The `LoraConfig` of a plan: every matrix by its full path, one rank, `lora_alpha = r` so that the scale is 1."""
    rank = common_rank(plan)
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        bias="none",
        target_modules=[edit.path for edit in plan.edits],
        fan_in_fan_out=plan.edits[0].transposed,
        task_type="CAUSAL_LM",
        inference_mode=True,
    )


def padded_factors(edit: LayerEdit, rank: int) -> tuple[Tensor, Tensor]:
    """`lora_a` `(rank, m)` and `lora_b` `(d, rank)` in float32, filled up with zeros: the product is the same."""
    a = torch.zeros(rank, edit.lora_a.shape[1])
    b = torch.zeros(edit.lora_b.shape[0], rank)
    a[: edit.rank] = edit.lora_a
    b[:, : edit.rank] = edit.lora_b
    return a, b


def to_peft(plan: EditPlan, folder: str | Path, *, base_model_name_or_path: str | None = None) -> Path:
    """
    Writes a plan as an adapter that `PeftModel.from_pretrained(base, folder)` loads, without this library.

    A crash at any point leaves the new adapter, the one that was there before, or none that PEFT would load: the
    configuration goes first and comes last. Other files in the folder are left alone.

    Args:
        plan ([`EditPlan`]):
            The edits.
        folder (`str` or `Path`):
            Where `adapter_config.json` and `adapter_model.safetensors` go; made if missing.
        base_model_name_or_path (`str`, *optional*):
            Name of the base model for the configuration; `AutoPeftModel` needs it.

    Returns:
        `Path`: the folder.

    Raises:
        OSError: the folder cannot be written.
    """
    rank = common_rank(plan)
    config = lora_config(plan)
    config.base_model_name_or_path = base_model_name_or_path
    config.target_modules = sorted(config.target_modules)  # a set has another order in every process
    factors = {}
    for edit in plan.edits:
        a, b = padded_factors(edit, rank)
        factors[f"base_model.model.{edit.path}.lora_A.weight"] = a
        factors[f"base_model.model.{edit.path}.lora_B.weight"] = b
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".part-") as part:
        save_file(factors, Path(part) / _WEIGHTS, metadata={"format": "pt"})
        config.save_pretrained(part)
        (folder / _CONFIG).unlink(missing_ok=True)
        for name in (_WEIGHTS, _CONFIG):
            os.replace(Path(part) / name, folder / name)
    return folder
