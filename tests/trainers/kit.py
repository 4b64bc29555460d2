"""What the trainer tests share: short configurations, a recording collator, and a slow twin of the losses."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig

from hf_unlearn.data import UnlearningCollator
from hf_unlearn.trainers import PrimalDualConfig, PrimalDualTrainer, UnlearningConfig, UnlearningTrainer

# renamed in transformers 5.2x
CHECKPOINTING = (
    "activation_checkpointing"
    if "activation_checkpointing" in UnlearningConfig.__dataclass_fields__
    else "gradient_checkpointing"
)
QUIET: dict[str, Any] = {
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "logging_steps": 1,
    "lr_scheduler_type": "constant",
    "learning_rate": 1e-3,
    "weight_decay": 0.0,
    "max_grad_norm": 0.0,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 8,
    "max_length": 128,
    CHECKPOINTING: False,
}
NO_CHECKPOINTS: dict[str, Any] = {
    "eval_strategy": "no",
    "save_strategy": "no",
    "load_best_model_at_end": False,
}


@dataclass(frozen=True, kw_only=True)
class Lab:
    """Rows with `question` and `answer`, their tokenizer, an untrained model and one that knows the rows."""

    tokenizer: Any
    forget: Dataset  # 10 rows
    retain: Dataset  # 16 rows
    facts: Dataset  # 7 rows
    holdout: Dataset  # 6 rows
    blank: Any
    target: Any

    def model(self, *, trained: bool = False, dtype: torch.dtype = torch.float32) -> Any:
        return copy.deepcopy(self.target if trained else self.blank).to(dtype)


def config(folder: Any, **kwargs: Any) -> UnlearningConfig:
    return UnlearningConfig(output_dir=str(folder), **{**QUIET, **NO_CHECKPOINTS, **kwargs})


def pd_config(folder: Any, *, checkpoints: bool = False, **kwargs: Any) -> PrimalDualConfig:
    """`checkpoints=True` keeps the defaults: evaluate and save every epoch, return the best feasible one."""
    return PrimalDualConfig(output_dir=str(folder), **{**QUIET, **({} if checkpoints else NO_CHECKPOINTS), **kwargs})


def parameters(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def logged(trainer: Any, key: str) -> list[float]:
    """Every value of a metric in the order in which it was logged."""
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def folders(path: Any) -> list[str]:
    return sorted(folder.name for folder in Path(path).glob("checkpoint-*"))


class Recorder:
    """A collator that keeps the rows of every micro-batch it was given."""

    def __init__(self, tokenizer: Any) -> None:
        self.collate = UnlearningCollator(pad_token_id=tokenizer.pad_token_id)
        self.batches: list[list[dict[str, Any]]] = []

    def __call__(self, items: list[Any]) -> dict[str, Any]:
        self.batches.append(copy.deepcopy(list(items)))
        return self.collate(items)

    def steps(self, accumulation: int = 1) -> list[list[dict[str, Any]]]:
        """The rows of every optimizer step, its micro-batches joined (for epochs that divide evenly)."""
        return [
            [item for batch in self.batches[start : start + accumulation] for item in batch]
            for start in range(0, len(self.batches), accumulation)
        ]


def row_logits(model: Any, row: dict[str, Any], prefix: str = "") -> tuple[torch.Tensor, torch.Tensor]:
    """
    Logits `(n, V)` that predict the labelled tokens of one row alone, and these tokens `(n,)`: position t predicts
    the token at t + 1. One row, no padding, no mask.
    """
    ids, labels = row[f"{prefix}input_ids"], row[f"{prefix}labels"]
    logits = model(input_ids=torch.tensor([ids])).logits[0]
    positions = [t for t in range(len(ids) - 1) if labels[t + 1] != -100]
    return logits[positions], torch.tensor([labels[t + 1] for t in positions])


def row_nll(model: Any, row: dict[str, Any], prefix: str = "") -> torch.Tensor:
    """NLL `(n,)` of the labelled tokens of one row."""
    logits, targets = row_logits(model, row, prefix)
    return -logits.log_softmax(-1)[torch.arange(len(targets)), targets]


def lora(**kwargs):
    return LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **kwargs)


def unlearning(lab, folder, *, model=None, callbacks=None, peft_config=None, inputs=None, **kwargs):
    torch.manual_seed(0)  # a fresh adapter is drawn from the global state
    arguments = {
        "forget_dataset": lab.forget,
        "retain_dataset": {"people": lab.retain, "facts": lab.facts},
        "processing_class": lab.tokenizer,
        **(inputs or {}),
    }
    return UnlearningTrainer(
        model=model if model is not None else lab.model(trained=True),
        args=config(folder, **{"max_steps": 3, **kwargs}),
        peft_config=peft_config,
        callbacks=callbacks,
        **arguments,
    )


def primal_dual(lab, folder, *, model=None, inputs=None, peft_config=None, **kwargs):
    torch.manual_seed(0)
    arguments = {
        "forget_dataset": lab.forget,
        "retain_dataset": {"people": lab.retain, "facts": lab.facts},
        "holdout_dataset": lab.holdout,
        "processing_class": lab.tokenizer,
        **(inputs or {}),
    }
    return PrimalDualTrainer(
        model=model if model is not None else lab.model(trained=True),
        args=pd_config(folder, **{"max_steps": 3, "dual_warmup_steps": 1, **kwargs}),
        peft_config=peft_config,
        **arguments,
    )


def stream(rows):
    return IterableDataset.from_generator(lambda: iter(rows.to_list()))


@torch.no_grad()
def mean_nll(model, rows):
    """Mean over all tokens, and mean over rows of the row's mean."""
    values = [row_nll(model, row) for row in rows]
    return torch.cat(values).mean().item(), torch.stack([value.mean() for value in values]).mean().item()


def build(lab, folder, trainer_class=PrimalDualTrainer, **kwargs):
    """A trainer that would work, with some of its arguments replaced; unknown ones go to its configuration."""
    inputs = {
        "model": None,
        "forget_dataset": lab.forget,
        "retain_dataset": lab.retain,
        "processing_class": lab.tokenizer,
        "holdout_dataset": None,
        "eval_dataset": None,
        "peft_config": None,
        "callbacks": None,
        "args": None,
    }
    inputs.update({key: kwargs.pop(key) for key in list(kwargs) if key in inputs})
    make = pd_config if trainer_class is PrimalDualTrainer else config
    inputs["args"] = inputs["args"] or make(folder, **{"max_steps": 2, **kwargs})
    if inputs["model"] is None:
        inputs["model"] = lab.model(trained=True)
    return trainer_class(**inputs)
