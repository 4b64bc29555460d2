"""The methods that the lab compares, with the settings they are run with, and how one of them is run."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .memory import PeakMemory
from .recipe import LabData
from .training import has_gpu


@dataclass(frozen=True, kw_only=True)
class LabMethod:
    """
    A trainer with its arguments.

    Args:
        name (`str`):
            Key in tables and file names.
        label (`str`):
            Text in tables.
        trainer (`str`):
            `"unlearning"`, `"primal-dual"` or `"prism"`.
        arguments (`Mapping[str, Any]`):
            Fields of the trainer's config.
        use_retain (`bool`, *optional*, defaults to `True`):
            Whether the trainer sees the retain set at all.
        with_general (`bool`, *optional*, defaults to `False`):
            Whether general knowledge is part of the retain set: what noise has taken comes back only from data.
    """

    name: str
    label: str
    trainer: Literal["unlearning", "primal-dual", "prism"]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    use_retain: bool = True
    with_general: bool = False


# The lab's shared schedule, chosen on primal-dual runs (docs/benchmarks.md); a method overrides what it has to.
# Gradient ascent has no retain set to hold it back: with the others' learning rate it destroys the model within an
# epoch, so it gets a smaller one.
SCHEDULE: Mapping[str, Any] = {
    "num_train_epochs": 10,
    "per_device_train_batch_size": 16,
    "learning_rate": 8e-4,
    "lr_scheduler_type": "linear",
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "max_length": 256,
}
METHODS: tuple[LabMethod, ...] = (
    LabMethod(
        name="grad_ascent",
        label="gradient ascent",
        trainer="unlearning",
        arguments={"forget_loss": "grad_ascent", "learning_rate": 5e-5},
        use_retain=False,
    ),
    LabMethod(name="grad_diff", label="GradDiff", trainer="unlearning", arguments={"forget_loss": "grad_ascent"}),
    LabMethod(name="npo", label="NPO", trainer="unlearning", arguments={"forget_loss": "npo"}),
    LabMethod(name="simnpo", label="SimNPO", trainer="unlearning", arguments={"forget_loss": "simnpo"}),
    LabMethod(
        name="primal_dual_paper",
        label="primal-dual, LMF (the paper)",
        trainer="primal-dual",
        arguments={"forget_target": None},
    ),
    LabMethod(name="primal_dual", label="primal-dual, default", trainer="primal-dual"),
)
# Ten epochs at 1e-4 train no probe on 400 + 400 rows of a small model; at 0.1 standard deviations an adversary leaves
# it no better than chance (docs/benchmarks.md).
PROBE: Mapping[str, Any] = {
    "probe_epochs": 100,
    "probe_lr": 1e-3,
    "probe_radius": 0.02,
    "probe_radius_unit": "std",
    "probe_standardize": True,
}
PRISM_METHODS: tuple[LabMethod, ...] = (
    LabMethod(
        name="npo_sam",
        label="NPO + SAM",
        trainer="unlearning",
        arguments={"forget_loss": "npo", "sam_rho": 0.1},
    ),
    LabMethod(name="prism", label="PRISM", trainer="prism", arguments={**PROBE, "sam_rho": 0.1}),
    LabMethod(name="prism_no_sam", label="PRISM without SAM", trainer="prism", arguments={**PROBE, "sam_rho": 0.0}),
    LabMethod(
        name="prism_no_probe",
        label="PRISM without probe",
        trainer="prism",
        arguments={"probe_weight": 0.0, "sam_rho": 0.1},
    ),
    LabMethod(
        name="prism_no_projection",
        label="PRISM without projection",
        trainer="prism",
        arguments={**PROBE, "sam_rho": 0.1, "gradient_projection": "none"},
    ),
    LabMethod(
        name="prism_constrained",
        label="PRISM, constrained",
        trainer="prism",
        arguments={**PROBE, "sam_rho": 0.1, "retain_margin": 0.03},
    ),
)


# One pass over the retain rows an epoch, at the rate and with the schedule of the target's own training, and every row
# trained on: what noise has taken comes back only from there. The multiplier starts far from its limit: a low cap.
NOISE: Mapping[str, Any] = {
    "weight_noise": 0.6,
    "retain_loss": "kl",
    "retain_eps": 0.015,
    "retain_eval_size": 0,
    "cycle": "retain",
    "num_train_epochs": 8,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,
    "adam_beta2": 0.98,
    "dual_max": 3.0,
    "dual_warmup_epochs": 0.0,
}
NOISE_METHODS: tuple[LabMethod, ...] = (
    LabMethod(
        name="noise_distil",
        label="primal-dual from noised weights",
        trainer="primal-dual",
        arguments=NOISE,
        with_general=True,
    ),
)


@dataclass(frozen=True, kw_only=True)
class MethodRun:
    """What a run left behind: the trainer, the unlearned model, seconds of training, and peak bytes."""

    trainer: Any
    model: Any
    seconds: float
    peak_bytes: int

    @property
    def history(self) -> list[dict[str, Any]]:
        """The trainer's log."""
        return list(self.trainer.state.log_history)

    @property
    def constraints(self) -> list[dict[str, Any]]:
        """Name, eps, held-out loss, multiplier and feasibility of every constraint; empty without any."""
        return list(getattr(self.trainer, "feasibility", None) or [])


def method_by_name(name: str) -> LabMethod:
    """
    One of [`METHODS`], [`PRISM_METHODS`] or [`NOISE_METHODS`].

    Raises:
        ValueError: there is none of that name.
    """
    known = (*METHODS, *PRISM_METHODS, *NOISE_METHODS)
    for method in known:
        if method.name == name:
            return method
    raise ValueError(f"Unknown method {name!r}; expected one of: {', '.join(method.name for method in known)}.")


def run_method(
    method: LabMethod,
    model: Any,
    tokenizer: Any,
    data: LabData,
    *,
    seed: int = 0,
    bf16: bool = False,
    overrides: Mapping[str, Any] | None = None,
    output_dir: str | Path | None = None,
    peft_config: Any = None,
) -> MethodRun:
    """
    Unlearns `data.forget` from `model`, in place.

    Args:
        method ([`LabMethod`]):
            What to run.
        model, tokenizer:
            The target and its tokenizer.
        data ([`LabData`]):
            Its forget rows, its retain rows, and its holdout rows where there are some.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the run.
        bf16 (`bool`, *optional*, defaults to `False`):
            bf16 autocast.
        overrides (`Mapping[str, Any]`, *optional*):
            Config fields that win over the method's.
        output_dir (`str` or `Path`, *optional*):
            For checkpoints; default: a temporary folder that is removed.
        peft_config (`PeftConfig`, *optional*):
            Train an adapter.
    """
    from .. import trainers
    from ..progress import QuietProgressCallback

    classes: dict[str, tuple[Any, Any]] = {
        "primal-dual": (trainers.PrimalDualConfig, trainers.PrimalDualTrainer),
        "prism": (trainers.PrismConfig, trainers.PrismTrainer),
        "unlearning": (trainers.UnlearningConfig, trainers.UnlearningTrainer),
    }
    config, trainer_class = classes[method.trainer]
    arguments = {**method.arguments, **(overrides or {})}
    limited = method.trainer == "primal-dual" or any(
        name in arguments for name in ("retain_eps", "retain_tolerance", "retain_margin")
    )
    extra = {} if limited else {"save_strategy": "no", "eval_strategy": "no"}  # no feasible checkpoint to look for
    with tempfile.TemporaryDirectory() as scratch:
        settings: dict[str, Any] = {
            "output_dir": str(output_dir or scratch),
            "seed": seed,
            "bf16": bf16,
            "logging_steps": 5,
            "save_only_model": True,
            "report_to": "none",
            "disable_tqdm": True,
            "per_device_eval_batch_size": 64,
            "gradient_checkpointing": False,
            "use_cpu": not has_gpu(),
        }
        args = config(**{**settings, **extra, **SCHEDULE, **arguments})
        with PeakMemory() as memory:
            trainer = trainer_class(
                model,
                args,
                forget_dataset=data.forget,
                retain_dataset=_retain_rows(method, data),
                holdout_dataset=data.holdout,
                processing_class=tokenizer,
                peft_config=peft_config,
                callbacks=[QuietProgressCallback(f"unlearning: {method.label}", ("forget_nll", "loss/retain/retain"))],
            )
            trainer.remove_callback(_printer())
            started = time.perf_counter()
            trainer.train()
            seconds = time.perf_counter() - started
    # accelerate leaves the autocast of training around forward(); scores are taken in the weights' own precision
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    return MethodRun(trainer=trainer, model=model, seconds=seconds, peak_bytes=memory.bytes)


def _retain_rows(method: LabMethod, data: LabData) -> Any:
    if not method.use_retain:
        return None
    if not method.with_general:
        return data.retain
    from datasets import concatenate_datasets

    parts = (data.retain, *data.general.values())
    return concatenate_datasets([part.select_columns(["question", "answer"]) for part in parts])


def _printer() -> Any:
    from transformers import PrinterCallback

    return PrinterCallback
