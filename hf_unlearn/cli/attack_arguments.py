"""What `hf-unlearn attack` takes beside the options of the model, and what it refuses before loading one."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ..attacks.gcg import GCGConfig
from ..attacks.multi_turn import MultiTurnConfig
from ..attacks.paraphrase import ParaphraseConfig
from ..attacks.prefill import PrefillConfig
from ..attacks.prompts import PromptConfig
from ..attacks.quantise import RoundingConfig
from ..attacks.relearn import RelearnConfig
from ..attacks.soft_prompt import SoftPromptConfig

Attack = Literal[
    "relearn", "prefill", "quantise", "paraphrase", "static", "multi_turn", "over_refusal", "gcg", "soft_prompt"
]
CONFIGS: dict[str, type[Any]] = {
    "relearn": RelearnConfig,
    "prefill": PrefillConfig,
    "quantise": RoundingConfig,
    "paraphrase": ParaphraseConfig,
    "static": PromptConfig,
    "multi_turn": MultiTurnConfig,
    "over_refusal": PromptConfig,
    "gcg": GCGConfig,
    "soft_prompt": SoftPromptConfig,
}
_ROWS = ("relearn", "prefill", "quantise", "paraphrase", "gcg", "soft_prompt")
JUDGED = ("static", "multi_turn")  # by a classifier as well: its classes are of harm, not of refusal
ANSWERED = (*JUDGED, "over_refusal")  # whose answers are judged
_COSTLY = ("gcg", "soft_prompt")  # only when they are asked for
NEEDS = {**dict.fromkeys(_ROWS, "dataset"), "static": "prompts", "multi_turn": "transcripts", "over_refusal": "xstest"}
_USED_BY = {
    "targets": ("static",),
    "judge_model": JUDGED,
    "perplexity_model": ANSWERED,
    "benign_dataset": ("relearn",),
    "rewordings": ("paraphrase",),
}
_OPTIONS = "Its options, a mapping: JSON here, or YAML in --config."


@dataclass
class AttackArguments:
    """
    Attacks, models, data and output of `hf-unlearn attack`; the unlearned model is `model_name_or_path`.

    Args:
        attacks (`list[str]`, *optional*):
            Which; by default all whose data is given, without `gcg` and `soft_prompt`, which take long.
        adapter (`str`, *optional*):
            A LoRA adapter on `model_name_or_path`, merged before the attacks.
        control_model, target_model (`str`, *optional*):
            A model that never saw the forgotten data, and the one before unlearning, under the same attacks.
        dataset, dataset_config, dataset_split (`str`, *optional*):
            The forgotten rows: for relearn, prefill, quantise, paraphrase, gcg, soft_prompt.
        benign_dataset, benign_config, benign_split (`str`, *optional*):
            Rows that relearn fine-tunes on in place of forgotten ones.
        rewordings (`str`, *optional*):
            JSON file `{question: [wording, ...]}` for paraphrase, in place of the rows' column.
        prompts, prompts_layout (`str`, *optional*):
            File of jailbreak prompts for static, and its layout.
        transcripts (`str`, *optional*):
            File of conversations for multi_turn.
        xstest (`str`, *optional*):
            XSTest's CSV file for over_refusal.
        targets (`str`, *optional*):
            JSON file `{behavior or its id: [words, ...]}`: a further judge of static.
        judge_model, judge_template, judge_yes, judge_no (`str`, *optional*):
            A classifier as a further judge of static and multi_turn, the file with its template, and what it says.
            Not of over_refusal: its classes are of harm.
        perplexity_model (`str`, *optional*):
            A model under which the perplexity of answers shows word salad: for static, multi_turn, over_refusal.
        defence (`str`, *optional*, defaults to `"none"`):
            In front of static and over_refusal: `smooth_llm` or `self_reminder`.
        limit (`int`, *optional*):
            So many rows, prompts or conversations, evenly spaced; of XSTest, so many of each half. Benign rows are
            all used, and gcg has `gcg_rows`.
        gcg_rows (`int`, *optional*, defaults to `4`):
            So many rows for gcg.
        output_dir (`str`, *optional*, defaults to `"outputs/attack"`):
            Receives attacks.json, about one model of each kind. What is there and was run with the same settings
            is not run again; other settings of an attack replace what it found.
        redo (`bool`, *optional*, defaults to `False`):
            Run everything again.
        tokenizer_name_or_path (`str`, *optional*):
            Tokenizer, where the models' folders have none.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether code from the hub may run.
        relearn, prefill, quantise, paraphrase (`dict` or JSON, *optional*):
            Options of these attacks: the fields of their configurations.
        static, multi_turn, over_refusal, gcg, soft_prompt (`dict` or JSON, *optional*):
            The same.
    """

    attacks: list[str] | None = field(default=None, metadata={"help": f"Which of {', '.join(CONFIGS)}."})
    adapter: str | None = field(default=None, metadata={"help": "LoRA adapter on model_name_or_path."})
    control_model: str | None = field(default=None, metadata={"help": "A model that never saw the data."})
    target_model: str | None = field(default=None, metadata={"help": "The model before unlearning."})
    dataset: str | None = field(default=None, metadata={"help": "The forgotten rows: hub id, folder or file."})
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration."})
    dataset_split: str = field(default="train", metadata={"help": "Its split."})
    benign_dataset: str | None = field(default=None, metadata={"help": "Rows that relearn fine-tunes on instead."})
    benign_config: str | None = field(default=None, metadata={"help": "Its configuration."})
    benign_split: str = field(default="train", metadata={"help": "Its split."})
    rewordings: str | None = field(default=None, metadata={"help": "JSON {question: [wording, ...]}."})
    prompts: str | None = field(default=None, metadata={"help": "File of jailbreak prompts."})
    prompts_layout: str = field(
        default="auto", metadata={"help": "auto, harmbench (CSV), jailbreakbench or behaviors (JSON)."}
    )
    transcripts: str | None = field(default=None, metadata={"help": "File of conversations, JSON or JSON lines."})
    xstest: str | None = field(default=None, metadata={"help": "XSTest's CSV file."})
    targets: str | None = field(default=None, metadata={"help": "JSON {behavior or its id: [words, ...]}."})
    judge_model: str | None = field(default=None, metadata={"help": "A classifier model as a judge."})
    judge_template: str | None = field(default=None, metadata={"help": "File: {prompt} and {answer} in its template."})
    judge_yes: str | None = field(default=None, metadata={"help": "What it says for a success, if not yes."})
    judge_no: str | None = field(default=None, metadata={"help": "What it says otherwise, if not no."})
    perplexity_model: str | None = field(default=None, metadata={"help": "Model that tells word salad."})
    defence: str = field(default="none", metadata={"help": "none, smooth_llm or self_reminder."})
    limit: int | None = field(default=None, metadata={"help": "So many rows or prompts, evenly spaced."})
    gcg_rows: int = field(default=4, metadata={"help": "So many rows for gcg, evenly spaced."})
    output_dir: str = field(default="outputs/attack", metadata={"help": "Receives attacks.json."})
    redo: bool = field(default=False, metadata={"help": "Run again what is finished."})
    tokenizer_name_or_path: str | None = field(default=None, metadata={"help": "Tokenizer, if not the models'."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Whether code from the hub may run."})
    relearn: dict[str, Any] | str | None = field(default=None, metadata={"help": _OPTIONS})
    prefill: dict[str, Any] | str | None = field(default=None, metadata={"help": _OPTIONS})
    quantise: dict[str, Any] | str | None = field(default=None, metadata={"help": _OPTIONS})
    paraphrase: dict[str, Any] | str | None = field(default=None, metadata={"help": _OPTIONS})
    static: dict[str, Any] | str | None = field(default=None, metadata={"help": _OPTIONS})
    multi_turn: dict[str, Any] | str | None = field(default=None, metadata={"help": _OPTIONS})
    over_refusal: dict[str, Any] | str | None = field(default=None, metadata={"help": _OPTIONS})
    gcg: dict[str, Any] | str | None = field(default=None, metadata={"help": _OPTIONS})
    soft_prompt: dict[str, Any] | str | None = field(default=None, metadata={"help": _OPTIONS})

    def chosen(self) -> list[str]:
        """
        The attacks to run, in the order of this library: cheap ones first.

        Raises:
            ValueError: an unknown attack, one without its data, or none.
        """
        if self.attacks is None:
            found = [name for name in CONFIGS if name not in _COSTLY and getattr(self, NEEDS[name]) is not None]
        else:
            unknown = [name for name in self.attacks if name not in CONFIGS]
            if unknown:
                raise ValueError(f"attacks has {unknown}; expected some of {', '.join(CONFIGS)}.")
            found = [name for name in CONFIGS if name in self.attacks]
        for name in found:
            if getattr(self, NEEDS[name]) is None:
                raise ValueError(f"{name} needs --{NEEDS[name]}, which is not given.")
        if not found:
            raise ValueError(
                "There is nothing to attack with: give --dataset (the forgotten rows), --prompts, --transcripts or "
                "--xstest, or name --attacks."
            )
        for name in CONFIGS:
            if getattr(self, name) is not None and name not in found:
                raise ValueError(f"There are options for {name}, which is not run; add it to --attacks.")
        return found

    def configurations(self) -> dict[str, Any]:
        """
        The configuration of each chosen attack.

        Raises:
            ValueError: no mapping, an unknown option, or a value of another type or out of range.
        """
        found = {}
        for name in self.chosen():
            values = as_mapping(getattr(self, name), name)
            if CONFIGS[name] is PromptConfig and self.defence != "none":
                values.setdefault("defence", self.defence)
            found[name] = made_config(CONFIGS[name], values, name)
        return found


def check_request(given: AttackArguments, model_args: Any) -> None:
    """
    Refuses what cannot work, before data or a model is loaded; makes the output folder.

    Raises:
        ValueError: what is missing or does not go together.
        FileNotFoundError: a file that is not there.
        OSError: the output folder cannot be written.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("hf-unlearn attack runs in one process; start it without accelerate launch or torchrun.")
    if model_args.model_name_or_path is None:
        raise ValueError("model_name_or_path is missing: the id or the folder of the unlearned model.")
    if model_args.use_peft:
        raise ValueError("use_peft is for training; give the adapter's folder as --adapter.")
    for name in ("rewordings", "prompts", "transcripts", "xstest", "targets", "judge_template"):
        value = getattr(given, name)
        if value is not None and not Path(value).expanduser().is_file():
            raise FileNotFoundError(f"{name} is {value!r}, which is not a file.")
    if (given.judge_model is None) != (given.judge_template is None):
        raise ValueError("judge_model and judge_template belong together; give both, or neither.")
    if given.judge_template is not None:
        from ..attacks.model_judge import check_template

        check_template(Path(given.judge_template).expanduser().read_text(encoding="utf-8"))
    _check_places(given, model_args.model_name_or_path)
    for name, low in (("limit", 1), ("gcg_rows", 1)):
        value = getattr(given, name)
        if value is not None and value < low:
            raise ValueError(f"{name} is {value}; expected at least {low}.")
    chosen = given.chosen()
    if given.defence != "none" and not {"static", "over_refusal"} & set(chosen):
        raise ValueError(f"defence is {given.defence!r}, and stands in front of static and over_refusal alone.")
    for name, users in _USED_BY.items():
        if getattr(given, name) is not None and not set(users) & set(chosen):
            raise ValueError(f"{name} is for {' and '.join(users)}, not run here. Leave it out, or name --attacks.")
    for name in ("judge_yes", "judge_no"):
        if getattr(given, name) is not None and given.judge_model is None:
            raise ValueError(f"{name} is what a judge_model says, which is not given.")
    given.configurations()
    folder = Path(given.output_dir).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"output_dir {given.output_dir!r} cannot be written.")


def _check_places(given: AttackArguments, model: str) -> None:
    """Models that are folders are there; a hub id is known only when it is loaded."""
    places = {"model_name_or_path": model, "control_model": given.control_model, "target_model": given.target_model}
    places |= {"adapter": given.adapter, "tokenizer_name_or_path": given.tokenizer_name_or_path}
    places |= {"judge_model": given.judge_model, "perplexity_model": given.perplexity_model}
    for name, place in places.items():
        if place is None:
            continue
        folder = Path(place).expanduser()
        if not folder.is_dir() and (place.startswith((".", "/", "~")) or place.count("/") > 1):
            raise FileNotFoundError(f"{name} is {place!r}, which is not a folder. Give a model's folder, or a hub id.")
        wanted = {"tokenizer_name_or_path": (), "adapter": ("adapter_config.json",)}.get(
            name, ("config.json", "adapter_config.json")
        )
        if folder.is_dir() and wanted and not any((folder / file).is_file() for file in wanted):
            raise FileNotFoundError(f"{name} is {place!r}, a folder without {' or '.join(wanted)}.")


def as_mapping(value: Any, name: str) -> dict[str, Any]:
    """
    Options as a mapping, from JSON where they are text.

    Raises:
        ValueError: neither a mapping nor JSON of one.
    """
    if value is None:
        return {}
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"The options of {name} are not JSON ({error}): {value!r:.200}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"The options of {name} are a {type(value).__name__}; expected a mapping.")
    return dict(value)


def made_config(kind: type[Any], values: dict[str, Any], name: str) -> Any:
    """
    A configuration from plain values, lists standing for tuples.

    Raises:
        ValueError: an unknown field, or a value of another type or out of range.
    """
    hints = get_type_hints(kind)
    known = {item.name: item for item in dataclasses.fields(kind)}
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"{name} has no option {', '.join(map(repr, unknown))}; expected some of {', '.join(known)}.")
    made = {}
    for key, value in values.items():
        converted = tuple(value) if isinstance(value, list) else value
        if not _fits(converted, hints[key]):
            raise ValueError(f"{key} of {name} is {value!r}; expected {_in_words(hints[key])}.")
        made[key] = converted
    try:
        return kind(**made)
    except ValueError as error:
        raise ValueError(f"The options of {name}: {error}") from error


def _in_words(hint: Any) -> str:
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " or ".join(map(repr, parts))
    if origin in (Union, UnionType):
        return " or ".join(_in_words(part) for part in parts)
    if origin is tuple:
        return f"a list, each {_in_words(parts[0])}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "nothing"}
    return names.get(hint, str(hint))


def _fits(value: Any, hint: Any) -> bool:
    """Whether a plain value is of an annotated type; an int is a float, a bool is no number."""
    origin = get_origin(hint)
    if origin is Literal:
        return value in get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(part, get_args(hint)[0]) for part in value)
    if hint in (int, float):
        return isinstance(value, (int, float) if hint is float else int) and not isinstance(value, bool)
    return isinstance(value, hint if isinstance(hint, type) else object)
