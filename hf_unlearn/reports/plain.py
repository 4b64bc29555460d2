"""Plain JSON values: what may stand in results.json, and how numbers that JSON lacks survive a round trip."""

from __future__ import annotations

import dataclasses
import enum
import math
import numbers
import re
from collections.abc import Mapping, Sequence, Set
from typing import Any

_SPELLING = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_SECRET = re.compile(r"(^|_)(hub_token|api_key|password|secret|access_token)$")


def to_number(value: Any, where: str) -> float:
    """`value` as a float: Python and numpy numbers and one-element tensors are accepted, booleans are not.

    Raises:
        TypeError: if `value` is not a number.
    """
    if value is None:
        return math.nan
    if not isinstance(value, bool):
        if isinstance(value, numbers.Real):
            return float(value)
        item = getattr(value, "item", None)
        if callable(item) and getattr(value, "size", None) is not None:
            return to_number(item(), where)
    raise TypeError(f"`{where}` must be a number, got {value!r} of type {type(value).__name__}.")


def to_plain(value: Any) -> Any:
    """`value` with only dict, list, str, int, float, bool and None in it; what has no such form becomes its `str`."""
    if value is None or isinstance(value, bool | str):
        return value.value if isinstance(value, enum.Enum) else value
    if isinstance(value, enum.Enum):
        return to_plain(value.value)
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(entry) for key, entry in value.items()}
    if isinstance(value, Set):
        return sorted((to_plain(entry) for entry in value), key=str)
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [to_plain(entry) for entry in value]
    tolist = getattr(value, "tolist", None)
    return to_plain(tolist()) if callable(tolist) else str(value)


def mask_secrets(value: Any) -> Any:
    """Plain `value` with the strings under keys that hold credentials (`hub_token`, `api_key`, ...) masked."""
    if isinstance(value, dict):
        return {
            key: "***" if _SECRET.search(key.lower()) and isinstance(entry, str) else mask_secrets(entry)
            for key, entry in value.items()
        }
    return [mask_secrets(entry) for entry in value] if isinstance(value, list) else value


def pull_non_finite(value: Any) -> tuple[Any, dict[str, str]]:
    """Replace NaN and infinities, which strict JSON lacks, by None.

    Returns:
        the plain value, and `dict[str, str]` from JSON pointer (RFC 6901) to "nan", "inf" or "-inf".
    """
    found: dict[str, str] = {}

    def walk(node: Any, pointer: str) -> Any:
        if isinstance(node, dict):
            return {key: walk(entry, f"{pointer}/{_escape(key)}") for key, entry in node.items()}
        if isinstance(node, list):
            return [walk(entry, f"{pointer}/{index}") for index, entry in enumerate(node)]
        if isinstance(node, float) and not math.isfinite(node):
            found[pointer] = str(node)
            return None
        return node

    return walk(value, ""), found


def put_non_finite(value: Any, found: Mapping[str, str]) -> Any:
    """Undo [`pull_non_finite`], in place. Pointers that lead nowhere (a file edited by hand) are ignored."""
    for pointer, spelling in found.items():
        *path, last = [part.replace("~1", "/").replace("~0", "~") for part in pointer.split("/")[1:]] or [""]
        node = value
        try:
            for part in path:
                node = node[int(part)] if isinstance(node, list) else node[part]
            key: Any = int(last) if isinstance(node, list) else last
            if node[key] is None:
                node[key] = _SPELLING[spelling]
        except (KeyError, IndexError, TypeError, ValueError):
            continue
    return value


def _escape(key: str) -> str:
    return key.replace("~", "~0").replace("/", "~1")
