"""results.json: what a run of unlearning found, as frozen values that check themselves."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from .plain import mask_secrets, pull_non_finite, put_non_finite, to_number, to_plain

SCHEMA_VERSION = 1
Part = Literal["forget", "retain"]
Subject = Literal["target", "unlearned", "reference"]
SUBJECTS: tuple[Subject, ...] = get_args(Subject)

_REQUIRED_SCORES = ("forget_probability", "forget_rouge", "retain_probability", "retain_rouge")
_OPTIONAL_SCORES = ("forget_truth_ratio", "retain_truth_ratio")


@dataclass(frozen=True, kw_only=True)
class ModelScores:
    """Scores of one model. NaN stands for a score that could not be computed.

    Args:
        forget_probability (`float`): mean over forget examples of exp(-mean NLL of the answer's tokens), in [0, 1].
        forget_rouge (`float`): mean ROUGE-L recall of the greedy answer on forget questions, in [0, 1].
        retain_probability (`float`): the same probability on retain examples.
        retain_rouge (`float`): the same recall on retain questions.
        forget_truth_ratio (`float`, *optional*): mean of min(TR, 1/TR) over forget examples (TOFU, arXiv 2401.06121).
        retain_truth_ratio (`float`, *optional*): mean of max(0, 1 - TR) over retain examples.
        extra (`Mapping[str, float]`, *optional*): further scores, for example
            `forget_paraphrased_question_probability`, `real_authors_probability`, `world_facts_probability`,
            `mia_auc`, `model_utility`.
        standard_error (`Mapping[str, float]`, *optional*): standard error of any of the scores above, by name.
    """

    forget_probability: float
    forget_rouge: float
    retain_probability: float
    retain_rouge: float
    forget_truth_ratio: float | None = None
    retain_truth_ratio: float | None = None
    extra: Mapping[str, float] = field(default_factory=dict)
    standard_error: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in _REQUIRED_SCORES:
            object.__setattr__(self, name, to_number(getattr(self, name), name))
        for name in _OPTIONAL_SCORES:
            if getattr(self, name) is not None:
                object.__setattr__(self, name, to_number(getattr(self, name), name))
        for name in ("extra", "standard_error"):
            values = _mapping(getattr(self, name), name)
            object.__setattr__(self, name, {str(key): to_number(value, str(key)) for key, value in values.items()})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "scores") -> ModelScores:
        """Scores from a flat mapping: names that are no field go to `extra`.

        Raises:
            ValueError: if one of the four required scores is missing.
            TypeError: if a score is not a number.
        """
        values = _mapping(values, where)
        missing = [name for name in _REQUIRED_SCORES if name not in values]
        if missing:
            raise ValueError(
                f"`{where}` lacks {', '.join(missing)}: it has {sorted(values)}. Give NaN for a score that could not "
                "be computed."
            )
        known = {*_REQUIRED_SCORES, *_OPTIONAL_SCORES, "standard_error"}
        extra = {key: value for key, value in values.items() if key not in known}
        return cls(**{key: values[key] for key in known if key in values}, extra=extra)

    def as_dict(self) -> dict[str, Any]:
        """The scores as one flat, ordered dict; optional ones only where given."""
        values: dict[str, Any] = {name: getattr(self, name) for name in _REQUIRED_SCORES}
        values.update({name: getattr(self, name) for name in _OPTIONAL_SCORES if getattr(self, name) is not None})
        values.update(self.extra)
        if self.standard_error:
            values["standard_error"] = dict(self.standard_error)
        return values


@dataclass(frozen=True, kw_only=True)
class ConstraintOutcome:
    """A constraint at the end of a run: `loss` at most `eps`, and the price that was paid for it.

    Args:
        name (`str`): name of the retain set, or `"reach"` for an edit.
        eps (`float`): the limit, in the units of the retain loss (nats per token for NLL); of an edit the wanted
            probability.
        loss (`float`): the retain loss of the returned model; of an edit the largest probability of a word's first
            token at the places that it constrains.
        multiplier (`float`, *optional*): the dual variable at the end; None for an edit, which has one for each place.
        feasible (`bool`): whether the returned model satisfies the constraint, as the trainer decided it.
    """

    name: str
    eps: float
    loss: float
    multiplier: float | None
    feasible: bool

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", str(self.name))
        for name in ("eps", "loss", *([] if self.multiplier is None else ["multiplier"])):
            object.__setattr__(self, name, to_number(getattr(self, name), f"constraints[{self.name}].{name}"))
        object.__setattr__(self, "feasible", bool(self.feasible))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ConstraintOutcome:
        """A constraint from a mapping; keys that are no field are ignored.

        Raises:
            ValueError: if a field is missing.
        """
        values = _mapping(values, "constraints[...]")
        names = ("name", "eps", "loss", "multiplier", "feasible")
        missing = [name for name in names if name not in values]
        if missing:
            raise ValueError(f"a constraint needs {', '.join(names)}: {dict(values)!r} lacks {', '.join(missing)}.")
        return cls(**{name: values[name] for name in names})


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What each model answers to one question. Text is kept as it came: it may be hostile, so escape it on output.

    Args:
        question (`str`): the prompt in plain words.
        answer (`str`): the right answer.
        target (`str`): answer of the model before unlearning.
        unlearned (`str`): answer after unlearning.
        reference (`str`, *optional*): answer of the model that never saw the forget set.
        part (`"forget"` or `"retain"`): the set that the question is from.
    """

    question: str
    answer: str
    target: str
    unlearned: str
    reference: str | None = None
    part: Part = "forget"

    def __post_init__(self) -> None:
        if self.part not in get_args(Part):
            raise ValueError(f"`part` of a generation must be one of {get_args(Part)}, got {self.part!r}.")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Generation:
        """A generation from a mapping; keys that are no field are ignored.

        Raises:
            ValueError: if a field is missing or `part` is unknown.
        """
        values = _mapping(values, "generations[...]")
        missing = [name for name in ("question", "answer", "target", "unlearned", "part") if name not in values]
        if missing:
            raise ValueError(f"a generation lacks {', '.join(missing)}: it has {sorted(values)}.")
        text = {name: str(values[name]) for name in ("question", "answer", "target", "unlearned")}
        reference = values.get("reference")
        return cls(**text, reference=None if reference is None else str(reference), part=values["part"])


@dataclass(frozen=True, kw_only=True)
class Results:
    """Everything a run found, and everything needed to repeat it: the content of results.json.

    Args:
        method (`str`): name of the method, for example "primal-dual".
        target ([`ModelScores`]): the model before unlearning.
        unlearned ([`ModelScores`]): the model after unlearning.
        reference ([`ModelScores`], *optional*): the retain-only model; None where there is none.
        forget_quality (`float`, *optional*): p-value of the two-sample KS test between the truth ratios of the
            unlearned and of the reference model, in [0, 1]; None where there is no reference.
        forget_quality_log10 (`float`, *optional*): its log10, computed from `forget_quality` by default.
        constraints (`tuple[ConstraintOutcome, ...]`, *optional*): empty for methods without constraints.
        seconds (`Mapping[str, float]`): seconds by phase, with "total" among them.
        versions (`Mapping[str, str]`): see [`library_versions`].
        settings (`Mapping[str, Any]`, *optional*): what the run was asked to do; credentials are masked.
        seed (`int`, *optional*): the seed of the run.
        generations (`tuple[Generation, ...]`, *optional*): answers side by side.
        history (`tuple[dict, ...]`, *optional*): the trainer's log dicts, as in `trainer.state.log_history`.
        truth_ratios (`Mapping[str, tuple[float, ...]]`, *optional*): truth ratio of each forget row for "target",
            "unlearned" and "reference", unitless; what `forget_quality` is computed from.
        forget_level (`float`, *optional*): the mean NLL in nats at which forgetting stops.
        model (`str`, *optional*): name of the model. dataset (`str`, *optional*): name of the data.
        absent (`Mapping[str, str]`, *optional*): why a metric is missing, by name of the metric.
        extra (`Mapping[str, Any]`, *optional*): further top-level entries of the file, kept as they are.
        schema_version (`int`, defaults to 1): version of this layout.
    """

    method: str
    target: ModelScores
    unlearned: ModelScores
    reference: ModelScores | None
    forget_quality: float | None
    seconds: Mapping[str, float]
    versions: Mapping[str, str]
    forget_quality_log10: float | None = None
    constraints: tuple[ConstraintOutcome, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    generations: tuple[Generation, ...] = ()
    history: tuple[Mapping[str, Any], ...] = ()
    truth_ratios: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    forget_level: float | None = None
    model: str = ""
    dataset: str = ""
    absent: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if self.schema_version > SCHEMA_VERSION:
            raise ValueError(
                f"results of schema version {self.schema_version} were given, this library knows versions up to "
                f"{SCHEMA_VERSION}: upgrade hf-unlearn to read them."
            )
        if self.forget_quality is not None:
            quality = to_number(self.forget_quality, "forget_quality")
            if not (math.isnan(quality) or 0.0 <= quality <= 1.0):
                raise ValueError(f"`forget_quality` is a p-value and must lie in [0, 1], got {quality}.")
            object.__setattr__(self, "forget_quality", quality)
            if self.forget_quality_log10 is None:
                log10 = math.log10(quality) if quality > 0 else (-math.inf if quality == 0 else math.nan)
                object.__setattr__(self, "forget_quality_log10", log10)
        for name in ("forget_quality_log10", "forget_level"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, to_number(getattr(self, name), name))
        seconds = {str(key): to_number(value, f"seconds.{key}") for key, value in self.seconds.items()}
        if "total" not in seconds:
            raise ValueError(f"`seconds` must have a 'total' among its phases, got {sorted(seconds)}.")
        unknown = sorted(set(self.truth_ratios) - set(SUBJECTS))
        if unknown:
            raise ValueError(f"`truth_ratios` has entries for {unknown}, expected some of {list(SUBJECTS)}.")
        ratios = {
            key: tuple(to_number(value, f"truth_ratios.{key}") for value in values)
            for key, values in self.truth_ratios.items()
        }
        object.__setattr__(self, "seconds", seconds)
        object.__setattr__(self, "truth_ratios", ratios)
        object.__setattr__(self, "versions", {str(key): str(value) for key, value in self.versions.items()})
        object.__setattr__(self, "settings", mask_secrets(to_plain(self.settings)))
        object.__setattr__(self, "history", tuple(to_plain(entry) for entry in self.history))
        object.__setattr__(self, "extra", to_plain(self.extra))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Results:
        """Results from nested plain values, as in the file.

        Raises:
            ValueError: if a required entry is missing, or a value is outside its range.
            TypeError: if an entry has the wrong type.
        """
        values = dict(_mapping(values, "results"))
        required = ("method", "target", "unlearned", "reference", "forget_quality", "seconds", "versions")
        missing = [name for name in required if name not in values]
        if missing:
            raise ValueError(
                f"results lack {', '.join(missing)}: the entries given are {sorted(values)}. `reference` and "
                "`forget_quality` may be None where there is no retain-only model."
            )
        for name in map(str, SUBJECTS):
            if not isinstance(values[name], ModelScores) and not (name == "reference" and values[name] is None):
                values[name] = ModelScores.from_dict(values[name], name)
        values["constraints"] = tuple(
            row if isinstance(row, ConstraintOutcome) else ConstraintOutcome.from_dict(row)
            for row in _rows(values, "constraints")
        )
        values["generations"] = tuple(
            row if isinstance(row, Generation) else Generation.from_dict(row) for row in _rows(values, "generations")
        )
        values["history"] = tuple(_rows(values, "history"))
        for name in ("seconds", "versions", "settings", "truth_ratios", "absent"):
            values[name] = _mapping(values.get(name) or {}, name)
        known = set(cls.__dataclass_fields__) - {"extra"}
        extra = {**values.pop("extra", {}), **{key: values.pop(key) for key in list(values) if key not in known}}
        return cls(**values, extra=extra)

    def as_dict(self) -> dict[str, Any]:
        """Nested plain values in the order of the file; NaN and infinities are still floats here."""
        return {
            "schema_version": self.schema_version,
            "method": self.method,
            "model": self.model,
            "dataset": self.dataset,
            "seed": self.seed,
            **{name: scores and scores.as_dict() for name, scores in self.scores().items()},
            "forget_quality": self.forget_quality,
            "forget_quality_log10": self.forget_quality_log10,
            "forget_level": self.forget_level,
            "absent": dict(self.absent),
            "constraints": [to_plain(constraint) for constraint in self.constraints],
            "seconds": dict(self.seconds),
            "versions": dict(self.versions),
            "settings": dict(self.settings),
            **self.extra,
            "truth_ratios": {key: list(values) for key, values in self.truth_ratios.items()},
            "generations": [to_plain(generation) for generation in self.generations],
            "history": [dict(entry) for entry in self.history],
        }

    def scores(self) -> dict[Subject, ModelScores | None]:
        """The three models' scores by name, in the order of the tables."""
        return {"target": self.target, "unlearned": self.unlearned, "reference": self.reference}


def as_results(results: Results | Mapping[str, Any]) -> Results:
    """`results` itself, or [`Results`] made of a mapping."""
    return results if isinstance(results, Results) else Results.from_dict(results)


def write_results(path: str | os.PathLike[str], results: Results | Mapping[str, Any]) -> Path:
    """Write results.json in strict JSON, whole or not at all.

    NaN and infinities become null, and `non_finite` in the file says by JSON pointer which they were, so that
    [`read_results`] gives the same values back. The file appears under its name only when it is complete.

    Args:
        path (`str` or `os.PathLike`): the file; folders are made.
        results ([`Results`] or `Mapping`): what to write; a mapping is checked first.

    Returns:
        `Path`: the file.

    Raises:
        OSError: if the folder cannot be written; an earlier file of that name is left as it was.
    """
    path = Path(path)
    plain, non_finite = pull_non_finite(as_results(results).as_dict())
    if non_finite:
        plain["non_finite"] = non_finite
    text = json.dumps(plain, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    return write_text(path, text)


def write_text(path: Path, text: str) -> Path:
    """Write `text` to a temporary neighbour of `path`, then move it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", errors="replace", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def read_results(path: str | os.PathLike[str]) -> Results:
    """Read what [`write_results`] wrote.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no JSON, or not results of a known schema version.
    """
    text = Path(path).read_text(encoding="utf-8")
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}): expected a results.json of hf-unlearn.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, expected the object of a results.json.")
    non_finite = values.pop("non_finite", {})
    try:
        return Results.from_dict(put_non_finite(values, non_finite))
    except (ValueError, TypeError) as error:
        raise type(error)(f"{path}: {error}") from error


def _mapping(values: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(values, Mapping):
        raise TypeError(f"`{where}` must be a mapping, got {values!r} of type {type(values).__name__}.")
    return values


def _rows(values: Mapping[str, Any], name: str) -> Iterable[Any]:
    rows = values.get(name) or ()
    if isinstance(rows, Mapping | str) or not isinstance(rows, Iterable):
        raise TypeError(f"`{name}` must be a list, got {type(rows).__name__}.")
    return rows
