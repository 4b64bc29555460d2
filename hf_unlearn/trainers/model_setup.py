"""Loads and checks model, tokenizer and adapter before any compute is spent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import is_peft_available, logging

from .config import UnlearningConfig, as_kwargs

if TYPE_CHECKING:
    from peft import PeftConfig

logger = logging.get_logger(__name__)


def is_peft_model(model: Any) -> bool:
    """Whether the model carries a PEFT adapter."""
    if not is_peft_available():
        return False
    from peft import PeftModel

    return isinstance(model, PeftModel)


def load_model(model: str | PreTrainedModel, args: UnlearningConfig, quantization_config: Any = None) -> Any:
    """
    The model as an instance.

    Raises:
        TypeError: neither a name nor a model.
        ValueError: loading options for a model that is loaded already.
    """
    if isinstance(model, str):
        kwargs = as_kwargs(args.model_init_kwargs)
        if quantization_config is not None:
            kwargs["quantization_config"] = quantization_config
        kwargs.setdefault("trust_remote_code", args.trust_remote_code)
        if args.world_size > 1:
            # a device map would spread the model over GPUs that other ranks use
            kwargs.setdefault("device_map", None)
        return AutoModelForCausalLM.from_pretrained(model, **kwargs)
    if args.model_init_kwargs or quantization_config is not None:
        raise ValueError(
            "model_init_kwargs and quantization_config are used when the model is loaded from a name, but an "
            f"instance of {type(model).__name__} was given. Pass the name, or load the model with them yourself."
        )
    if not callable(getattr(model, "forward", None)) or not hasattr(model, "config"):
        raise TypeError(f"model must be a name or a PreTrainedModel, got {type(model).__name__}.")
    return model


def check_causal_lm(model: Any) -> None:
    """
    Refuses a model that cannot predict tokens.

    Raises:
        ValueError: the model has no language-modelling head.
    """
    base = model.get_base_model() if is_peft_model(model) else model
    if base.get_output_embeddings() is None:
        raise ValueError(
            f"{type(base).__name__} has no language-modelling head (get_output_embeddings() is None), so it gives no "
            "token probabilities to change. Load it with AutoModelForCausalLM."
        )


def load_tokenizer(processing_class: Any, model: Any, args: UnlearningConfig) -> PreTrainedTokenizerBase:
    """
    The tokenizer, with a padding token: EOS where it has none (masks come from lengths, so EOS stays a label).

    Raises:
        TypeError: not a tokenizer.
        ValueError: neither padding nor EOS token, or more tokens than the model has embeddings.
    """
    if processing_class is None:
        name = getattr(model.config, "_name_or_path", "")
        if not name:
            raise ValueError(
                "processing_class is missing, and the model does not say where it was loaded from. Pass the tokenizer "
                "as processing_class=AutoTokenizer.from_pretrained(...)."
            )
        processing_class = AutoTokenizer.from_pretrained(name, trust_remote_code=args.trust_remote_code)
    if not isinstance(processing_class, PreTrainedTokenizerBase):
        raise TypeError(f"processing_class must be a tokenizer, got {type(processing_class).__name__}.")
    if processing_class.pad_token_id is None:
        if processing_class.eos_token_id is None:
            raise ValueError("The tokenizer has neither a padding nor an EOS token; set tokenizer.pad_token.")
        processing_class.pad_token = processing_class.eos_token
    embeddings = model.get_input_embeddings()
    rows = getattr(embeddings, "num_embeddings", None)
    if rows is not None and len(processing_class) > rows > 0:
        raise ValueError(
            f"The tokenizer has {len(processing_class)} tokens, the model embeds {rows}. Use the model's own "
            "tokenizer, or call model.resize_token_embeddings(len(tokenizer)) first."
        )
    return processing_class


def check_lengths(model: Any, args: UnlearningConfig) -> None:
    """
    Refuses rows longer than the model can read.

    Raises:
        ValueError: `max_length` is above the model's number of positions.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions and args.max_length and args.max_length > positions:
        if args.max_length == UnlearningConfig.__dataclass_fields__["max_length"].default:
            logger.warning_once(f"max_length is lowered from {args.max_length} to the model's {positions} positions.")
            args.max_length = positions
            return
        raise ValueError(
            f"max_length is {args.max_length}, but {type(model).__name__} has {positions} positions. "
            f"Set max_length to {positions} or less."
        )


def check_row_lengths(model: Any, datasets: Mapping[str, Any]) -> None:
    """
    Refuses rows longer than the model can read where `max_length=None` cuts nothing; streams are not read for it.

    Raises:
        ValueError: a row has more tokens than the model has positions.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for name, rows in datasets.items():
        longest = max(map(len, rows["input_ids"])) if positions and isinstance(rows, Dataset) else 0
        if positions and longest > positions:
            raise ValueError(
                f"The {name} dataset has a row of {longest} tokens, but {type(model).__name__} has {positions} "
                f"positions and max_length=None cuts nothing. Set max_length={positions}, or split long rows."
            )


def add_adapter(model: Any, peft_config: PeftConfig | None, args: UnlearningConfig) -> Any:
    """
    Wraps the model with a fresh adapter and prepares what gradient checkpointing and QLoRA need.

    Raises:
        ValueError: an adapter on top of an adapter, target modules that the model does not have, or a model without
            any trainable parameter.
    """
    quantized = getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)
    if peft_config is not None:
        from peft import PeftConfig, get_peft_model, prepare_model_for_kbit_training

        if not isinstance(peft_config, PeftConfig):
            raise TypeError(
                f"peft_config must be a peft.PeftConfig such as LoraConfig, got {type(peft_config).__name__}."
            )
        if is_peft_model(model):
            raise ValueError(
                "The model already has an adapter and peft_config asks for another. Merge the first one "
                "(model.merge_and_unload()), or leave peft_config out to train the adapter it has."
            )
        if quantized:
            model = prepare_model_for_kbit_training(
                model,
                use_gradient_checkpointing=args.gradient_checkpointing,
                gradient_checkpointing_kwargs={"use_reentrant": False},
            )
        try:
            model = get_peft_model(model, peft_config)
        except ValueError as error:
            raise ValueError(
                f"The adapter does not fit {type(model).__name__}: {error} Set target_modules of the peft_config to "
                'modules this model has, for example "all-linear".'
            ) from error
    if is_peft_model(model) and args.gradient_checkpointing:
        model.enable_input_require_grads()
    if not any(parameter.requires_grad for parameter in model.parameters()):
        advice = "Pass a peft_config (LoRA)." if quantized else "Unfreeze parameters, or pass a peft_config."
        raise ValueError(f"No parameter of the model is trainable. {advice}")
    return model
