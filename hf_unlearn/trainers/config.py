"""Arguments of [`UnlearningTrainer`]: TrainingArguments plus the losses and how data is read."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

from transformers import TrainingArguments

from ..geometry.projection import PROJECTIONS
from .engines import check_launch, check_one_engine
from .objective import ForgetLossName, RetainLossName

Cycle = Literal["forget", "retain", "longest", "shortest"]
ReferencePolicyName = Literal["auto", "adapter", "copy"]


@dataclass
class UnlearningConfig(TrainingArguments):
    r"""
    Configuration of [`UnlearningTrainer`]: minimise `forget_weight * L_f + retain_weight * sum_k L_r^k`.

    Only what differs from, or is added to, [`~transformers.TrainingArguments`] is listed.

    Args:
        forget_loss (`str`, *optional*, defaults to `"npo"`):
            `"lmf"`, `"kl_uniform"`, `"entropy"`, `"grad_ascent"`, `"wga"`, `"satimp"`, `"undial"`, `"npo"`,
            `"simnpo"`, `"dpo"` (IdkDPO: a refusal against the forget answer), `"idk_nll"` (NLL of a refusal), or
            on hidden states `"rmu"` and `"rerouting"`, with `forget_loss_kwargs={"layers": [7]}`.
        forget_loss_kwargs (`dict`, *optional*):
            Parameters of the forget loss, e.g. `{"beta": 0.1}`; unknown names are an error. See `docs/losses.md`.
        retain_loss (`str`, *optional*, defaults to `"nll"`):
            `"nll"` (token-mean cross-entropy), `"kl"` (KL from the reference model), `"rmu"` or `"rerouting"`
            (distances from the reference's states at the forget loss's layers).
        forget_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the forget loss.
        retain_weight (`float`, `dict` or JSON, *optional*, defaults to `1.0`):
            Weight of the retain losses, one number or one for each retain set.
        normalize_forget_loss (`bool`, *optional*, defaults to `False`):
            Divide the forget loss by its value on the forget set before step 0, so that it starts at 1.
        sam_rho (`float`, *optional*, defaults to `0.0`):
            Sharpness-aware forgetting (SAM, arXiv 2010.01412): the forget gradient is taken at the weights moved by
            this length up the forget loss. 0: off. Costs a further forward and backward pass over the forget rows.
        gradient_projection (`str`, *optional*, defaults to `"none"`):
            How the forget gradient is decoupled from the retain gradient: `"global"` (its component along the retain
            gradient is removed, over all parameters), `"tensor"` (in each parameter tensor), `"conflict"` (global,
            only where the two oppose each other; PCGrad) or `"none"`.
        weight_noise (`float`, *optional*, defaults to `0.0`):
            Noise-and-distil (UNDO, arXiv 2506.06278): after calibration and before step 0 this share of every weight
            matrix is replaced by a fresh initialisation, and training has to bring back what is to be kept. Made for
            `retain_loss="kl"`, the whole model, `cycle="retain"` and a learning rate of pre-training; see
            `docs/noise_and_distil.md`. 0: off.
        max_length (`int`, *optional*, defaults to `1024`):
            Longest tokenised row; longer ones are cut on the right with a warning that counts them. None: never cut.
        completion_only_loss (`bool`, *optional*):
            Loss on the completion only. None: True for prompt-completion and question-answer data, as in TRL.
        assistant_only_loss (`bool`, *optional*, defaults to `False`):
            Loss on assistant turns only; needs a chat template with generation tags.
        dataset_num_proc (`int`, *optional*):
            Processes that tokenise.
        pad_to_multiple_of (`int`, *optional*):
            Pad batches to a multiple of this length.
        cycle (`str`, *optional*, defaults to `"forget"`):
            Which side sets the length of an epoch: `"forget"`, `"retain"`, `"longest"` or `"shortest"`; the others are
            cycled through, every row once before any repeats.
        reference_policy (`str`, *optional*, defaults to `"auto"`):
            Where reference logits (`"kl"`, `"undial"`) come from: `"adapter"` switches the LoRA adapter off, `"copy"`
            keeps a frozen copy, `"auto"` takes the adapter when there is one. NPO and DPO need neither: their
            reference is one cached number an example.
        fused_head (`bool`, *optional*, defaults to `True`):
            Compute losses from hidden states at response positions, a chunk of logits at a time, and never the logits
            of the whole batch. Compared with the model's own logits before the first step; whole logits are used, with
            a warning, where they differ.
        head_chunk_size (`int`, *optional*):
            Rows of logits that exist at once. By default as many as fit into 96 MiB on a CPU, 1 GiB elsewhere.
        retain_eval_size (`int` or `float`, *optional*, defaults to `0.1`):
            Rows (or share) of every retain set that are held out to measure retention; at most 512 rows when given
            as a share. 0 measures on the training rows.
        forget_eval_size (`int`, *optional*, defaults to `512`):
            At most this many forget rows are used by `evaluate()` and by calibrations.
        model_init_kwargs (`dict` or JSON, *optional*):
            Keyword arguments of `from_pretrained` when the model is given as a string.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether code from the hub may run.
        save_on_sigterm (`bool`, *optional*, defaults to `True`):
            On SIGTERM (pre-emption) finish the step on every process, save a checkpoint and exit with code 0.

    Defaults that differ from TrainingArguments, as in TRL: `logging_steps=10`, activation (gradient) checkpointing on
    unless it is set, `bf16` on where an accelerator supports it. Others: `learning_rate=1e-5`,
    `remove_unused_columns=False`.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        *TrainingArguments._VALID_DICT_FIELDS,
        "model_init_kwargs",
        "forget_loss_kwargs",
    ]

    learning_rate: float = field(default=1e-5, metadata={"help": "The initial learning rate."})
    logging_steps: float = field(default=10, metadata={"help": "Log every X optimizer steps."})
    bf16: bool | None = field(  # None: decided by the hardware, as in TRL
        default=None, metadata={"help": "Use bf16 mixed precision. Default: True where an accelerator supports it."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay False: batches are nested (forget, retain)."}
    )
    forget_loss: str = field(
        default="npo", metadata={"help": "Forget loss.", "choices": list(get_args(ForgetLossName))}
    )
    forget_loss_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Parameters of the forget loss as JSON, e.g. '{\"beta\": 0.1}'."}
    )
    retain_loss: str = field(
        default="nll", metadata={"help": "Retain loss.", "choices": list(get_args(RetainLossName))}
    )
    forget_weight: float = field(default=1.0, metadata={"help": "Weight of the forget loss."})
    retain_weight: float | str | dict[str, float] = field(
        default=1.0, metadata={"help": "Weight of the retain losses: a number, or JSON {name: number}."}
    )
    if "activation_checkpointing" not in TrainingArguments.__dataclass_fields__:  # its name before transformers 5.2x
        gradient_checkpointing: bool = field(
            default=True, metadata={"help": "Recompute activations in the backward pass: less memory, more time."}
        )
    normalize_forget_loss: bool = field(
        default=False, metadata={"help": "Divide the forget loss by its value before step 0."}
    )
    sam_rho: float = field(default=0.0, metadata={"help": "Length of SAM's move up the forget loss. 0: off."})
    gradient_projection: str = field(
        default="none",
        metadata={"help": "Decoupling of forget and retain gradients.", "choices": list(PROJECTIONS)},
    )
    weight_noise: float = field(
        default=0.0, metadata={"help": "Share of the weights replaced by a fresh initialisation before step 0 (UNDO)."}
    )
    max_length: int | None = field(
        default=1024, metadata={"help": "Longest tokenised row; longer rows are cut on the right."}
    )
    completion_only_loss: bool | None = field(
        default=None, metadata={"help": "Loss on completions only. Default: True where the data has a prompt."}
    )
    assistant_only_loss: bool = field(
        default=False, metadata={"help": "Loss on assistant turns only (the chat template needs generation tags)."}
    )
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes that tokenise."})
    pad_to_multiple_of: int | None = field(default=None, metadata={"help": "Pad batches to a multiple of this."})
    cycle: str = field(
        default="forget",
        metadata={"help": "Which side sets the length of an epoch.", "choices": list(get_args(Cycle))},
    )
    reference_policy: str = field(
        default="auto",
        metadata={"help": "Where reference logits come from.", "choices": list(get_args(ReferencePolicyName))},
    )
    retain_eval_size: float = field(
        default=0.1, metadata={"help": "Rows (>= 1) or share (< 1) of every retain set held out for evaluation."}
    )
    forget_eval_size: int = field(default=512, metadata={"help": "At most this many forget rows in evaluate()."})
    fused_head: bool = field(
        default=True, metadata={"help": "Losses at response positions only, without logits of the whole batch."}
    )
    head_chunk_size: int | None = field(
        default=None, metadata={"help": "Rows of logits at once. Default: 96 MiB of them on a CPU, else 1 GiB."}
    )
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keyword arguments of from_pretrained as JSON, for a model given by name."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Whether code from the hub may run."})
    save_on_sigterm: bool = field(
        default=True, metadata={"help": "On SIGTERM finish the step, save a checkpoint and exit with code 0."}
    )

    def __post_init__(self) -> None:
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and _accelerator_has_bf16()
        self.retain_weight = parse_per_name("retain_weight", self.retain_weight)
        self._resolve_checkpointing()
        check_one_engine(self)
        super().__post_init__()
        check_launch(self)
        for name in ("forget_loss_kwargs", "model_init_kwargs"):
            value = getattr(self, name)  # TrainingArguments parses strings that begin with "{"
            if value is not None and not isinstance(value, dict):
                raise ValueError(f"{name} is {value!r}; expected a dict, or JSON such as '{{\"beta\": 0.1}}'.")
        check_choice("forget_loss", self.forget_loss, get_args(ForgetLossName))
        check_choice("retain_loss", self.retain_loss, get_args(RetainLossName))
        check_choice("cycle", self.cycle, get_args(Cycle))
        check_choice("reference_policy", self.reference_policy, get_args(ReferencePolicyName))
        check_choice("gradient_projection", self.gradient_projection, PROJECTIONS)
        self._check_combination()
        if self.remove_unused_columns:
            raise ValueError(
                "remove_unused_columns=True cannot work here: batches are nested ({'forget': ..., 'retain': ...}) and "
                "no column of them is an argument of the model. Leave it at False."
            )
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"max_length is {self.max_length}; expected at least 2 tokens, or None for no limit.")
        if self.head_chunk_size is not None and self.head_chunk_size < 1:
            raise ValueError(f"head_chunk_size is {self.head_chunk_size}; expected None or at least 1 row.")
        if self.retain_eval_size < 0:
            raise ValueError(f"retain_eval_size is {self.retain_eval_size}; expected 0, a share below 1, or rows.")
        if self.forget_eval_size < 1:
            raise ValueError(f"forget_eval_size is {self.forget_eval_size}; expected at least 1 row.")
        weights = [self.forget_weight, *_numbers(self.retain_weight)]
        if min(weights) < 0:
            raise ValueError(f"forget_weight and retain_weight must not be negative, got {weights}.")

    @property
    def combines_gradients(self) -> bool:
        """Whether a step is made of several gradients."""
        return self.sam_rho > 0 or self.gradient_projection != "none"

    def _check_combination(self) -> None:
        if not 0 <= self.sam_rho < float("inf"):
            raise ValueError(f"sam_rho is {self.sam_rho}; expected a positive length, or 0 for no SAM.")
        if not 0 <= self.weight_noise <= 1:
            raise ValueError(
                f"weight_noise is {self.weight_noise}; expected a share between 0 (off) and 1 (a fresh model)."
            )
        if self.combines_gradients and self.fp16:
            raise ValueError(
                "sam_rho and gradient_projection combine gradients, and fp16 scales each of them until it overflows. "
                "Use bf16=True, or float32."
            )

    def _resolve_checkpointing(self) -> None:
        """On by default, under the name that the installed transformers has for it (renamed in 5.2x)."""
        if getattr(self, "activation_checkpointing", True) is None:
            old = getattr(self, "gradient_checkpointing", None)
            setattr(self, "activation_checkpointing", True if old is None else old)  # noqa: B010  # absent in old ones
            setattr(self, "gradient_checkpointing", None)  # noqa: B010


def _accelerator_has_bf16() -> bool:
    from transformers.utils import is_torch_bf16_gpu_available

    return bool(is_torch_bf16_gpu_available())


def _numbers(value: Any) -> list[float]:
    if value is None:
        return []
    return list(value.values()) if isinstance(value, dict) else [value]


def as_kwargs(value: dict[str, Any] | str | None) -> dict[str, Any]:
    """A copy of an option that is a dict or nothing once the config has been checked."""
    assert value is None or isinstance(value, dict)
    return dict(value or {})


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ValueError that lists the choices when `value` is none of them."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; expected one of: {', '.join(choices)}.")


def parse_per_name(name: str, value: float | str | dict[str, float] | None) -> Any:
    """
    A number, or a number for each retain set, from Python values or from the command line's JSON.

    Raises:
        ValueError: neither a number nor a mapping of names to numbers.
    """
    parsed: Any = value
    if isinstance(value, str):
        if value.lower() in ("none", "null", ""):
            return None
        try:
            parsed = json.loads(value)
        except json.JSONDecodeError:
            parsed = value
    if parsed is None or _is_number(parsed):
        return parsed
    if isinstance(parsed, dict) and parsed and all(_is_number(number) for number in parsed.values()):
        return {str(key): float(number) for key, number in parsed.items()}
    raise ValueError(
        f"{name} is {value!r}; expected a number, or a number for each retain set such as "
        f'{{"retain": 0.5, "world_facts": 0.2}}.'
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
