"""A small world and the runs that every engine must end alike; for the tests and for the processes they start."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import load_from_disk
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
from transformers.utils import logging

from hf_unlearn.lab.models import tiny_config, tiny_model
from hf_unlearn.lab.tokenizer import train_tokenizer
from hf_unlearn.lab.world import make_world
from hf_unlearn.trainers import (
    PrimalDualConfig,
    PrimalDualTrainer,
    PrismConfig,
    PrismTrainer,
    UnlearningConfig,
    UnlearningTrainer,
)

CHECKPOINTING = (
    "activation_checkpointing"
    if "activation_checkpointing" in UnlearningConfig.__dataclass_fields__
    else "gradient_checkpointing"
)
SETS = {"forget": range(16), "people": range(16, 32), "facts": range(32, 39)}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A run: which trainer, with which arguments; `adapter` adds LoRA."""

    primal_dual: bool = False
    prism: bool = False
    adapter: bool = False
    arguments: dict[str, Any] = field(default_factory=dict)


CASES = {
    # every token is gated at the level of unseen text, which an untrained model knows half of the tokens below
    "lmf": Case(primal_dual=True, arguments={"optim": "sgd", "learning_rate": 0.1, "dual_lr": 1.0}),
    "lora": Case(
        primal_dual=True,
        adapter=True,
        arguments={
            "retain_loss": "kl",
            "retain_eps": 1e-6,
            "forget_target": 6.5,
            "forget_target_mode": "anneal",
            "optim": "adamw_torch",
            "learning_rate": 1e-2,
            "dual_lr": 200.0,
            CHECKPOINTING: True,
        },
    ),
    # the norm of the gradients is about 10: every step is clipped, on every engine by the same factor
    "npo": Case(
        primal_dual=False,
        arguments={
            "forget_loss": "npo",
            "retain_loss": "kl",
            "optim": "sgd",
            "learning_rate": 0.5,
            "max_grad_norm": 0.5,
        },
    ),
    # the weights move before step 0, masters and shards too; limits and level are measured before that
    "noise": Case(
        primal_dual=True,
        arguments={"weight_noise": 0.3, "optim": "sgd", "learning_rate": 0.1, "dual_lr": 1.0},
    ),
}

# Steps from several gradients: the move of SAM is large, and both parts of PRISM are felt (tests/trainers/test_prism.py
# has the algorithm box in plain torch).
_PROBE = {
    "probe_epochs": 30,
    "probe_lr": 3e-3,
    "probe_weight": 0.5,
    "probe_schedule": "constant",
    "probe_min_accuracy": 0.0,
}
CASES |= {
    "prism": Case(
        prism=True,
        arguments={**_PROBE, "sam_rho": 0.2, "optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 5.0},
    ),
    "prism-lora": Case(
        prism=True,
        adapter=True,
        arguments={
            **_PROBE,
            "sam_rho": 0.05,
            "gradient_projection": "tensor",
            "retain_margin": 0.01,
            "dual_lr": 2.0,
            "optim": "adamw_torch",
            "learning_rate": 1e-3,
        },
    ),
}


def make_workspace(folder: Path) -> Path:
    """Writes tokenizer, model and datasets; rows of 15 to 60 tokens."""
    world = make_world(seed=0, num_authors=10, questions_per_author=4)
    rows = world.full.select_columns(["question", "answer"])
    tokenizer = train_tokenizer([text for row in rows for text in (row["question"], row["answer"])], 600)
    shape = tiny_config(tokenizer, hidden_size=32, num_layers=2, num_heads=4, max_positions=128)
    tokenizer.save_pretrained(folder / "model")
    tiny_model(shape, seed=1).save_pretrained(folder / "model")
    for name, indices in SETS.items():
        rows.select(indices).save_to_disk(str(folder / name))
    world.holdout.select_columns(["question", "answer"]).save_to_disk(str(folder / "holdout"))
    return folder


def make_trainer(
    folder: Path,
    name: str,
    output: Path,
    *,
    load: Callable[[Path], Any] = AutoModelForCausalLM.from_pretrained,
    adapt: Callable[[Any, LoraConfig], Any] | None = None,
    callbacks: list[Any] | None = None,
    **changes: Any,
) -> Any:
    """
    The trainer of a case; `load` reads the model, `adapt` adds the adapter instead of the trainer, `changes` are
    further arguments of the configuration.
    """
    case = CASES[name]
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    rows = {name: load_from_disk(str(folder / name)) for name in (*SETS, "holdout")}
    arguments = {
        "output_dir": str(output),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "max_length": 128,
        "max_steps": 4,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 4,
        "retain_eval_size": 3,
        "eval_strategy": "no",
        "save_strategy": "no",
        "load_best_model_at_end": False,
        CHECKPOINTING: False,
        **({"dual_warmup_steps": 1} if case.primal_dual or case.prism else {}),
        **({"ddp_backend": "gloo"} if "RANK" in os.environ else {}),
        **case.arguments,
        **changes,
    }
    config, trainer = UnlearningConfig, UnlearningTrainer
    if case.primal_dual:
        config, trainer = PrimalDualConfig, PrimalDualTrainer
    if case.prism:
        config, trainer = PrismConfig, PrismTrainer
    args = config(**arguments)  # before the model: under ZeRO-3 it is loaded in shards
    model = load(folder / "model")
    torch.manual_seed(0)  # an adapter is drawn from the global state
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear") if case.adapter else None
    if lora is not None and adapt is not None:
        model, lora = adapt(model, lora), None
    made = trainer(
        model=model,
        args=args,
        forget_dataset=rows["forget"],
        retain_dataset={"people": rows["people"], "facts": rows["facts"]},
        holdout_dataset=rows["holdout"],
        processing_class=tokenizer,
        peft_config=lora,
        callbacks=callbacks,
    )
    made.remove_callback(PrinterCallback)
    return made


def trained_parameters(trainer: Any) -> dict[str, torch.Tensor]:
    """The trained parameters in full, whichever engine holds them; a collective on sharded ones."""
    full = {}
    for name, parameter in trainer.model.named_parameters():
        if not parameter.requires_grad:
            continue
        if hasattr(parameter, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter]):
                full[name] = parameter.detach().clone()
        else:
            value = parameter.detach()
            full[name] = value.full_tensor() if hasattr(value, "full_tensor") else value.clone()
    return {name: value.contiguous() for name, value in full.items()}


def report(trainer: Any, where: Path) -> None:
    """Writes what a run ended with: `<where>.safetensors` and `<where>.json`."""
    evaluation = trainer.evaluate()
    save_file(trained_parameters(trainer), where.with_suffix(".safetensors"))
    result = {
        "state": trainer.method_state(),
        "logps": {kind: values.tolist() for kind, values in trainer.reference_logps.items()},
        "evaluation": evaluation,
        "log": [entry for entry in trainer.state.log_history if "learning_rate" in entry],
        "best": [trainer.state.best_global_step, trainer.state.best_metric],
        "step": trainer.state.global_step,
    }
    where.with_suffix(".json").write_text(json.dumps(result), encoding="utf-8")


def quiet() -> None:
    """Only errors of the libraries, so that what a failed process prints is its failure."""
    import datasets

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
