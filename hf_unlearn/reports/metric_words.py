"""A metric in words: its title, its definition, and where it should end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Goal = Literal["reference", "target", "high", "low", ""]
GOALS: dict[Goal, str] = {
    "reference": "as the reference",
    "target": "as the target",
    "high": "high",
    "low": "low",
    "": "",
}


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A score's name, its title, its definition, and what an ideal unlearned model would score.

    Args:
        name (`str`): key in results.json.
        label (`str`): title in tables.
        meaning (`str`): definition in one or two sentences.
        goal (`"reference"`, `"target"`, `"high"`, `"low"` or `""`): whose score the unlearned model should have.
        unit_interval (`bool`, *optional*, defaults to `True`): whether the score lies in [0, 1].
        headline (`bool`, *optional*, defaults to `True`): whether it stands in the first table also where a table of
            all metrics of an evaluation follows.
    """

    name: str
    label: str
    meaning: str
    goal: Goal
    unit_interval: bool = True
    headline: bool = True
