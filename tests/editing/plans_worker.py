"""A plan and captured activations, written to files: started by torchrun with two ranks, and called with one process."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from small_lab import SmallLab
from test_capture import build, rows

from hf_unlearn.editing import EditConfig, plan_edit
from hf_unlearn.editing.capture import capture
from hf_unlearn.editing.odds import Pairs, next_token_odds


def run(folder: Path, lab: SmallLab, accelerator: Any) -> None:
    """5 rows by 2 and 2 ranks: one of them runs out of rows."""
    world, rank = (accelerator.num_processes, accelerator.process_index) if accelerator else (1, 0)
    shared: dict[str, Any] = {"pad_token_id": 0, "batch_size": 2, "accelerator": accelerator}
    found: dict[str, Any] = {"captured": {}}
    for positions in ("all", "response", "last_prompt"):
        for layer, read in capture(build(), rows(), [3, 1], positions=positions, **shared).items():
            found["captured"][positions, layer] = (read.inputs, read.outputs, read.rows, read.tokens)
    pairs = Pairs.of([(row, token, number) for row in (0, 1, 4) for token in (1, 4) for number in (3, 60)])
    odds = next_token_odds(build(), rows(), pairs, **shared)
    found["odds"] = (odds.values, odds.ranks)
    config = EditConfig(
        words=["greyhound", "laundry", "blacksmith"],
        probability=1e-3,
        variants=1,
        tokens_per_word=2,
        weigh_retain=True,
        layers=[1, 2],
        batch_size=3,
        max_new_tokens=8,
    )
    plan = plan_edit(
        lab.model(),
        lab.tokenizer,
        lab.forget,
        config,
        retain_dataset=lab.retain,
        accelerator=accelerator,
        progress=False,
    )
    plan.save(folder / f"plan-{world}-{rank}")
    torch.save(found, folder / f"found-{world}-{rank}.pt")


if __name__ == "__main__":
    from accelerate import Accelerator

    torch.set_num_threads(1)
    known = torch.load(Path(sys.argv[1]) / "lab.pt", weights_only=False)
    run(Path(sys.argv[1]), known, Accelerator(cpu=True))
    torch.distributed.destroy_process_group()  # its threads may abort a process that ends with them running
