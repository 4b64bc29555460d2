"""What an attack found, in one form for all attacks: for attacks.json, tables and the report."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from .plain import mask_secrets, pull_non_finite, put_non_finite, to_number, to_plain
from .schema import write_text
from .versions import library_versions

Subject = Literal["target", "unlearned", "control"]
"""The model before unlearning, the one after it, and one that never saw what was forgotten."""

_OPTIONAL = ("standard_error", "refusal")
FORMAT, FORMAT_VERSION = "hf_unlearn.attacks", 1


@dataclass(frozen=True, kw_only=True)
class Measure:
    """
    One number of one model under an attack.

    Args:
        name (`str`): what it is, for example `"probability of the unseen rows"`.
        subject (`"target"`, `"unlearned"` or `"control"`): the model.
        value (`float`): the number; NaN where it could not be computed.
        standard_error (`float`, *optional*): its bootstrap standard error.
        n (`int`): rows or prompts that it is over.
    """

    name: str
    subject: Subject
    value: float
    n: int
    standard_error: float | None = None

    def __post_init__(self) -> None:
        _check_subject(self.subject)
        _check_numbers(self, "value", "standard_error")


@dataclass(frozen=True, kw_only=True)
class Curve:
    """
    A number of one model against the strength of an attack: optimizer steps, given tokens, bits.

    Args:
        name (`str`): the series, for example `"rows never shown"`; curves of one figure share `x_label` and `y_label`.
        subject (`"target"`, `"unlearned"` or `"control"`): the model.
        x, y (`tuple[float, ...]`): points, in the order of x.
        x_label, y_label (`str`): of the axes, with units.
        standard_error (`tuple[float, ...]`, *optional*): of each y.
    """

    name: str
    subject: Subject
    x: tuple[float, ...]
    y: tuple[float, ...]
    x_label: str
    y_label: str
    standard_error: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        _check_subject(self.subject)
        lengths = {len(self.x), len(self.y), len(self.standard_error if self.standard_error is not None else self.y)}
        if len(lengths) != 1 or not self.x:
            raise ValueError(
                f"A curve needs as many y (and standard errors) as x, at least one; got {lengths} points."
            )
        _check_numbers(self, "x", "y", "standard_error")


@dataclass(frozen=True, kw_only=True)
class JudgeRate:
    """
    What one judge says of one model's answers, as shares of n answers.

    Args:
        judge (`str`): its name.
        subject (`"target"`, `"unlearned"` or `"control"`): the model.
        success (`float`): answers that the judge takes for a success of the attack and that are not gibberish.
        refusal (`float`, *optional*): answers that refuse; None for a judge that does not tell.
        degenerate (`float`): answers that are gibberish: neither success nor refusal.
        n (`int`): answers. failed (`int`): answers on which the judge raised an error; they are not among n.
        standard_error (`float`, *optional*): bootstrap standard error of `success`.
    """

    judge: str
    subject: Subject
    success: float
    degenerate: float
    n: int
    refusal: float | None = None
    failed: int = 0
    standard_error: float | None = None

    def __post_init__(self) -> None:
        _check_subject(self.subject)
        _check_numbers(self, "success", "refusal", "degenerate", "standard_error")


@dataclass(frozen=True, kw_only=True)
class Example:
    """
    One answer under an attack. Text is kept as it came: it may be hostile, so escape it on output.

    Args:
        prompt (`str`): what was asked, or the name of a behaviour where the prompt should not be shown.
        answer (`str`): what the model said.
        subject (`"target"`, `"unlearned"` or `"control"`): the model.
        success (`Mapping[str, bool]`): by judge, whether it counts as a success of the attack.
    """

    prompt: str
    answer: str
    subject: Subject
    success: Mapping[str, bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_subject(self.subject)


@dataclass(frozen=True, kw_only=True)
class AttackOutcome:
    """
    What one attack found about one or several models.

    Args:
        attack (`str`): its name, as in `hf-unlearn attack`: "relearn", "quantise", "prefill", "paraphrase",
            "multi_turn", "static", "gcg", "soft_prompt", "over_refusal".
        settings (`Mapping[str, Any]`): what it was run with; credentials are masked.
        measures, curves, judges, examples: what it found; empty where it has none.
        seconds (`float`): wall time.
        absent (`Mapping[str, str]`): what is missing, with the reason.
    """

    attack: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    measures: tuple[Measure, ...] = ()
    curves: tuple[Curve, ...] = ()
    judges: tuple[JudgeRate, ...] = ()
    examples: tuple[Example, ...] = ()
    seconds: float = math.nan
    absent: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "settings", mask_secrets(to_plain(self.settings)))

    def as_dict(self) -> dict[str, Any]:
        """Nested plain values; NaN and infinities are still floats here."""
        plain: dict[str, Any] = to_plain(self)
        return plain

    def subjects(self) -> frozenset[Subject]:
        """The models that it says a number of."""
        return frozenset(
            [
                *(measure.subject for measure in self.measures),
                *(curve.subject for curve in self.curves),
                *(rate.subject for rate in self.judges),
            ]
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AttackOutcome:
        """
        An outcome from what [`as_dict`] gave.

        Raises:
            ValueError: a field is missing or unknown.
            TypeError: no mapping was given.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"An outcome of an attack must be a mapping, got a {type(values).__name__}.")
        known = {item.name for item in fields(cls)}
        if "attack" not in values or set(values) - known:
            raise ValueError(
                f"An outcome of an attack needs `attack` and knows {sorted(known)}; got {sorted(values)}."
            )
        parts: dict[str, type[Any]] = {"measures": Measure, "curves": Curve, "judges": JudgeRate, "examples": Example}
        made: dict[str, Any] = dict(values)
        for name, kind in parts.items():
            made[name] = tuple(_made(kind, entry) for entry in values.get(name) or ())
        return cls(**made)


def write_attacks(
    path: str | os.PathLike[str],
    outcomes: Sequence[AttackOutcome],
    *,
    models: Mapping[str, str] | None = None,
) -> Path:
    """
    Writes attacks.json in strict JSON, whole or not at all.

    Args:
        path (`str` or `os.PathLike`): the file; folders are made.
        outcomes (`Sequence[AttackOutcome]`): one for each attack.
        models (`Mapping[str, str]`, *optional*): name or path of each subject's model.
    """
    content: dict[str, Any] = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "models": dict(models or {}),
        "versions": library_versions(),
        "attacks": [outcome.as_dict() for outcome in outcomes],
    }
    plain, non_finite = pull_non_finite(content)
    if non_finite:
        plain["non_finite"] = non_finite
    return write_text(Path(path), json.dumps(plain, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def read_attacks(path: str | os.PathLike[str]) -> list[AttackOutcome]:
    """
    Reads what [`write_attacks`] wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is something else, or of another version.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); expected an attacks.json of hf-unlearn.") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise ValueError(f"{path} holds no outcomes of attacks; expected an attacks.json of hf-unlearn.")
    if values.get("version") != FORMAT_VERSION:
        raise ValueError(f"{path} has version {values.get('version')!r}; this code reads {FORMAT_VERSION}.")
    if not isinstance(values.get("attacks"), list):
        raise ValueError(f"{path} has no list `attacks`; expected an attacks.json of hf-unlearn.")
    put_non_finite(values, values.pop("non_finite", {}))
    try:
        return [AttackOutcome.from_dict(entry) for entry in values["attacks"]]
    except (ValueError, TypeError) as error:
        raise type(error)(f"{path}: {error}") from error


def _made(kind: type[Any], entry: Any) -> Any:
    if isinstance(entry, kind):
        return entry
    known = {item.name for item in fields(kind)}
    if not isinstance(entry, Mapping) or set(entry) - known:
        raise ValueError(f"A {kind.__name__} has the fields {sorted(known)}; got {entry!r:.200}.")
    lists = {name: tuple(value) for name, value in entry.items() if isinstance(value, list)}
    try:
        return kind(**{**entry, **lists})
    except TypeError as error:
        raise ValueError(f"A {kind.__name__} could not be made of {entry!r:.200}: {error}") from error


def _check_subject(subject: str) -> None:
    if subject not in get_args(Subject):
        raise ValueError(f"subject is {subject!r}; expected one of {get_args(Subject)}.")


def _check_numbers(value: Any, *names: str) -> None:
    """Makes floats of fields that are numbers or tuples of numbers; None stays where a field may lack one."""
    for name in names:
        given = getattr(value, name)
        if given is None and name not in _OPTIONAL:
            given = math.nan  # as null stands for NaN in files that were edited by hand
        if given is not None:
            where = f"{name} of a {type(value).__name__}"
            made = (
                tuple(to_number(one, where) for one in given) if isinstance(given, tuple) else to_number(given, where)
            )
            object.__setattr__(value, name, made)
