"""An edit's words in results.json: how likely each is in each model, as the edited questions and others ask for it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal, get_args

from .plain import to_number
from .schema import SUBJECTS, Results

Wording = Literal["own", "reworded"]
WORDINGS: dict[Wording, str] = {"own": "questions as edited", "reworded": "questions reworded"}


@dataclass(frozen=True, kw_only=True)
class Words:
    """
    Probabilities of the words that an edit was to make unreachable. The words themselves are not kept.

    Args:
        wanted (`float`): the most that a word may have where the edit constrains it.
        probabilities (`Mapping[str, Mapping[str, tuple[float, ...]]]`): for `"own"` (the questions that the edit was
            made for) and `"reworded"` (the same questions in other words, which nothing guarantees), for "target",
            "unlearned" and "reference": the probability of each word where an answer says it.
    """

    wanted: float
    probabilities: Mapping[Wording, Mapping[str, tuple[float, ...]]]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Words:
        """
        From plain values, as in the file.

        Raises:
            ValueError: an entry is missing, or a wording or a model is unknown.
        """
        missing = [name for name in ("wanted", "probabilities") if name not in values]
        if missing:
            raise ValueError(f"`words` lacks {', '.join(missing)}: it has {sorted(values)}.")
        found: dict[Wording, dict[str, tuple[float, ...]]] = {}
        for wording, models in values["probabilities"].items():
            unknown = sorted(set(models) - set(SUBJECTS))
            if wording not in get_args(Wording) or unknown:
                raise ValueError(
                    f"`words.probabilities` has {wording!r} with {sorted(models)}; expected some of "
                    f"{list(WORDINGS)}, each with some of {list(SUBJECTS)}."
                )
            found[wording] = {
                name: tuple(to_number(value, f"words.{wording}.{name}") for value in numbers)
                for name, numbers in models.items()
            }
        return cls(wanted=to_number(values["wanted"], "words.wanted"), probabilities=found)

    def largest(self, wording: Wording, subject: str) -> float | None:
        """The largest probability of a word, NaN if one of them is, or None where none was measured."""
        found = self.probabilities.get(wording, {}).get(subject, ())
        return math.nan if any(map(math.isnan, found)) else max(found, default=None)

    def scores(self, subject: str) -> dict[str, float]:
        """Largest and median probability for each wording, under the names that the tables know."""
        values: dict[str, float] = {}
        for wording, models in self.probabilities.items():
            if models.get(subject):
                prefix = "words" if wording == "own" else "words_reworded"
                values[f"{prefix}_largest_probability"] = max(models[subject])
                values[f"{prefix}_median_probability"] = median(models[subject])
        return values


def words_of(results: Results) -> Words | None:
    """The entry `words` of results, which runs of edits have and others have not."""
    values = results.extra.get("words")
    return None if values is None else Words.from_dict(values)
