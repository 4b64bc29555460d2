"""Every engine that two CPU processes can run, one after the other in the same processes."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import fsdp2_on_cpu
from accelerate.state import AcceleratorState
from cases import make_trainer, report
from transformers import AutoModelForCausalLM
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "zero1": {"stage": 1},
    "zero1_offload": {"stage": 1, "offload_optimizer": {"device": "cpu"}},
    "zero2": {"stage": 2},
    "zero2_offload": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "zero3": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
    "zero3_offload": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu"},
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    # by default parameters below 100,000 numbers, here all of them, stay whole on every rank
    "zero3_sharded": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "fsdp2": {},
    "fsdp2_accelerate": {},
}
RUNS = [
    # ZeRO-3 comes before its lower stages: it must not depend on what they have set up
    *[(case, engine) for engine in ("ddp", "zero3", "zero2", "zero1") for case in ("lmf", "lora", "npo")],
    *[("lmf", "zero1_offload"), ("lora", "zero2_offload"), ("lmf", "zero3_offload")],
    *[("lmf", "fsdp2"), ("lora", "fsdp2"), ("npo", "fsdp2")],
    *[(case, engine) for engine in ("ddp", "zero3", "zero2", "zero1", "fsdp2") for case in ("prism", "prism-lora")],
    *[(case, "fsdp2_accelerate") for case in ("lmf", "lora", "npo", "prism", "prism-lora")],
    *[("noise", engine) for engine in ("ddp", "zero3_sharded", "zero3", "zero2", "zero1_offload", "zero1", "fsdp2")],
    ("noise", "fsdp2_accelerate"),
    *[("prism", "zero3_sharded"), ("prism-lora", "zero3_sharded"), ("lmf", "zero3_sharded")],
]


def engine_arguments(engine: str) -> dict[str, Any]:
    """Chooses an engine: arguments of the configuration, or the environment until [`forget_engine`]."""
    if engine == "fsdp2_accelerate":
        fsdp2_on_cpu.enable()
    if not engine.startswith("zero"):
        return {}
    return {
        "deepspeed": {
            "zero_optimization": ENGINES[engine],
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "gradient_clipping": "auto",  # max_grad_norm; DeepSpeed's own default is 1.0
            "train_batch_size": "auto",
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
        }
    }


def load_sharded(path: Path) -> Any:
    """transformers shards the model with fully_shard (FSDP2) while it loads it."""
    from transformers.distributed import DistributedConfig

    return AutoModelForCausalLM.from_pretrained(path, distributed_config=DistributedConfig(fsdp_size=2))


def forget_engine() -> None:
    """Back to a process without an engine; the process group stays."""
    gc.collect()
    fsdp2_on_cpu.disable()
    unset_hf_deepspeed_config()
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    AcceleratorState._reset_state(reset_partial_state=True)


def run_to_the_end(folder: Path, case: str, engine: str) -> None:
    """One case on one engine; writes its end for each rank, or the message of its refusal."""
    where = folder / f"{case}-{engine}-{os.environ['RANK']}"
    extra = {"load": load_sharded} if engine == "fsdp2" else {}
    try:
        trainer = make_trainer(
            folder,
            case,
            folder / "out",
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            **engine_arguments(engine),
            **extra,
        )
    except ValueError as error:
        where.with_suffix(".refused").write_text(str(error), encoding="utf-8")
    else:
        trainer.train()
        report(trainer, where)
    forget_engine()
