"""A question about a run, its answer, and the numbers it rests on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Answer = Literal["yes", "partly", "no", "unknown"]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One question, its answer, and the numbers it rests on.

    Args:
        name (`str`): "forgotten" ("unreachable" for an edit), "kept", "feasible", "indistinguishable" or "stays".
        question (`str`): the question in plain words.
        answer (`"yes"`, `"partly"`, `"no"` or `"unknown"`): the answer.
        reason (`str`): one or two sentences with the numbers.
    """

    name: str
    question: str
    answer: Answer
    reason: str
