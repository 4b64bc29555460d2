"""What a TOFU evaluation leaves in its folder, and what another one reads of it as its reference.

Shapes: n forget rows, m holdout rows.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..metrics.arrays import FloatArray
from ..metrics.scores import FORGET, TofuScores
from ..reports.schema import write_text
from .record import FILE, Evaluation

SCORES_FILE, DETAILS_FILE, EXAMPLES_FILE = "scores.json", "details.json", "examples.json"
DETAILS_FORMAT, DETAILS_VERSION = "hf_unlearn.tofu_details", 1
ATTACKS = ("loss", "zlib", "min_k", "min_k_plus_plus")


@dataclass(frozen=True, kw_only=True, eq=False)
class ForgetDetails:
    """
    Memorisation and membership scores of single rows, from the response tokens of their answers.

    Args:
        exact_memorization, extraction_strength (`np.ndarray`): `(n,)`, of the forget rows, in [0, 1].
        membership (`Mapping[str, np.ndarray]`): `(n,)` of the forget rows by attack, high for what was not seen.
        holdout (`Mapping[str, np.ndarray]`, *optional*): `(m,)` of the holdout rows by attack; empty without any.
        fingerprint, holdout_fingerprint (`str`, *optional*): hashes of the rows' texts.
    """

    exact_memorization: FloatArray
    extraction_strength: FloatArray
    membership: Mapping[str, FloatArray]
    holdout: Mapping[str, FloatArray]
    fingerprint: str = ""
    holdout_fingerprint: str = ""

    def take(self, numbers: Sequence[int], *, fingerprint: str) -> ForgetDetails:
        """Those of some of the forget rows, by their numbers, under the fingerprint of those rows."""
        chosen = list(numbers)
        return ForgetDetails(
            exact_memorization=self.exact_memorization[chosen],
            extraction_strength=self.extraction_strength[chosen],
            membership={name: values[chosen] for name, values in self.membership.items()},
            holdout=self.holdout,
            fingerprint=fingerprint,
            holdout_fingerprint=self.holdout_fingerprint,
        )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes them as JSON; floats read back as the same values."""
        content = {
            "format": DETAILS_FORMAT,
            "version": DETAILS_VERSION,
            "exact_memorization": _plain(self.exact_memorization),
            "extraction_strength": _plain(self.extraction_strength),
            "membership": {name: _plain(values) for name, values in self.membership.items()},
            "holdout": {name: _plain(values) for name, values in self.holdout.items()},
            "fingerprint": self.fingerprint,
            "holdout_fingerprint": self.holdout_fingerprint,
        }
        return write_text(Path(path), json.dumps(content, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ForgetDetails:
        """
        Reads what [`ForgetDetails.save`] wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is something else, or of another version.
        """
        content = _read(Path(path))
        if not isinstance(content, dict) or content.get("format") != DETAILS_FORMAT:
            raise ValueError(f"{path} holds no details of a TOFU evaluation; expected the {DETAILS_FILE} of one.")
        if content.get("version") != DETAILS_VERSION:
            raise ValueError(
                f"{path} has version {content.get('version')!r}; this code reads {DETAILS_VERSION}. Evaluate again."
            )
        return cls(
            exact_memorization=_array(content["exact_memorization"]),
            extraction_strength=_array(content["extraction_strength"]),
            membership={name: _array(values) for name, values in content["membership"].items()},
            holdout={name: _array(values) for name, values in content["holdout"].items()},
            fingerprint=content["fingerprint"],
            holdout_fingerprint=content["holdout_fingerprint"],
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class TofuEvaluation:
    """
    A TOFU evaluation of one model: its numbers, and the rows they are made of.

    Args:
        evaluation ([`Evaluation`]): metrics with uncertainty, absent ones with reasons, settings, versions, hash.
        scores ([`TofuScores`]): of every row of every part.
        details ([`ForgetDetails`], *optional*): None where the weights are sharded.
        examples (`tuple[dict[str, str], ...]`, *optional*):
            Some rows as `part` ("forget" or "retain"), `question`, `answer` and `generated`; empty without answers.
    """

    evaluation: Evaluation
    scores: TofuScores
    details: ForgetDetails | None = None
    examples: tuple[Mapping[str, str], ...] = ()

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Writes scores.json, details.json, examples.json, and evaluation.json last: where it is, all are."""
        folder = Path(folder)
        for stale in (FILE, DETAILS_FILE):  # of another model, which these scores must not be taken for
            (folder / stale).unlink(missing_ok=True)
        self.scores.save(folder / SCORES_FILE)
        if self.details is not None:
            self.details.save(folder / DETAILS_FILE)
        examples = [dict(example) for example in self.examples]
        write_text(folder / EXAMPLES_FILE, json.dumps(examples, indent=1, ensure_ascii=False) + "\n")
        return self.evaluation.save(folder)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> TofuEvaluation:
        """
        Reads what [`TofuEvaluation.save`] wrote.

        Raises:
            FileNotFoundError: evaluation.json or scores.json is not there.
            ValueError: one of the files is something else, or of another benchmark.
        """
        folder = Path(folder)
        evaluation = Evaluation.load(folder / FILE)
        if evaluation.benchmark not in ("tofu", "rows"):
            raise ValueError(
                f"{folder} holds an evaluation on {evaluation.benchmark!r}; expected one on 'tofu' or on 'rows'."
            )
        details, examples = folder / DETAILS_FILE, folder / EXAMPLES_FILE
        return cls(
            evaluation=evaluation,
            scores=TofuScores.load(folder / SCORES_FILE),
            details=ForgetDetails.load(details) if details.is_file() else None,
            examples=tuple(_read(examples)) if examples.is_file() else (),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class TofuReference:
    """
    What an evaluation is compared with: a retain-only model's scores.

    Args:
        scores ([`TofuScores`]): of the same forget rows, or of all of which those are some.
        details ([`ForgetDetails`], *optional*): without them there are no PrivLeak, closeness and privacy score.
        name (`str`, *optional*): model or path, for the record.
        settings (`Mapping[str, Any]`, *optional*): of its evaluation; empty where that is not known.
    """

    scores: TofuScores
    details: ForgetDetails | None = None
    name: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """16 hexadecimal digits over the scores that are compared: whether two evaluations had the same reference."""
        part = self.scores.parts[FORGET]
        columns = [part.nll, part.log_truth_ratio]
        if self.details is not None:
            columns += [*self.details.membership.values(), *self.details.holdout.values()]
        plain = [None if values is None else _plain(values) for values in columns]
        return hashlib.sha256(json.dumps(plain).encode()).hexdigest()[:16]


def load_reference(path: str | os.PathLike[str]) -> TofuReference:
    """
    A retain-only model's logs: the folder of its TOFU evaluation, or a scores.json alone.

    Raises:
        FileNotFoundError: there is neither.
        ValueError: the file is something else.
    """
    path = Path(path)
    folder, file = (path, path / SCORES_FILE) if path.is_dir() else (path.parent, path)
    if not file.is_file():
        raise FileNotFoundError(
            f"{path} holds no {SCORES_FILE}; expected the folder of the retain-only model's TOFU evaluation, or its "
            "scores.json. Evaluate that model first."
        )
    # what lies beside a file that was copied here under another name may be of another evaluation
    details, evaluation = (folder / name for name in (DETAILS_FILE, FILE))
    own = file.name == SCORES_FILE
    return TofuReference(
        scores=TofuScores.load(file),
        details=ForgetDetails.load(details) if own and details.is_file() else None,
        name=str(path),
        settings=Evaluation.load(evaluation).settings if own and evaluation.is_file() else {},
    )


def _plain(values: FloatArray) -> list[float | str]:
    return [value if math.isfinite(value) else str(value) for value in values.tolist()]


def _array(values: Sequence[float | str]) -> FloatArray:
    return np.array([float(value) for value in values], dtype=np.float64)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); expected what a TOFU evaluation wrote.") from error
