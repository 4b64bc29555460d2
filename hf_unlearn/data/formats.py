"""Which dataset format a row has: TRL's formats, and the question and answer columns of TOFU."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal

DatasetFormat = Literal[
    "tokenized",
    "language_modeling",
    "prompt_completion",
    "question_answer",
    "conversational",
    "conversational_prompt_completion",
]

ACCEPTED_FORMATS = (
    "`text` (language modelling)",
    "`prompt` + `completion` (strings, or lists of messages)",
    "`messages` (a conversation; `conversations` with from/value is converted)",
    "`question` + `answer`",
    "`input_ids` with `labels`, `completion_mask` or `assistant_masks` (already tokenised)",
)

# What ShareGPT-like files call the two sides. Chat templates print any role they are given, so an unknown name would
# train on a header that the model has never seen, without an error.
_ROLE_NAMES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant"}

_EXPECTED = "Accepted columns: " + "; ".join(ACCEPTED_FORMATS) + "."


def is_messages(value: Any) -> bool:
    """True for a non-empty list of messages, each a mapping with a `role` (or `from`)."""
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(message, Mapping) and ("role" in message or "from" in message) for message in value)
    )


def detect_format(example: Mapping[str, Any], *, name: str = "given") -> DatasetFormat:
    """
    Tells the format of a dataset from one of its rows. A column whose value is `None` counts as absent.

    Where several formats are present the first of these wins: already tokenised, prompt and completion, messages,
    text, question and answer (TRL's order, with TOFU's columns last).

    Args:
        example (`Mapping`):
            One row, column name to value.
        name (`str`, *optional*, defaults to `"given"`):
            What to call the dataset in an error message, e.g. `"forget"`.

    Returns:
        `DatasetFormat`: `"tokenized"`, `"language_modeling"`, `"prompt_completion"`, `"question_answer"`,
        `"conversational"` or `"conversational_prompt_completion"`.

    Raises:
        ValueError: no accepted set of columns is there, or the columns hold values of another type.

    Examples:

    ```python
    >>> detect_format({"question": "Who wrote it?", "answer": "Nobody knows."})
    'question_answer'
    ```
    """
    present = {column for column, value in example.items() if value is not None}
    if "input_ids" in present:
        return "tokenized"
    if {"prompt", "completion"} <= present:
        prompt, completion = example["prompt"], example["completion"]
        if isinstance(prompt, str) and isinstance(completion, str):
            return "prompt_completion"
        if is_messages(prompt) and is_messages(completion):
            return "conversational_prompt_completion"
        raise ValueError(
            f"The {name} dataset has a `prompt` of type {_kind(prompt)} and a `completion` of type "
            f"{_kind(completion)}; expected two strings, or two non-empty lists of messages with `role` and `content`."
        )
    for column in ("messages", "conversations"):
        if column in present:
            if is_messages(example[column]):
                return "conversational"
            raise ValueError(
                f"The {name} dataset has a `{column}` column of type {_kind(example[column])}; expected a non-empty "
                "list of messages, each with `role` and `content` (or `from` and `value`)."
            )
    if "text" in present:
        _require_strings(example, ("text",), name)
        return "language_modeling"
    if {"question", "answer"} <= present:
        _require_strings(example, ("question", "answer"), name)
        return "question_answer"
    raise ValueError(
        f"The {name} dataset has the columns {sorted(example)}, which match no format that can be trained on"
        f"{_hint(present)}. {_EXPECTED} Rename the columns, for example `dataset.rename_column('{_guess(present)}', "
        "'text')`, or build them with `dataset.map`."
    )


def to_chatml(example: Mapping[str, Any]) -> dict[str, Any]:
    """
    Converts ShareGPT-like messages (`from`, `value`) to `role` and `content`, `conversations` to `messages`, and the
    roles `human` and `gpt` to `user` and `assistant`. A row that needs none of this is returned as an equal copy.
    """
    columns = [column for column in ("conversations", "messages", "prompt", "completion") if column in example]
    if "conversations" not in example and not any(
        "from" in message for column in columns if is_messages(example[column]) for message in example[column]
    ):
        return dict(example)
    from trl import maybe_convert_to_chatml

    converted = maybe_convert_to_chatml(copy.deepcopy(dict(example)))  # a copy: it edits the messages in place
    for column in ("messages", "prompt", "completion"):
        if is_messages(converted.get(column)):
            converted[column] = [
                {**message, "role": _ROLE_NAMES.get(message["role"], message["role"])} for message in converted[column]
            ]
    return converted


def _require_strings(example: Mapping[str, Any], columns: tuple[str, ...], name: str) -> None:
    for column in columns:
        if not isinstance(example[column], str):
            raise ValueError(
                f"The `{column}` column of the {name} dataset holds {_kind(example[column])}; expected a string. "
                "Build it with `dataset.map`, one string a row."
            )


def _kind(value: Any) -> str:
    if isinstance(value, list):
        return "list of " + (type(value[0]).__name__ if value else "nothing")
    return type(value).__name__


def _hint(present: set[str]) -> str:
    if "chosen" in present:
        return " (`chosen`/`rejected` is a preference dataset: keep the side to forget and name it `completion`)"
    if "prompt" in present:
        return " (there is a `prompt` but no `completion`)"
    if "question" in present or "answer" in present:
        return " (`question` and `answer` belong together, one is missing)"
    return ""


def _guess(present: set[str]) -> str:
    return min(present) if present else "my_column"
