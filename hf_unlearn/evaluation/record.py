"""evaluation.json: what a benchmark says of one model, with uncertainty, settings, versions and the model's hash."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..reports.plain import mask_secrets, pull_non_finite, put_non_finite, to_plain
from ..reports.schema import write_text

FORMAT, FORMAT_VERSION = "hf_unlearn.evaluation", 1
FILE = "evaluation.json"


@dataclass(frozen=True, kw_only=True)
class MetricValue:
    """
    A metric of one model.

    Args:
        value (`float`): the number; infinite where it diverges, never NaN (a metric that could not be computed is
            absent, with its reason).
        n (`int`): rows that it is over.
        standard_error (`float`, *optional*): by bootstrap over rows; None for a single row, or where it has no meaning
            (a p-value).
        low, high (`float`, *optional*): 95% percentile interval of the same resamples.
        higher_is_better (`bool`, *optional*): None where the best value is that of a retain-only model, or 0.5.
        unit (`str`, *optional*, defaults to `""`): "nats", or empty for a share or a ratio.
    """

    value: float
    n: int
    standard_error: float | None = None
    low: float | None = None
    high: float | None = None
    higher_is_better: bool | None = None
    unit: str = ""

    def __post_init__(self) -> None:
        if math.isnan(self.value):
            raise ValueError("A metric's value is NaN; leave the metric out and say why in `absent`.")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """
    What one benchmark says of one model: the content of evaluation.json.

    Args:
        benchmark (`str`): "tofu", "muse", "wmdp", "mmlu", "multiple_choice", "rows".
        model (`str`): its name or path.
        model_hash (`str`, *optional*): SHA-256 over the weights, see [`model_hash`]; None where it could not be taken.
        metrics (`Mapping[str, MetricValue]`): by name.
        absent (`Mapping[str, str]`): metrics that could not be computed, with the reason.
        settings (`Mapping[str, Any]`): everything that changes a number; credentials are masked.
        versions (`Mapping[str, str]`): see [`library_versions`].
        seconds (`Mapping[str, float]`): wall time by phase, with "total".
        rows (`Mapping[str, str]`): by part, the file with the scores of single rows, relative to the folder.
    """

    benchmark: str
    model: str
    metrics: Mapping[str, MetricValue]
    model_hash: str | None = None
    absent: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    rows: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        both = sorted(set(self.metrics) & set(self.absent))
        if both:
            raise ValueError(f"{both} are among the metrics and absent; expected each in one of them.")
        object.__setattr__(self, "settings", mask_secrets(to_plain(self.settings)))

    def values(self) -> dict[str, float]:
        """Metric by name, without its uncertainty."""
        return {name: metric.value for name, metric in self.metrics.items()}

    def standard_errors(self) -> dict[str, float]:
        """Standard error by name, of the metrics that have one."""
        found = {name: metric.standard_error for name, metric in self.metrics.items()}
        return {name: error for name, error in found.items() if error is not None}

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Writes evaluation.json into `folder`, in strict JSON, whole or not at all."""
        content = {"format": FORMAT, "version": FORMAT_VERSION, **to_plain(self)}
        plain, non_finite = pull_non_finite(content)
        if non_finite:
            plain["non_finite"] = non_finite
        text = json.dumps(plain, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
        return write_text(Path(folder) / FILE, text)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Evaluation:
        """
        Reads what [`Evaluation.save`] wrote.

        Args:
            path (`str` or `os.PathLike`): the file, or its folder.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is something else, or of another version.
        """
        path = Path(path)
        path = path / FILE if path.is_dir() else path
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON ({error}); expected an evaluation.json of hf-unlearn.") from error
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise ValueError(f"{path} holds no evaluation; expected an evaluation.json of hf-unlearn.")
        if values.get("version") != FORMAT_VERSION:
            raise ValueError(f"{path} has version {values.get('version')!r}; this code reads {FORMAT_VERSION}.")
        try:
            put_non_finite(values, values.pop("non_finite", {}))
            metrics = {name: MetricValue(**_known(MetricValue, one)) for name, one in values["metrics"].items()}
            return cls(**{**_known(cls, values), "metrics": metrics})
        except (KeyError, TypeError, AttributeError, IndexError) as error:  # a file that was edited by hand
            raise ValueError(
                f"{path} is no complete evaluation ({error!r}); expected what hf-unlearn wrote. Evaluate again."
            ) from error


def _known(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that this code knows: later code of the same version may add some."""
    names = {item.name for item in fields(kind)}
    return {name: value for name, value in values.items() if name in names}
