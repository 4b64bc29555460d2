"""Runs side by side: their scores, which is best where that can be said, and whether they may be compared at all."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import formats
from .columns import Column, columns_of
from .further import evaluations_of, rows_of
from .schema import Results, read_results
from .verdict import Verdict, judge

SAME = 1e-3
"""Scores of one model on the same rows may differ by so much (batches, devices)."""
_OF_THE_MODEL = ("model", "adapter", "output", "device", "batch", "dtype", "seconds", "reference", "target", "run")


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run in a comparison: its name, unique among them, its results, and their verdict."""

    name: str
    results: Results
    verdict: Verdict


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """
    Runs side by side.

    Args:
        runs (`tuple[Run, ...]`): in the order given.
        columns (`tuple[Column, ...]`): what at least one of them has.
        best (`Mapping[str, frozenset[str]]`): by column the names of the runs that are best in it; empty where nothing
            says what is best, where all are alike, and everywhere if the runs may not be compared.
        warnings (`tuple[str, ...]`): why they may not be compared; empty where nothing speaks against it.
        settings (`Mapping[str, Mapping[str, str]]`): settings that differ, by name, then by run.
    """

    runs: tuple[Run, ...]
    columns: tuple[Column, ...]
    best: Mapping[str, frozenset[str]]
    warnings: tuple[str, ...]
    settings: Mapping[str, Mapping[str, str]]


def compare(results: Sequence[Results], names: Sequence[str]) -> Comparison:
    """
    Puts runs side by side.

    Args:
        results (`Sequence[Results]`): of each run, at least two.
        names (`Sequence[str]`): of each run; equal ones get numbers.

    Raises:
        ValueError: fewer than two runs, or not as many names as runs.
    """
    if len(results) < 2 or len(results) != len(names):
        raise ValueError(
            f"{len(results)} run{'s' * (len(results) != 1)} with {len(names)} name{'s' * (len(names) != 1)} given; "
            "expected two runs or more, each with a name."
        )
    runs = tuple(
        Run(name=name, results=own, verdict=judge(own)) for name, own in zip(numbered(names), results, strict=True)
    )
    columns = columns_of([run.results for run in runs])
    warnings = differences(runs)
    scores = {run.name: run.results for run in runs}
    best = {column.name: frozenset() if warnings else column.best(scores) for column in columns}
    return Comparison(runs=runs, columns=columns, best=best, warnings=warnings, settings=_settings(runs))


def read_runs(paths: Sequence[str | Path], names: Sequence[str] = ()) -> Comparison:
    """
    Reads and compares runs.

    Args:
        paths (`Sequence[str | Path]`): folders with a results.json, or such files.
        names (`Sequence[str]`, *optional*): one for each; by default the folders' names.

    Raises:
        FileNotFoundError: there is no results.json.
        ValueError: it is none, or there are not as many names as runs.
    """
    if names and len(names) != len(paths):
        raise ValueError(f"{len(names)} names were given for {len(paths)} runs; expected one for each run.")
    files = [results_file(path) for path in paths]
    return compare([read_results(file) for file in files], names or [_name(file) for file in files])


def results_file(path: str | Path) -> Path:
    """
    The results.json that a folder or a file stands for.

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(path)
    file = path / "results.json" if path.is_dir() else path
    if not file.is_file():
        missing = "a results.json in it" if path.is_dir() else "a results.json, or a folder that has one"
        raise FileNotFoundError(
            f"{path} has no results; expected {missing}. hf-unlearn quickstart and hf-unlearn eval write one, and "
            "hf-unlearn report makes one from folders of evaluations."
        )
    return file


def numbered(names: Sequence[str]) -> list[str]:
    """The names, made unique: those that occur several times get numbers."""
    count = Counter(names)
    taken = {name for name in names if count[name] == 1}
    given: list[str] = []
    for name in names:
        chosen, number = name, 0
        while count[name] > 1 and (number == 0 or chosen in taken):
            number += 1
            chosen = f"{name} ({number})"
        taken.add(chosen)
        given.append(chosen)
    return given


def differences(runs: Sequence[Run]) -> tuple[str, ...]:
    """What says that runs are on different data, rows or models, one sentence each."""
    found = []
    for what, values in (
        ("data", {run.name: run.results.dataset for run in runs}),
        ("benchmarks", {run.name: _benchmark(run.results) for run in runs}),
        ("numbers of forget rows", {run.name: _forget_rows(run.results) for run in runs}),
    ):
        known = {name: value for name, value in values.items() if value}
        if len(set(known.values())) > 1:
            listed = "; ".join(f"{name}: {value}" for name, value in known.items())
            found.append(f"The runs are on different {what} ({listed}).")
    for subject, meaning in (
        ("target", "They started from different models, or were scored on different rows"),
        ("reference", "They have different references, or were scored on different rows"),
    ):
        levels = {run.name: level for run in runs if (level := _level(run.results, subject)) is not None}
        if levels and max(levels.values()) - min(levels.values()) > SAME:
            listed = "; ".join(f"{name}: {formats.score(level)}" for name, level in levels.items())
            found.append(f"{meaning}: the {subject}'s forget probability is not the same ({listed}).")
    other = _evaluated_with(runs)
    if other:
        found.append(f"They were evaluated with different settings: {', '.join(other)}.")
    return tuple(found)


def _name(file: Path) -> str:
    return file.resolve().parent.name if file.name == "results.json" else file.stem


def _benchmark(results: Results) -> str:
    return str((evaluations_of(results).get("unlearned") or {}).get("benchmark") or "")


def _forget_rows(results: Results) -> str:
    count = len(results.truth_ratios.get("unlearned", ())) or rows_of(results).get("forget_probability", 0)
    return str(count) if count else ""


def _level(results: Results, subject: str) -> float | None:
    scores = results.target if subject == "target" else results.reference
    value = math.nan if scores is None else scores.forget_probability
    return None if math.isnan(value) else value


def _evaluated_with(runs: Sequence[Run]) -> list[str]:
    given = [(evaluations_of(run.results).get("unlearned") or {}).get("settings") for run in runs]
    known = [settings for settings in given if settings]
    keys = dict.fromkeys(key for settings in known for key in settings)
    return [
        key
        for key in keys
        if not any(word in key for word in _OF_THE_MODEL)
        and len({formats.plain_setting(settings.get(key)) for settings in known}) > 1
    ]


def _settings(runs: Sequence[Run]) -> dict[str, dict[str, str]]:
    rows: dict[str, Mapping[str, Any]] = {
        run.name: {"method": run.results.method, "seed": run.results.seed, **run.results.settings} for run in runs
    }
    found = {}
    for key in dict.fromkeys(key for values in rows.values() for key in values):
        shown = {
            name: formats.plain_setting(values[key]) if key in values else formats.MISSING
            for name, values in rows.items()
        }
        if len(set(shown.values())) > 1:
            found[key] = shown
    return found
