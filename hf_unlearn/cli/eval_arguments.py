"""What `hf-unlearn eval` takes beside the options of the model, and what it refuses before a model is loaded."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from ..evaluation.record import FILE, Evaluation

Benchmark = Literal["tofu", "muse", "wmdp", "mmlu", "multiple_choice", "rows"]
ForgetSplit = Literal["forget01", "forget05", "forget10"]
WITH_SCORES = ("tofu", "rows")
"""Benchmarks with per-row scores that a reference is compared by, and with results.json, table.md and report.html."""
CHOICES = ("wmdp", "mmlu", "multiple_choice")
_ONLY: dict[str, tuple[str, ...]] = {
    "forget_split": ("tofu",),
    "holdout_config": WITH_SCORES,
    "holdout_split": WITH_SCORES,
    "run": WITH_SCORES,
    "target": WITH_SCORES,
    "holdout_dataset": WITH_SCORES,
    "generate": WITH_SCORES,
    "max_new_tokens": ("tofu", "rows", "muse"),
    "reference": ("tofu", "rows", "muse"),
    "chat_template": CHOICES,
    "harness_tasks": CHOICES,
}


@dataclass
class EvalArguments:
    """
    Benchmark, data and output of `hf-unlearn eval`.

    Args:
        benchmark (`str`):
            `"tofu"`, `"muse"`, `"wmdp"`, `"mmlu"`, `"multiple_choice"` or `"rows"` (your own JSON lines).
        data (`str`, *optional*):
            TOFU: a hub id (by default `locuslab/TOFU`) or a folder with `forget10_perturbed.json` and the other parts.
            MUSE: the folder of one corpus. Multiple choice: a file or folder. Rows: a JSON lines file.
        forget_split (`str`, *optional*, defaults to `"forget10"`):
            TOFU's part to forget.
        holdout_dataset, holdout_config, holdout_split (`str`, *optional*):
            Rows with `question` and `answer` that the model before unlearning has never seen, for membership
            inference; TOFU and rows.
        reference (`str`, *optional*):
            Of the retain-only (retrained) model: the folder that this command wrote for it, its `scores.json`, or its
            `evaluation.json` (MUSE).
        target (`str`, *optional*):
            Folder that this command wrote for the model before unlearning; stands beside it in the report.
        run (`str`, *optional*):
            Output folder of a trainer, for the report's curves and constraints.
        harness_tasks (`list[str]`, *optional*):
            Tasks of lm-evaluation-harness, which then reads its own data instead of `data`. WMDP and MMLU without
            `data` take `wmdp` and `mmlu`.
        chat_template (`bool`, *optional*, defaults to `False`):
            Ask multiple choice questions through the chat template; published numbers do not.
        generate (`bool`, *optional*, defaults to `True`):
            Whether answers are generated; without them there is no ROUGE and no model utility. TOFU and rows.
        limit (`int`, *optional*):
            Only so many rows of each part, evenly spaced: for a first look. Not for numbers to report.
        batch_size (`int`, *optional*, defaults to `32`):
            Sequences in a forward pass of each process.
        max_new_tokens (`int`, *optional*):
            Longest generated answer; by default the benchmark's own (TOFU 200, MUSE 128 and 32).
        max_length (`int`, *optional*):
            Longest sequence; by default 1024 tokens, and 2048 for MUSE.
        output_dir (`str`, *optional*, defaults to `"outputs/eval"`):
            Receives `evaluation.json`, the scores of single rows, and for TOFU and rows `results.json`, `table.md`
            and `report.html`. Given again after a stop, it goes on where it was.
        adapter (`str`, *optional*):
            PEFT adapter on top of the model. `model_name_or_path` may itself be an adapter's folder.
        tokenizer_name_or_path (`str`, *optional*):
            Tokenizer, where the model's folder has none.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether code from the hub may run.
    """

    benchmark: Benchmark = field(metadata={"help": "What to evaluate."})
    data: str | None = field(default=None, metadata={"help": "Hub id (TOFU), folder or file of the benchmark."})
    forget_split: ForgetSplit = field(default="forget10", metadata={"help": "TOFU's part to forget."})
    holdout_dataset: str | None = field(
        default=None, metadata={"help": "Rows that no model has seen, for membership inference."}
    )
    holdout_config: str | None = field(default=None, metadata={"help": "Its configuration."})
    holdout_split: str = field(default="train", metadata={"help": "Its split."})
    reference: str | None = field(
        default=None, metadata={"help": "Evaluation of the retain-only model: its output folder, or its scores."}
    )
    target: str | None = field(default=None, metadata={"help": "Evaluation of the model before unlearning: a folder."})
    run: str | None = field(default=None, metadata={"help": "Output folder of a trainer, for the report's curves."})
    harness_tasks: list[str] | None = field(
        default=None, metadata={"help": "Tasks of lm-evaluation-harness, instead of data."}
    )
    chat_template: bool = field(default=False, metadata={"help": "Multiple choice through the chat template."})
    generate: bool = field(default=True, metadata={"help": "Whether to generate answers (ROUGE, model utility)."})
    limit: int | None = field(default=None, metadata={"help": "Only so many rows of each part: for a first look."})
    batch_size: int = field(default=32, metadata={"help": "Sequences in a forward pass of each process."})
    max_new_tokens: int | None = field(default=None, metadata={"help": "Longest answer; default: the benchmark's."})
    max_length: int | None = field(
        default=None, metadata={"help": "Longest sequence in tokens; default: 1024, MUSE 2048."}
    )
    output_dir: str = field(default="outputs/eval", metadata={"help": "Output folder; a stopped run goes on there."})
    adapter: str | None = field(default=None, metadata={"help": "PEFT adapter on top of the model."})
    tokenizer_name_or_path: str | None = field(default=None, metadata={"help": "Tokenizer, if not the model's."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Whether code from the hub may run."})


def check_request(given: EvalArguments, model_args: Any) -> None:
    """
    Refuses what cannot work or would be ignored, before anything is read.

    Raises:
        ValueError: what is missing or does not go together.
        FileNotFoundError: a local path that is not there.
        ImportError: lm-evaluation-harness is needed and not installed.
    """
    if model_args.model_name_or_path is None:
        raise ValueError("model_name_or_path is missing: the id or the folder of the model, or of an adapter.")
    if model_args.use_peft:
        raise ValueError("use_peft is for training; give an adapter that exists as --adapter.")
    for name, benchmarks in _ONLY.items():
        default = EvalArguments.__dataclass_fields__[name].default
        if getattr(given, name) != default and given.benchmark not in benchmarks:
            raise ValueError(
                f"{name} has no meaning for benchmark {given.benchmark!r}, only for {', '.join(benchmarks)}. Leave it "
                "out."
            )
    if given.data is None and given.benchmark not in ("tofu", "wmdp", "mmlu") and not given.harness_tasks:
        raise ValueError(f"data is missing: {_DATA[given.benchmark]}.")
    if given.data is not None and given.harness_tasks:
        raise ValueError("data and harness_tasks are both given; expected one: the harness reads its own data.")
    if given.max_length is not None and given.benchmark in CHOICES and given.data is None:
        raise ValueError("max_length has no meaning for lm-evaluation-harness, which cuts by itself. Leave it out.")
    for name in ("holdout_config", "holdout_split"):
        if given.holdout_dataset is None and getattr(given, name) != EvalArguments.__dataclass_fields__[name].default:
            raise ValueError(f"{name} is given without holdout_dataset. Name the dataset, or leave it out.")
    for name in ("limit", "batch_size", "max_new_tokens", "max_length"):
        value = getattr(given, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; expected at least 1.")
    _check_engine(given)
    _check_model(given, model_args.model_name_or_path)
    if given.run is not None and not Path(given.run).expanduser().is_dir():
        raise FileNotFoundError(f"run is {given.run!r}, which is not a folder; expected the output of a trainer.")


def _check_model(given: EvalArguments, model: str) -> None:
    """Local paths exist, and adapters are safetensors: other files are pickles, which run code when they are read."""
    for name, path in (("model_name_or_path", model), ("adapter", given.adapter)):
        if path is None:
            continue
        place = Path(path).expanduser()
        if path.startswith((".", "/", "~")) and not place.is_dir():
            raise FileNotFoundError(f"{name} is {path!r}, which is not a folder; expected one, or a hub id.")
        if place.is_dir() and (name == "adapter" or is_adapter(place)):
            held = sorted(entry.name for entry in place.iterdir())
            for needed in ("adapter_config.json", "adapter_model.safetensors"):
                if needed not in held:
                    raise FileNotFoundError(
                        f"{name} is {path!r}, which holds {', '.join(held[:8]) or 'nothing'} and no {needed}; "
                        "expected a PEFT adapter in safetensors."
                    )
    if given.adapter is not None and is_adapter(Path(model).expanduser()):
        raise ValueError(
            f"model_name_or_path {model!r} is an adapter, and adapter is given, too; expected a model under it. Merge "
            "one of the two first."
        )


def is_adapter(place: Path) -> bool:
    """Whether a folder holds an adapter and no model."""
    return (place / "adapter_config.json").is_file() and not (place / "config.json").is_file()


_DATA = {
    "muse": "the folder of one corpus, which holds verbmem/forget.json and the other files",
    "multiple_choice": "a .json, .jsonl, .csv or .parquet file with question, choices and answer, or a folder of them",
    "rows": "a .jsonl file with question and answer",
}


def prepare_output(given: EvalArguments, label: str) -> Path:
    """
    Makes the output folder, or finds the one of a run that was stopped.

    Args:
        given ([`EvalArguments`]):
            What was asked for.
        label (`str`):
            What evaluation.json will call the model.

    Raises:
        ValueError: it holds the evaluation of another model or on another benchmark.
        OSError: it cannot be made or written.
    """
    folder = Path(given.output_dir).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise type(error)(f"output_dir {given.output_dir!r} cannot be made ({error}). Give another folder.") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"output_dir {given.output_dir!r} cannot be written. Give another folder.")
    if (folder / FILE).is_file():
        found = Evaluation.load(folder)
        for what, own, other in (
            ("benchmark", given.benchmark, found.benchmark),
            ("model", label, found.model),
        ):
            if own != other:
                raise ValueError(
                    f"output_dir {given.output_dir!r} holds an evaluation with {what} {other!r}, not {own!r}. Give "
                    "another folder, or delete that one."
                )
    return folder


def model_label(given: EvalArguments, model: str) -> str:
    """What evaluation.json calls the model."""
    return model if given.adapter is None else f"{model} + {given.adapter}"


def _check_engine(given: EvalArguments) -> None:
    for variable, name in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        if os.environ.get(variable, "false").lower() == "true":
            raise ValueError(
                f"hf-unlearn eval was launched with {name}, but every process holds a whole model and scores a part "
                "of the rows; expected --accelerate_config ddp or single. --load_in_4bit makes a model smaller."
            )
    if given.benchmark in CHOICES and given.data is None:
        if find_spec("lm_eval") is None:
            raise ImportError(
                f"Without data, benchmark {given.benchmark!r} needs lm-evaluation-harness, which is not installed. "
                'Give a local file as data, or install it: pip install "lm_eval[hf]".'
            )
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(
                "lm-evaluation-harness is run in one process here; start without --accelerate_config, or give data."
            )
