"""Which ways of spreading a run over processes can be honoured; what cannot is refused before compute is spent."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import strtobool

if TYPE_CHECKING:
    from .config import UnlearningConfig

_LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE")  # what torchrun and accelerate launch set


def check_one_engine(args: UnlearningConfig) -> None:
    """
    Refuses a run that two engines would wrap.

    Raises:
        ValueError: DeepSpeed and FSDP are both asked for, by arguments or by accelerate's environment.
    """
    asked = {
        "DeepSpeed": ("deepspeed", args.deepspeed, "ACCELERATE_USE_DEEPSPEED"),
        "FSDP": ("fsdp", args.fsdp, "ACCELERATE_USE_FSDP"),
    }
    by = {
        engine: f"args.{name}" if value else f"{variable}=true"
        for engine, (name, value, variable) in asked.items()
        if value or strtobool(os.environ.get(variable, "false"))
    }
    if len(by) > 1:
        raise ValueError(
            f"DeepSpeed (by {by['DeepSpeed']}) and FSDP (by {by['FSDP']}) are both asked for, and each wraps the "
            "model in its own way. Choose one: take the other out of the arguments or accelerate's configuration."
        )


def check_launch(args: UnlearningConfig) -> None:
    """
    Refuses a launch whose processes would not train one model together, step for step.

    Raises:
        ValueError: processes that do not see each other, batch sizes that contradict a DeepSpeed configuration, or a
            data loader that splits batches.
    """
    started = int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in _LAUNCHED) else 1
    if args.world_size < started:
        raise ValueError(
            f"The launcher started {started} processes, but they are not connected: this one sees {args.world_size}, "
            'so each would train a model of its own. Without a GPU set use_cpu=True and ddp_backend="gloo".'
        )
    deepspeed = getattr(args, "hf_deepspeed_config", None)
    if deepspeed is not None:
        _connect_deepspeed()
    if deepspeed is not None and deepspeed.mismatches:
        raise ValueError(
            "The DeepSpeed configuration and the arguments disagree:\n"
            + "\n".join(deepspeed.mismatches)
            + '\nGive a number in one place only: write "auto" in the DeepSpeed file, or change the argument. '
            "train_batch_size is per_device_train_batch_size * gradient_accumulation_steps * processes "
            f"({args.per_device_train_batch_size} * {args.gradient_accumulation_steps} * {args.world_size})."
        )
    if args.accelerator_config.split_batches or args.accelerator_config.dispatch_batches:
        raise ValueError(
            "accelerator_config splits a batch over the processes (split_batches or dispatch_batches), which nested "
            "(forget, retain) batches cannot be. Leave both off: every process reads its own rows."
        )
    if getattr(args, "enable_jit_checkpoint", False):
        raise ValueError(
            "enable_jit_checkpoint may save between the step of the multipliers and the optimizer's, and not on every "
            "process at the same step. Leave it off: save_on_sigterm (on by default) does it exactly."
        )


def _connect_deepspeed() -> None:
    """
    Lets DeepSpeed use the process group of torch. With `use_cpu` transformers (5.23) starts only that one, and a model
    that ZeRO-3 loads in shards would take the number of processes for 1.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        import deepspeed

        if not deepspeed.comm.is_initialized():
            deepspeed.init_distributed(dist_backend=torch.distributed.get_backend())


def check_parallelism(args: UnlearningConfig, model: Any) -> None:
    """
    Refuses parallelism in which processes share rows: losses are divided by counts that are summed over all of them.

    Raises:
        ValueError: tensor, context, sequence, pipeline or expert parallelism.
    """
    config = getattr(args, "parallelism_config", None)
    for name, size in (("context", "cp_size"), ("sequence", "sp_size"), ("tensor", "tp_size")):
        if (getattr(config, size, 1) or 1) > 1:
            raise ValueError(
                f"parallelism_config has {size}={getattr(config, size)}. {name.capitalize()} parallelism splits "
                "top-level labels or gives one row to several processes; unlearning batches are nested, and every "
                "process is counted as having rows of its own. Turn it off and spread the run with DDP, FSDP or ZeRO."
            )
    loaded = getattr(getattr(model, "config", None), "distributed_config", None)
    for size in ("tp_size", "pp_size", "ep_size"):
        if (getattr(loaded, size, 1) or 1) > 1:
            raise ValueError(
                f"The model was loaded with distributed_config.{size}={getattr(loaded, size)}, in which several "
                "processes work on one row; unlearning counts the rows of every process as its own. Load it with "
                "DistributedConfig(fsdp_size=...) only, or without."
            )


def check_reference(args: UnlearningConfig, model: Any, *, fresh_adapter: bool) -> None:
    """
    Refuses a frozen copy of a model that is sharded already: fully_shard modules cannot be copied.

    Raises:
        ValueError: reference logits need a copy and the model was sharded when it was loaded.
    """
    if not getattr(model, "is_distributed_loading_by_transformers", False):
        return
    if args.reference_policy == "copy" or not fresh_adapter:
        raise ValueError(
            f"retain_loss={args.retain_loss!r} with forget_loss={args.forget_loss!r} needs a frozen copy of the model "
            "as it was, and a model that was sharded when it was loaded (distributed_config) cannot be copied. Pass a "
            "peft_config (its base is the reference), choose a loss without reference logits, or shard with FSDP "
            "through accelerate, or with ZeRO-3."
        )
