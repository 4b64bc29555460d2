"""Curves out of a trainer's log dicts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeGuard

History = Sequence[Mapping[str, Any]]


def series(history: History, key: str) -> tuple[list[float], list[float]]:
    """Steps and values of `key`, in order of steps; where a step was logged twice (a resumed run) the last one counts.

    Entries without the key, without a step, or with a value that is not finite are left out.
    """
    points: dict[float, float] = {}
    for position, entry in enumerate(history):
        value, step = entry.get(key), entry.get("step", position)
        if _is_finite(value) and _is_finite(step):
            points[float(step)] = float(value)
    return sorted(points), [points[step] for step in sorted(points)]


def names_under(history: History, prefix: str, first: Iterable[str] = ()) -> list[str]:
    """Names of constraints: `first`, then those of keys "<prefix>/<name>" in the order in which they were logged."""
    names = dict.fromkeys(first)
    for entry in history:
        names.update(dict.fromkeys(key[len(prefix) + 1 :] for key in entry if key.startswith(f"{prefix}/")))
    return list(names)


def _is_finite(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
