"""One short run of each trainer, written to files: started by torchrun with two ranks, and called with one process."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from datasets import load_from_disk
from kit import Recorder, config, pd_config
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_unlearn.trainers import PrimalDualTrainer, UnlearningTrainer


def run(folder: Path, batch: int) -> None:
    """Runs with `batch` rows a rank; writes `<trainer>-<world size>-<rank>.{json,safetensors}`."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    forget, retain, facts, holdout = (
        load_from_disk(str(folder / name)) for name in ("forget", "retain", "facts", "holdout")
    )
    shared: dict[str, Any] = {
        "optim": "sgd",
        "learning_rate": 0.05,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        **({"ddp_backend": "gloo"} if "RANK" in os.environ else {}),
    }
    runs = {
        "primal_dual": (
            PrimalDualTrainer,
            pd_config(folder / "out", dual_lr=2.0, dual_warmup_steps=1, retain_eval_size=3, **shared),
        ),
        "npo": (UnlearningTrainer, config(folder / "out", forget_loss="npo", retain_loss="kl", **shared)),
    }
    for name, (trainer_class, args) in runs.items():
        recorder = Recorder(tokenizer)
        trainer = trainer_class(
            model=AutoModelForCausalLM.from_pretrained(folder / "model"),
            args=args,
            data_collator=recorder,
            forget_dataset=forget,
            retain_dataset={"people": retain, "facts": facts},
            holdout_dataset=holdout,
            processing_class=tokenizer,
        )
        trainer.train()
        where = folder / f"{name}-{args.world_size}-{args.process_index}"
        weights = {key: value.detach().contiguous() for key, value in trainer.model.named_parameters()}
        save_file(weights, where.with_suffix(".safetensors"))
        result = {
            "state": trainer.method_state(),
            "logps": {kind: values.tolist() for kind, values in trainer.reference_logps.items()},
            "evaluation": trainer.evaluate(),
            "log": [entry for entry in trainer.state.log_history if "learning_rate" in entry],
            "rows": [
                [[item["forget"]["index"], item["retain"]["people"]["input_ids"]] for item in rows]
                for rows in recorder.batches[:8]
            ],
        }
        where.with_suffix(".json").write_text(json.dumps(result))


if __name__ == "__main__":
    run(Path(sys.argv[1]), batch=2)
