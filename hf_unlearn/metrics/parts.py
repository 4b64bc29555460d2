"""The rows of one part of a TOFU-like benchmark: checked, as texts to score, and as the scores made of their losses.

Shapes: n rows of a part, m texts to score (answers, paraphrases and wrong answers).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_unlearn.metrics.arrays import FloatArray
from hf_unlearn.metrics.functional import log_truth_ratio, normalised_probability, probability, rouge_l_recall
from hf_unlearn.metrics.scores import PartScores

TEXT_COLUMNS = ("question", "answer", "paraphrased_answer", "paraphrased_question")


@dataclass(frozen=True, kw_only=True)
class TofuPart:
    """
    Chosen rows of one part of a benchmark.

    Args:
        rows (`list[dict]`):
            n rows with the columns that are scored.
        normalised (`bool`):
            Whether its probability is p_true / (p_true + sum_k p_wrong_k).
    """

    rows: list[dict[str, Any]]
    normalised: bool

    @property
    def texts(self) -> list[tuple[str, str]]:
        """Questions and answers to score: n answers, then n of each paraphrase there is, then all wrong answers."""
        rows = self.rows
        found = [(row["question"], row["answer"]) for row in rows]
        found += [(row["question"], row["paraphrased_answer"]) for row in rows if "paraphrased_answer" in row]
        found += [(row["paraphrased_question"], row["answer"]) for row in rows if "paraphrased_question" in row]
        found += [(row["question"], wrong) for row in rows for wrong in row.get("perturbed_answer", ())]
        return found

    def scores(self, nll: FloatArray, generations: list[str] | None = None) -> PartScores:
        """
        The part's scores by the definitions of [`evaluate_part`].

        Args:
            nll (`np.ndarray`):
                Mean NLL of each of [`texts`], in nats.
            generations (`list[str]`, *optional*):
                n greedy answers.
        """
        n, first = len(self.rows), self.rows[0]
        answer, rest = nll[:n], nll[n:]
        paraphrased, asked_otherwise = None, None
        if "paraphrased_answer" in first:
            paraphrased, rest = rest[:n], rest[n:]
        if "paraphrased_question" in first:
            asked_otherwise, rest = rest[:n], rest[n:]
        wrong: list[FloatArray] | None = None
        if "perturbed_answer" in first:
            wrong = np.split(rest, np.cumsum([len(row["perturbed_answer"]) for row in self.rows])[:-1])
        correct = answer if paraphrased is None else paraphrased
        normalised = self.normalised and wrong is not None
        return PartScores(
            nll=answer,
            probability=normalised_probability(answer, wrong or []) if normalised else probability(answer),
            log_truth_ratio=None if wrong is None else log_truth_ratio(correct, wrong),
            rouge=None if generations is None else rouge_l_recall(generations, [row["answer"] for row in self.rows]),
            paraphrase_probability=None if asked_otherwise is None else probability(asked_otherwise),
            paraphrased_nll=paraphrased,
            generations=generations,
            fingerprint=fingerprint(self.rows),
        )


def evenly_spaced(n: int, limit: int | None) -> list[int]:
    """
    Numbers of at most `limit` of n rows at equal distances, the same ones every time; all rows without a limit.

    Neighbouring rows of TOFU are about one author, so the first rows would be about few of them.

    Raises:
        ValueError: `limit` is below 1.
    """
    if limit is None:
        return list(range(n))
    if limit < 1:
        raise ValueError(f"limit is {limit}; expected None or at least 1.")
    kept = min(limit, n)
    return [index * n // kept for index in range(kept)]


def checked_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """
    The rows with the columns that are used, each of which all rows have.

    Raises:
        ValueError: no rows, a missing or partly filled column, an empty list of wrong answers, or an `index` that
            several rows have.
        TypeError: a column with something other than text.
    """
    if not rows:
        raise ValueError("There are no rows to evaluate; expected at least one.")
    _check_index(rows)
    kept = [
        {
            name: row[name]
            for name in (*TEXT_COLUMNS, "perturbed_answer")
            if name in row and row[name] is not None  # a Dataset fills the gaps of a column with None
        }
        for row in rows
    ]
    for name in (*TEXT_COLUMNS, "perturbed_answer"):
        without = [number for number, row in enumerate(kept) if name not in row]
        if without and (name in ("question", "answer") or len(without) < len(kept)):
            raise ValueError(
                f"Row {without[0]} has no `{name}` ({len(without)} of {len(kept)} rows have none). Every row needs "
                "`question` and `answer`; other columns belong to all rows or to none."
            )
        for number, row in enumerate(kept):
            if name in row:
                _check_text(number, name, row[name])
    return kept


def _check_index(rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows that bring numbers have one each: a row that counts twice would weigh double, and be taken for two."""
    seen: dict[Any, int] = {}
    for number, row in enumerate(rows):
        index = row.get("index")
        if not isinstance(index, (int, str)):
            continue
        if index in seen:
            raise ValueError(
                f"Rows {seen[index]} and {number} both have index {index!r}; expected another one for every row. Drop "
                "what is there twice, or remove the `index` column if it says something else."
            )
        seen[index] = number


def _check_text(number: int, name: str, value: Any) -> None:
    many = name == "perturbed_answer"
    texts = value if many and isinstance(value, (list, tuple)) else [value]
    if (many and isinstance(value, str)) or not all(isinstance(text, str) for text in texts):
        raise TypeError(
            f"`{name}` of row {number} is {value!r:.80}; expected {'a list of strings' if many else 'a string'}."
        )
    if not texts:
        raise ValueError(f"`{name}` of row {number} is empty; expected at least one wrong answer.")


def fingerprint(rows: Sequence[Mapping[str, Any]]) -> str:
    """16 hexadecimal digits over the texts that were scored."""
    text = json.dumps(list(rows), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]
