"""Static conversations of several turns, from the user's file; error messages never show what they say."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_unlearn.data.formats import is_messages, to_chatml


@dataclass(frozen=True, kw_only=True)
class Transcript:
    """
    One conversation.

    Args:
        messages (`tuple[Mapping[str, str | None], ...]`):
            `role` and `content`; the last is the user's. An assistant's turn without content is generated.
        behavior (`str`):
            What a model that complies would do, for judges; the last message where the file names nothing else.
        targets (`tuple[str, ...]`, *optional*, defaults to `()`):
            What the last answer says if the attack succeeds.
    """

    messages: tuple[Mapping[str, str | None], ...]
    behavior: str
    targets: tuple[str, ...] = ()


def load_transcripts(path: str | Path) -> list[Transcript]:
    """
    Conversations from a JSON list or JSON lines: objects with `messages` (or ShareGPT's `conversations`), and
    optionally `behavior` (`str`) and `targets` (a string or a list of strings).

    Messages have `role` (`system`, `user` or `assistant`) and `content`. The last is the user's, whose answer is
    judged. An assistant's turn with `content` null, and one that is missing between two of the user's, is generated
    by the model under attack.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no JSON, no conversations, or one of another shape.
    """
    path = Path(path)
    text = path.read_text(encoding="utf-8-sig").strip()
    try:
        entries = (
            json.loads(text)
            if text.startswith("[")
            # not splitlines: a string of JSON may hold other line separators of Unicode as they are
            else [json.loads(line) for line in text.split("\n") if line.strip()]
        )
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is neither a JSON list nor JSON lines ({error.msg}, line {error.lineno})."
        ) from error
    if not entries:
        raise ValueError(f"{path} holds no conversations; expected at least one.")
    return [_transcript(f"Conversation {number} of {path}", entry) for number, entry in enumerate(entries)]


def _transcript(where: str, entry: Any) -> Transcript:
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is a {type(entry).__name__}; expected an object with `messages`.")
    column = "conversations" if "conversations" in entry else "messages"
    if not is_messages(entry.get(column)):
        raise ValueError(
            f"{where} has no list `messages` of objects with `role` and `content`; it has the keys {sorted(entry)}."
        )
    messages = complete_turns(to_chatml({column: entry[column]})["messages"], where)
    targets = entry.get("targets") or ()
    targets = [targets] if isinstance(targets, str) else targets
    if not isinstance(targets, list | tuple) or not all(
        isinstance(target, str) and target.strip() for target in targets
    ):
        raise ValueError(f"`targets` of {where} must be a string or a list of strings with text.")
    behavior = entry.get("behavior") or messages[-1]["content"]
    if not isinstance(behavior, str):
        raise ValueError(f"`behavior` of {where} is a {type(behavior).__name__}; expected a string.")
    return Transcript(messages=messages, behavior=behavior, targets=tuple(targets))


def complete_turns(
    messages: Sequence[Mapping[str, Any]], where: str = "The conversation"
) -> tuple[Mapping[str, str | None], ...]:
    """
    The messages, with an empty turn of the assistant where two of the user follow each other.

    Raises:
        ValueError: an unknown role, a message without text that is not the assistant's, two turns of the assistant in
            a row, one before the user's first, or a last message that is not the user's.
    """
    found: list[Mapping[str, str | None]] = []
    for number, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in ("system", "user", "assistant"):
            raise ValueError(f"Message {number} of {where} has the role {role!r}; expected system, user or assistant.")
        if role != "assistant" and (not isinstance(content, str) or not content.strip()):
            raise ValueError(f"Message {number} of {where} is the {role}'s and has no text.")
        if content is not None and not isinstance(content, str):
            raise ValueError(f"Message {number} of {where} has a {type(content).__name__} as content; expected text.")
        before = found[-1]["role"] if found else None
        if role == "assistant" and before != "user":
            raise ValueError(f"Message {number} of {where} is the assistant's and follows no message of the user.")
        if role == "system" and before is not None:
            raise ValueError(f"Message {number} of {where} is the system's; expected it at the beginning.")
        if role == "user" and before == "user":
            found.append({"role": "assistant", "content": None})
        found.append({"role": role, "content": content})
    if not found or found[-1]["role"] != "user":
        raise ValueError(
            f"{where} ends with the role {found[-1]['role'] if found else None!r}; expected the user's message whose "
            "answer is judged. Drop the last answer (put what it says into `targets`)."
        )
    return tuple(found)
