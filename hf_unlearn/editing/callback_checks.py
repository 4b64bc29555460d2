"""What [`ConstrainedEditCallback`] refuses before compute is spent, and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import PreTrainedTokenizerBase, TrainingArguments

from ..trainers.model_setup import is_peft_model
from .adapter import check_stackable
from .apply import _check_whole
from .config import EditConfig
from .edit_rows import word_pairs
from .merge import check_mergeable
from .mlp import mlp_output
from .planning import _task


def merges(merge: bool | None, model: Any) -> bool:
    """Whether the edit goes into the weights: by default into those of a model without adapters."""
    return not is_peft_model(model) if merge is None else merge


def check_arguments(
    config: EditConfig, datasets: Mapping[str, Any], every: Mapping[str, int | None], judge: Callable[..., bool]
) -> None:
    """
    Refuses arguments that can be judged without a model.

    Raises:
        TypeError: not an [`EditConfig`], a dataset without a length, or a judge that cannot be called.
        ValueError: no words for a method that needs them, no rows, or intervals that make no sense.
    """
    if not isinstance(config, EditConfig):
        raise TypeError(f"config is a {type(config).__name__}; expected an EditConfig.")
    if not config.all_words() and not config.all_texts() and config.method == "pcr":
        raise ValueError("There are no words to make unreachable; set words or words_file in the EditConfig.")
    for name, rows in datasets.items():
        if rows is None and name != "dataset":
            continue
        if not hasattr(rows, "__len__") or isinstance(rows, str | Mapping):
            raise TypeError(f"{name} is a {type(rows).__name__}; expected a Dataset or a list of rows.")
        if not len(rows):
            raise ValueError(f"{name} has no rows; expected at least one.")
    if not callable(judge):
        raise TypeError(f"judge is {judge!r}; expected a function of a prompt and an answer.")
    for name, number in every.items():
        if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
            raise ValueError(f"{name} is {number!r}; expected a whole number of at least 1, or None.")
    if all(number is not None for number in every.values()):
        raise ValueError(f"{' and '.join(every)} are two ways to say when; give one of them.")


def check_task(
    task: Mapping[str, Any],
    args: TrainingArguments,
    *,
    merge: bool | None,
    adapter_name: str | None,
    periodic: bool,
) -> None:
    """
    Refuses what cannot be planned or applied, by the checks of planning and applying.

    Args:
        task (`Mapping`):
            `model`, `tokenizer`, `dataset`, `config` and `retain_dataset`, as for [`plan_edit`].
        args (`TrainingArguments`):
            The arguments of the run.
        merge (`bool`, *optional*):
            As given by the user.
        adapter_name (`str`, *optional*):
            The name of the adapter to come; None where the model has it from an earlier edit of the same callback.
        periodic (`bool`):
            Whether training goes on after an edit.

    Raises:
        TypeError: no tokenizer.
        ValueError: blocks, words, rows, weights or an engine that cannot be edited.
    """
    model, config = task["model"], task["config"]
    if not isinstance(task["tokenizer"], PreTrainedTokenizerBase):
        raise TypeError(
            f"The tokenizer is a {type(task['tokenizer']).__name__}; pass the trainer a processing_class, or the "
            "callback a tokenizer."
        )
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ValueError(
            "The model is sharded by the first version of FSDP, which flattens its matrices: an edit cannot reach "
            "them. Use FSDP2 (fsdp_version: 2) or ZeRO-3."
        )
    _check_whole(model)
    _check_engine(model, args, merges(merge, model), periodic)
    if merges(merge, model):
        for layer in config.layers or [-1]:
            check_mergeable(model, mlp_output(model, layer))
    elif not is_peft_model(model):
        raise ValueError(
            "merge=False needs a PeftModel: what a trainer saves of a plain model would not hold the adapter. Leave "
            "merge out, or train with a peft_config."
        )
    elif adapter_name is not None:
        check_stackable(model, adapter_name)
    planned = _task(
        model, task["tokenizer"], task["dataset"], config, task["retain_dataset"], accelerator=None, progress=False
    )
    for layer in planned.layers:
        mlp_output(model, layer)
    if config.method == "pcr":
        word_pairs(planned.tokenizer, planned.rows, planned.concepts, config.positions, planned.bos_token_id)


def _check_engine(model: Any, args: TrainingArguments, merge: bool, periodic: bool) -> None:
    deepspeed = getattr(args, "hf_deepspeed_config", None)
    if deepspeed is not None:
        stage = deepspeed.get_value("zero_optimization.stage", 0)
        if stage == 0 and merge and periodic and (args.bf16 or args.fp16):
            raise ValueError(
                "DeepSpeed's stage 0 in 16 bits has float32 masters that cannot be reached, and its next step would "
                "take an edit away. Use ZeRO-1, 2 or 3, or edit at the end only (no every_n_steps, every_n_epochs)."
            )
        if stage == 3 and not merge:
            raise ValueError(
                "ZeRO-3 cannot save an adapter that was added after it had sharded the model. Use ZeRO-1 or 2 or "
                "FSDP2 for this run, or load the trained adapter afterwards and call constrained_edit(...) on it."
            )
