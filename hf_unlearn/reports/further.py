"""Metrics of whole evaluations beside one another: value, standard error, interval, rows, and what is absent."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from . import formats
from .glossary import metric
from .plain import to_number
from .schema import SUBJECTS, Results

P_VALUES = ("forget_quality",)


def evaluations_of(results: Results) -> dict[str, Mapping[str, Any]]:
    """
    The evaluations that results carry, by model; each as the content of its evaluation.json.

    Raises:
        ValueError: the entry `evaluations` has another form.
    """
    entries = results.extra.get("evaluations") or {}
    unknown = sorted(set(entries) - set(SUBJECTS)) if isinstance(entries, Mapping) else [type(entries).__name__]
    wrong = unknown or [
        name for name, entry in entries.items() if entry and not isinstance(entry.get("metrics"), Mapping)
    ]
    if wrong:
        raise ValueError(
            f"`evaluations` of the results has {wrong}; expected evaluations with `metrics` under {list(SUBJECTS)}."
        )
    return {name: entries[name] for name in SUBJECTS if entries.get(name)}


def rows_of(results: Results) -> dict[str, int]:
    """How many rows each metric of the unlearned model is over, where its evaluation says so."""
    found = evaluations_of(results).get("unlearned") or {}
    return {name: int(entry["n"]) for name, entry in found.get("metrics", {}).items() if entry.get("n") is not None}


def further_rows(results: Results) -> list[dict[str, Any]]:
    """Every metric of the evaluations: label, meaning, and a cell for each model with value, interval and n."""
    evaluations = evaluations_of(results)
    names = dict.fromkeys(name for entry in evaluations.values() for name in entry["metrics"])
    rows = []
    for name in names:
        cells = {
            subject: _cell(name, entry["metrics"][name])
            for subject, entry in evaluations.items()
            if name in entry["metrics"]
        }
        rows.append({"name": name, "label": metric(name).label, "cells": cells})
    return rows


def absent_reasons(results: Results) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What the results lack, and what the evaluations lack beyond that: names and models by reason."""
    own: dict[tuple[str, str], list[str]] = {}
    for name, reason in results.absent.items():
        own.setdefault((reason, ""), []).append(name)
    models: dict[tuple[str, str], list[str]] = {}
    for subject, entry in evaluations_of(results).items():
        for name, reason in (entry.get("absent") or {}).items():
            if results.absent.get(name) != reason:
                models.setdefault((str(name), str(reason)), []).append(subject)
    further: dict[tuple[str, str], list[str]] = {}
    for (name, reason), subjects in models.items():
        further.setdefault((reason, ", ".join(subjects)), []).append(name)
    first, second = (
        [{"names": names, "models": who, "reason": reason} for (reason, who), names in found.items()]
        for found in (own, further)
    )
    return first, second


def model_hashes(results: Results) -> list[dict[str, str]]:
    """Name and SHA-256 of each evaluated model; an empty hash where it could not be taken."""
    return [
        {"subject": subject, "model": str(entry.get("model") or ""), "hash": str(entry.get("model_hash") or "")}
        for subject, entry in evaluations_of(results).items()
    ]


def _cell(name: str, entry: Mapping[str, Any]) -> dict[str, str]:
    value = to_number(entry.get("value"), name)
    shown = formats.p_value(value) if name in P_VALUES else formats.with_error(value, _finite(entry, "standard_error"))
    low, high = _finite(entry, "low"), _finite(entry, "high")
    note = [f"{formats.score(low)} to {formats.score(high)}"] if low is not None and high is not None else []
    if entry.get("n") is not None:
        note.append(f"n = {entry['n']}")
    unit = str(entry.get("unit") or "")
    return {"value": f"{shown} {unit}".strip(), "note": ", ".join(note)}


def _finite(entry: Mapping[str, Any], name: str) -> float | None:
    value = to_number(entry.get(name), name)
    return value if math.isfinite(value) else None
