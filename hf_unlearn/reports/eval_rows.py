"""The rows that are scored again and again during training: checked and tokenised once.

Shapes: n rows of a part, m texts to score (answers, paraphrases and wrong answers of all parts).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..data import tokenize_example, tokenize_prompt
from ..losses import IGNORE_INDEX
from ..metrics.arrays import FloatArray
from ..metrics.generate import padding_id
from ..metrics.parts import TofuPart, checked_rows, evenly_spaced, fingerprint
from ..metrics.scores import FORGET, RETAIN, PartScores, TofuScores

Limits = int | Mapping[str, int | None] | None


class EvalRows:
    """
    Some rows of TOFU-like parts, the same ones at every evaluation.

    Args:
        parts (`Mapping[str, Dataset or Sequence[Mapping]]`):
            `"forget"`, `"retain"` and general parts by name; rows as for [`evaluate_part`].
        limits (`int` or `Mapping[str, int | None]`, *optional*):
            Rows of each part, evenly spaced; by name, a part without one is scored whole.

    Raises:
        TypeError: a part that is no dataset or list of rows, or a column with something other than text.
        ValueError: a part without rows or columns, limits below 1, or limits of parts that are not there.
    """

    def __init__(self, parts: Mapping[str, Any], limits: Limits) -> None:
        by_name = dict.fromkeys(parts, limits) if not isinstance(limits, Mapping) else dict(limits)
        unknown = sorted(set(by_name) - set(parts))
        if unknown:
            raise ValueError(f"limits names {unknown}, but the parts are {sorted(parts)}.")
        self.parts: dict[str, TofuPart] = {}
        for name, rows in parts.items():
            if not hasattr(rows, "__len__") or not hasattr(rows, "__getitem__") or isinstance(rows, str | Mapping):
                raise TypeError(
                    f"The {name} part is a {type(rows).__name__}; expected a Dataset or a list of rows with "
                    "`question` and `answer` (a stream or a DatasetDict is neither: take one split of it)."
                )
            limit = by_name.get(name)
            if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int)):
                raise TypeError(f"The limit of the {name} part is {limit!r}; expected a whole number or None.")
            try:
                chosen = checked_rows([rows[index] for index in evenly_spaced(len(rows), limit)])
            except (TypeError, ValueError) as error:
                raise type(error)(f"The {name} part: {error}") from error
            general = name not in (FORGET, RETAIN)
            if general and "perturbed_answer" not in chosen[0]:
                raise ValueError(
                    f"The {name} part has no `perturbed_answer` (its rows have {sorted(chosen[0])}), which the "
                    "normalised probability of a general part needs. Use a *_perturbed split, or leave the part out."
                )
            self.parts[name] = TofuPart(rows=chosen, normalised=general)
        self._forget, self._forget_limit = parts[FORGET], by_name.get(FORGET)

    def scores(self, nll: FloatArray, answers: Sequence[str] | None = None) -> TofuScores:
        """All scores, from the mean NLL `(m,)` of all texts and the greedy answers to all questions."""
        found, texts, rows = {}, 0, 0
        for name, part in self.parts.items():
            mine = nll[texts : texts + len(part.texts)]
            generations = None if answers is None else list(answers[rows : rows + len(part.rows)])
            found[name] = part.scores(mine, generations)
            texts, rows = texts + len(mine), rows + len(part.rows)
        return TofuScores(parts=found)

    def example(self, *, generate: bool) -> TofuScores:
        """Scores of a model that finds everything equally likely: they have the names of all scores to come."""
        texts = sum(len(part.texts) for part in self.parts.values())
        rows = sum(len(part.rows) for part in self.parts.values())
        return self.scores(np.full(texts, np.log(2.0)), [""] * rows if generate else None)

    def matching(self, reference: TofuScores) -> TofuScores:
        """A reference that was scored on the whole forget set, cut to the rows that are scored here."""
        theirs, chosen = reference.parts[FORGET], self.chosen_of(reference.parts[FORGET])
        if chosen is None:
            return reference
        cut = theirs.take(chosen, fingerprint=fingerprint(self.parts[FORGET].rows))
        return TofuScores(parts={**reference.parts, FORGET: cut})

    def chosen_of(self, theirs: PartScores) -> list[int] | None:
        """Numbers of the forget rows scored here among those of the whole set; None if `theirs` are not the whole."""
        whole = len(self._forget)
        chosen = evenly_spaced(whole, self._forget_limit)
        if len(chosen) == whole or len(theirs.nll) != whole:
            return None
        known = fingerprint(checked_rows([self._forget[index] for index in range(whole)]))
        return chosen if theirs.fingerprint in ("", known) else None  # of other rows, which comparing refuses

    def tokenized(self, tokenizer: Any, *, max_length: int) -> EncodedRows:
        """
        The rows as token ids.

        Raises:
            ValueError: an answer of which `max_length` leaves nothing, or a tokenizer without anything to pad with.
        """
        texts, longest = [], 0
        for name, part in self.parts.items():
            for question, answer in part.texts:
                row = tokenize_example({"question": question, "answer": answer}, tokenizer)
                longest = max(longest, len(row["input_ids"]))
                row = {key: row[key][:max_length] for key in ("input_ids", "labels")}
                if all(label == IGNORE_INDEX for label in row["labels"][1:]):
                    raise ValueError(
                        f"The {name} part: no token of the answer {answer!r:.60} to {question!r:.60} is left within "
                        f"max_length={max_length} tokens. Raise max_length, or drop the row."
                    )
                texts.append(row)
        prompts = [
            tokenize_prompt({key: row[key] for key in ("question", "answer")}, tokenizer)
            for part in self.parts.values()
            for row in part.rows
        ]
        return EncodedRows(
            texts=texts, prompts=prompts, pad_token_id=padding_id(tokenizer), longest=longest, max_length=max_length
        )


@dataclass(frozen=True, kw_only=True)
class EncodedRows:
    """
    Token ids of [`EvalRows`].

    Args:
        texts (`list[dict]`): m rows of `input_ids` and `labels`.
        prompts (`list[list[int]]`): prompts of all rows of all parts.
        pad_token_id (`int`): id to pad with.
        longest (`int`): tokens of the longest text before it was cut.
        max_length (`int`): tokens after which texts were cut.
    """

    texts: list[dict[str, list[int]]]
    prompts: list[list[int]]
    pad_token_id: int
    longest: int
    max_length: int
