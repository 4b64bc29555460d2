"""What an evaluation found, row by row, and the numbers that TOFU makes of it.

Shapes: n rows of a part.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from hf_unlearn.metrics.arrays import FloatArray
from hf_unlearn.metrics.membership import mia_auc
from hf_unlearn.metrics.probability import probability
from hf_unlearn.metrics.truth_ratio import (
    forget_quality,
    forget_quality_log10,
    forget_truth_ratio,
    retain_truth_ratio,
)
from hf_unlearn.metrics.utility import model_utility

FORMAT = "hf_unlearn.tofu_scores"
FORMAT_VERSION = 1
FORGET, RETAIN = "forget", "retain"


@dataclass(frozen=True, kw_only=True, eq=False)
class PartScores:
    """
    Per-row scores of one part of a benchmark, all in the order of its rows.

    Args:
        nll (`np.ndarray`): `(n,)`, mean of -log p over the tokens of the answer, in nats.
        probability (`np.ndarray`):
            `(n,)`, exp(-NLL), or p_true / (p_true + sum_k p_wrong_k) where the part was scored as normalised.
        log_truth_ratio (`np.ndarray`, *optional*):
            `(n,)`, natural logarithm of [`truth_ratio`]; finite also where the ratio over- or underflows.
        rouge (`np.ndarray`, *optional*): `(n,)`, ROUGE-L recall of the greedy answer.
        paraphrase_probability (`np.ndarray`, *optional*):
            `(n,)`, exp(-NLL) of the answer after the paraphrased question.
        paraphrased_nll (`np.ndarray`, *optional*):
            `(n,)`, NLL of the paraphrased answer after the plain question, in nats.
        generations (`list[str]`, *optional*): n greedy answers.
        fingerprint (`str`, *optional*, defaults to `""`):
            Hash of the texts that were scored; comparisons refuse two parts whose hashes differ.
    """

    nll: FloatArray
    probability: FloatArray
    log_truth_ratio: FloatArray | None = None
    rouge: FloatArray | None = None
    paraphrase_probability: FloatArray | None = None
    paraphrased_nll: FloatArray | None = None
    generations: list[str] | None = None
    fingerprint: str = ""

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, str) or value is None:
                continue
            if len(value) != len(self.nll):
                raise ValueError(
                    f"`{item.name}` has {len(value)} entries and `nll` {len(self.nll)}; expected one a row."
                )

    @property
    def truth_ratio(self) -> FloatArray | None:
        """`(n,)`, wrong / correct (TOFU, arXiv 2401.06121), infinite where it overflows."""
        if self.log_truth_ratio is None:
            return None
        with np.errstate(over="ignore"):
            return np.exp(self.log_truth_ratio)

    @property
    def plain_probability(self) -> FloatArray:
        """`(n,)`, exp(-NLL) of the answer, never normalised."""
        return probability(self.nll)

    def take(self, numbers: Sequence[int], *, fingerprint: str = "") -> PartScores:
        """The scores of some of the rows, by their numbers, under the fingerprint of those rows."""
        kept: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, np.ndarray):
                kept[item.name] = value[list(numbers)]
            elif isinstance(value, list):
                kept[item.name] = [value[number] for number in numbers]
        return PartScores(**kept, fingerprint=fingerprint)


@dataclass(frozen=True, kw_only=True, eq=False)
class TofuScores:
    """
    Scores of one model on TOFU's parts (arXiv 2401.06121).

    Args:
        parts (`Mapping[str, PartScores]`):
            `"forget"`, `"retain"`, and any number of general parts (`"real_authors"`, `"world_facts"`).
    """

    parts: Mapping[str, PartScores]

    def __post_init__(self) -> None:
        missing = [name for name in (FORGET, RETAIN) if name not in self.parts]
        if missing:
            raise ValueError(f"parts lacks {' and '.join(missing)}, it has {sorted(self.parts)}.")

    def summary(self) -> dict[str, float]:
        """
        Means over rows, by name; a score whose columns or generations are missing is left out.

        * `forget_probability`, `forget_rouge`, `forget_truth_ratio` (mean of min(TR, 1/TR)), `forget_nll`,
          `forget_paraphrased_question_probability`;
        * `retain_probability`, `retain_rouge`, `retain_truth_ratio` (mean of max(0, 1 - TR));
        * `<general>_probability` (normalised), `<general>_plain_probability`, `<general>_rouge`,
          `<general>_truth_ratio` (as for retain);
        * `model_utility`: harmonic mean of probability, ROUGE and truth ratio over retain and the general parts. Left
          out unless each of these parts has all three: a mean of fewer is another quantity.
        """
        values: dict[str, float] = {}
        utility: dict[str, float] = {}
        for name, part in self.parts.items():
            scores = {"probability": float(part.probability.mean())}
            if part.rouge is not None:
                scores["rouge"] = float(part.rouge.mean())
            if part.truth_ratio is not None:
                aggregate = forget_truth_ratio if name == FORGET else retain_truth_ratio
                scores["truth_ratio"] = aggregate(part.truth_ratio)
            values.update({f"{name}_{key}": value for key, value in scores.items()})
            if name == FORGET:
                values["forget_nll"] = float(part.nll.mean())
                if part.paraphrase_probability is not None:
                    values["forget_paraphrased_question_probability"] = float(part.paraphrase_probability.mean())
                continue
            if name != RETAIN:
                values[f"{name}_plain_probability"] = float(part.plain_probability.mean())
            utility.update({f"{name}_{key}": value for key, value in scores.items()})
        if len(utility) == 3 * (len(self.parts) - 1):
            values["model_utility"] = model_utility(utility)
        return values

    def forget_quality_against(self, reference: TofuScores) -> float:
        """
        Forget quality: p-value of the two-sided Kolmogorov-Smirnov test between the truth ratios of the forget rows
        under this model and under the retain-only `reference`. Above 0.05 the two cannot be told apart.

        Raises:
            ValueError: a model was scored without truth ratios, or on other forget rows.
        """
        return forget_quality(*self._forget_ratios(reference))

    def forget_quality_log10_against(self, reference: TofuScores) -> float:
        """Decimal logarithm of [`forget_quality_against`], also where the p-value underflows."""
        return forget_quality_log10(*self._forget_ratios(reference))

    def mia_auc_against(self, reference: TofuScores) -> float:
        """
        AUC with which the loss of a forget row tells this model from the retain-only `reference`.

        It is the probability that a forget row drawn under this model has a higher NLL than one drawn under the
        reference, ties counting half. 0.5: indistinguishable. Above 0.5: the rows are *less* likely than for a model
        that never saw them, they are over-forgotten. Below 0.5: they are still remembered.

        Raises:
            ValueError: the reference was scored on other forget rows.
        """
        self._same_forget_rows(reference)
        return mia_auc(reference.parts[FORGET].nll, self.parts[FORGET].nll)

    def save(self, path: str | Path) -> None:
        """Writes all per-row scores as JSON; folders are made, and floats read back as the same values."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "parts": {name: _to_plain(part) for name, part in self.parts.items()},
        }
        # a killed run leaves no half-written reference under the name that the next run looks for
        scratch = path.with_name(f".{path.name}.part")
        scratch.write_text(json.dumps(content, ensure_ascii=False, allow_nan=False), encoding="utf-8")
        scratch.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> TofuScores:
        """
        Reads what [`TofuScores.save`] wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is something else, or of another version.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON ({error}); expected what TofuScores.save wrote.") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"{path} holds no TOFU scores; expected a file that TofuScores.save wrote.")
        if content.get("version") != FORMAT_VERSION:
            raise ValueError(
                f"{path} has version {content.get('version')!r}; this code reads {FORMAT_VERSION}. Evaluate again."
            )
        return cls(parts={name: _from_plain(part) for name, part in content["parts"].items()})

    def _forget_ratios(self, reference: TofuScores) -> tuple[FloatArray, FloatArray]:
        """Logarithms: the test uses ranks only, and ratios that overflow would all be tied."""
        self._same_forget_rows(reference)
        own, other = self.parts[FORGET].log_truth_ratio, reference.parts[FORGET].log_truth_ratio
        if own is None or other is None:
            raise ValueError(
                f"Forget quality needs truth ratios, but the {'reference' if other is None else 'model'} was scored "
                "on forget rows without `perturbed_answer`. Evaluate on a split that has it (forget10_perturbed)."
            )
        return own, other

    def _same_forget_rows(self, reference: TofuScores) -> None:
        own, other = self.parts[FORGET], reference.parts[FORGET]
        known = own.fingerprint and other.fingerprint
        if len(own.nll) != len(other.nll) or (known and own.fingerprint != other.fingerprint):
            raise ValueError(
                f"The two models were scored on different forget rows ({len(own.nll)} and {len(other.nll)} rows, "
                f"fingerprints {own.fingerprint!r} and {other.fingerprint!r}). Questions differ in difficulty: "
                "evaluate the reference on the same rows."
            )


def _to_plain(part: PartScores) -> dict[str, Any]:
    values = {item.name: getattr(part, item.name) for item in fields(part)}
    return {name: _numbers(value) if isinstance(value, np.ndarray) else value for name, value in values.items()}


def _numbers(values: FloatArray) -> list[float | str]:
    """A destroyed model's losses may be infinite, which strict JSON has as text only; float() reads both."""
    return [value if math.isfinite(value) else str(value) for value in values.tolist()]


def _from_plain(values: Mapping[str, Any]) -> PartScores:
    texts = ("generations", "fingerprint")
    numbers = {
        name: None if value is None else np.array([float(entry) for entry in value], dtype=np.float64)
        for name, value in values.items()
        if name not in texts
    }
    read: dict[str, Any] = {**numbers, **{name: values[name] for name in texts}}
    return PartScores(**read)
