"""What each attack of `hf-unlearn attack` works on, read and checked before a model is loaded; and its judges."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

from ..attacks.judges import Judge, TargetJudge
from ..attacks.multi_turn import transcript_judges
from ..attacks.paraphrase import wordings_of
from ..attacks.prompts import usual_judges
from ..attacks.relearn import shown_count
from ..attacks.static import PromptLayout, load_prompts
from ..attacks.transcripts import load_transcripts
from ..data.formats import detect_format, to_chatml
from ..data.prompts_files import XSTestPrompts, load_xstest
from ..data.tokenize import PROMPT_FORMATS
from ..metrics.parts import evenly_spaced
from .attack_arguments import ANSWERED, JUDGED, AttackArguments
from .attack_store import model_identity
from .data_arguments import load_rows


@dataclass(frozen=True, kw_only=True)
class AttackData:
    """
    Data of one attack.

    Args:
        rows (`Any`): what its `run` takes as rows.
        options (`dict[str, Any]`): further arguments of its `run`: other data, judges.
        identity (`dict[str, Any]`): where it comes from, and a hash: what tells two runs apart.
    """

    rows: Any
    options: dict[str, Any] = field(default_factory=dict)
    identity: dict[str, Any]


def load_data(given: AttackArguments, attacks: Sequence[str]) -> dict[str, AttackData]:
    """
    The data of each attack; not of paraphrase, where it was not asked for and no row has another wording.

    Raises:
        ValueError, FileNotFoundError: as the loaders say; rows without what an attack needs.
    """
    rows: list[dict[str, Any]] = []
    if given.dataset is not None:
        rows = _plain_rows(given.dataset, given.dataset_config, given.dataset_split, "dataset")
    found: dict[str, AttackData] = {}
    for name in attacks:
        options: dict[str, Any] = {}
        more: dict[str, Any] = {}
        chosen: Any
        if name == "static":
            layout = cast(PromptLayout, given.prompts_layout)  # load_prompts refuses others
            chosen = _limited(load_prompts(_path(given.prompts), layout), given.limit)
            judges = usual_judges([row.behavior for row in chosen])
            if given.targets is not None:
                judges["targets"] = _targets_judge(given.targets, chosen)
                more["targets"] = _hash(read_lists(given.targets))
            options["judges"] = judges
            more["prompts"] = given.prompts
        elif name == "multi_turn":
            chosen = _limited(load_transcripts(_path(given.transcripts)), given.limit)
            options["judges"] = transcript_judges(chosen)
            more["transcripts"] = given.transcripts
        elif name == "over_refusal":
            halves = load_xstest(_path(given.xstest))
            chosen = XSTestPrompts(
                safe=_limited(halves.safe, given.limit), unsafe=_limited(halves.unsafe, given.limit)
            )
            more["xstest"] = given.xstest
        else:
            chosen = _limited(rows, given.gcg_rows if name == "gcg" else given.limit)
            if name == "paraphrase" and not _worded(chosen, given):
                continue
            more["dataset"] = given.dataset
            if name == "relearn" and given.benign_dataset is not None:
                options["benign"] = _plain_rows(
                    given.benign_dataset, given.benign_config, given.benign_split, "benign_dataset"
                )
                more["benign_dataset"] = {"path": given.benign_dataset, "hash": _hash(options["benign"])}
            if name == "paraphrase" and given.rewordings is not None:
                options["rewordings"] = read_lists(given.rewordings)
                more["rewordings"] = {"path": given.rewordings, "hash": _hash(options["rewordings"])}
            _check_rows(name, chosen, given, options)
        found[name] = AttackData(rows=chosen, options=options, identity={**more, "rows": _hash(chosen)})
    return found


def judge_settings(given: AttackArguments, name: str) -> dict[str, Any]:
    """The models that judge an attack, with all that changes what they say; nothing where none does."""
    found: dict[str, Any] = {}
    if name in JUDGED and given.judge_model is not None:
        found["judge_model"] = given.judge_model
        found["judge"] = {
            **model_identity(given.judge_model),
            "template": _hash(_path(given.judge_template).read_text(encoding="utf-8")),
            "says": [given.judge_yes, given.judge_no],
        }
    if name in ANSWERED and given.perplexity_model is not None:
        found |= {"perplexity_model": given.perplexity_model, "perplexity": model_identity(given.perplexity_model)}
    return found


def add_models(given: AttackArguments, data: dict[str, AttackData]) -> None:
    """
    Loads the classifier and the perplexity's model, and gives them to the attacks that judge prompts.
    """
    judging = [name for name in ANSWERED if name in data]
    if given.perplexity_model is not None and judging:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from ..attacks.model_judge import answer_perplexities

        trust = {"trust_remote_code": given.trust_remote_code}
        model: Any = AutoModelForCausalLM.from_pretrained(given.perplexity_model, dtype="auto", **trust).eval()
        if torch.accelerator.is_available():
            model = model.to(torch.accelerator.current_accelerator())
        tokenizer = AutoTokenizer.from_pretrained(given.perplexity_model, **trust)
        for name in judging:
            data[name].options["perplexity"] = partial(answer_perplexities, model, tokenizer)
    if given.judge_model is not None and given.judge_template is not None:
        from ..attacks.model_judge import load_model_judge

        says: dict[str, Any] = {
            key: (value,) for key, value in (("yes", given.judge_yes), ("no", given.judge_no)) if value
        }
        judge = load_model_judge(
            given.judge_model,
            template=_path(given.judge_template).read_text(encoding="utf-8"),
            trust_remote_code=given.trust_remote_code,
            **says,
        )
        for name in judging:
            if name in JUDGED:
                data[name].options["judges"][f"model {Path(given.judge_model).name}"] = judge


def read_lists(path: str) -> dict[str, list[str]]:
    """
    A JSON object of strings or lists of strings, as lists.

    Raises:
        ValueError: anything else.
    """
    file = _path(path)
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON ({error}); expected an object of lists of strings.") from error
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{file} holds a {type(content).__name__}; expected an object of lists of strings.")
    lists = {key: [value] if isinstance(value, str) else value for key, value in content.items()}
    for number, value in enumerate(lists.values()):
        if not isinstance(value, list) or not value or not all(isinstance(entry, str) for entry in value):
            raise ValueError(f"Entry {number} of {file} is no string and no list of at least one string.")
    return lists


def _targets_judge(path: str, prompts: Sequence[Any]) -> Judge:
    """Targets by behaviour, or by the id that a file gives a behaviour."""
    lists = read_lists(path)
    targets = {}
    for row in prompts:
        own = lists.get(row.behavior, lists.get(row.id))
        if own is not None:
            targets[row.behavior] = own
    if not targets:
        raise ValueError(f"No key of {path} is a behaviour of the prompts, or its id; expected at least one.")
    return TargetJudge(targets=targets)


def _check_rows(name: str, rows: Sequence[Any], given: AttackArguments, options: dict[str, Any]) -> None:
    for number, row in enumerate(rows):
        try:
            kind = detect_format(to_chatml(row))
        except ValueError as error:
            raise ValueError(f"Row {number} of dataset: {error}") from error
        if name != "relearn" and kind != "tokenized" and kind not in PROMPT_FORMATS:
            raise ValueError(
                f"Row {number} of dataset is in {kind} format, and {name} needs a prompt and a response. Give "
                "`question` and `answer`, or `prompt` and `completion`."
            )
    if name == "relearn" and "benign" not in options:
        shown_count(len(rows), given.configurations()[name])
    if name == "paraphrase":
        wordings_of(rows, given.configurations()[name].column, options.get("rewordings"))
    if name == "gcg":
        lacking = [number for number, row in enumerate(rows) if not row.get("question") or not row.get("answer")]
        if lacking:
            raise ValueError(
                f"Row {lacking[0]} has the columns {sorted(rows[lacking[0]])}; gcg needs question, answer."
            )


def _worded(rows: Sequence[Any], given: AttackArguments) -> bool:
    """Whether paraphrase has wordings, or was asked for, so that their lack is an error."""
    asked = given.attacks is not None or given.paraphrase is not None or given.rewordings is not None
    return asked or any(row.get(given.configurations()["paraphrase"].column) for row in rows)


def _plain_rows(path: str, config: str | None, split: str, name: str) -> list[dict[str, Any]]:
    rows = [dict(row) for row in load_rows(path, config, split)]
    if not rows:
        raise ValueError(f"{name} is {path!r}, without a row.")
    return rows


def _limited(rows: Sequence[Any], limit: int | None) -> list[Any]:
    return [rows[number] for number in evenly_spaced(len(rows), limit)]


def _hash(value: Any) -> str:
    """Sixteen digits that tell two data sets apart."""
    plain = json.dumps(value, sort_keys=True, ensure_ascii=False, default=_as_plain)
    return hashlib.sha256(plain.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _as_plain(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else str(value)


def _path(path: str | None) -> Path:
    assert path is not None  # checked with the request
    return Path(path).expanduser()
