"""Plans of TSR and ARR, written to files: started by torchrun with two ranks, and called with one process."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from test_capture import build, rows

from hf_unlearn.editing.regions.plans import RegionConfig, plan_arr, plan_tsr


def run(folder: Path, accelerator: Any) -> None:
    """Writes the plans to `<folder>/<method>-<ranks>-<rank>`; 5 rows, so that one rank runs out of them."""
    prompts = [{"input_ids": row["input_ids"][:4], "labels": [-100] * 4} for row in rows()]
    world, rank = (accelerator.num_processes, accelerator.process_index) if accelerator else (1, 0)
    shared: dict[str, Any] = {"retain_rows": rows()[:3], "pad_token_id": 0, "accelerator": accelerator}
    options: dict[str, Any] = {"radius": 0.2, "steps": 4, "batch_size": 2}
    few: dict[str, Any] = {
        "attack_steps": 3,
        "inner_steps": 2,
        "restart_every": 2,
        "start": "random",
        "free_positions": 2,
    }
    plans = {
        "tsr": plan_tsr(build(), prompts, token_ids=[7, 9], layers=(2, 3), config=RegionConfig(**options), **shared),
        "rank": plan_tsr(build(), rows()[:4], config=RegionConfig(rank=2, **options), **shared),
        "arr": plan_arr(build(), rows()[:3], config=RegionConfig(**options, **few), **shared),
    }
    for name, plan in plans.items():
        plan.save(folder / f"{name}-{world}-{rank}")


if __name__ == "__main__":
    from accelerate import Accelerator

    run(Path(sys.argv[1]), Accelerator(cpu=True))
    torch.distributed.destroy_process_group()  # its threads may abort a process that ends with them running
