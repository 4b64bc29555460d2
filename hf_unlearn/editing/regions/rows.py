"""Rows of the bounded edits: a prompt whose next token counts, or a prompt with a response.

Shapes: F free positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset

from ...losses import IGNORE_INDEX


def check_token_ids(token_ids: Sequence[int] | None, vocabulary: int, name: str = "token_ids") -> tuple[int, ...]:
    """
    The ids in order, each once; none for `None`.

    Raises:
        TypeError: something that is no whole number.
        ValueError: an empty list, or ids that the model does not have.
    """
    if token_ids is None:
        return ()
    if not len(token_ids):
        raise ValueError(f"{name} is empty; expected at least one id, or None to use the responses of the rows.")
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in token_ids):
        raise TypeError(f"{name} is {list(token_ids)!r}; expected whole numbers.")
    unknown = sorted({token for token in token_ids if not 0 <= token < vocabulary})
    if unknown:
        raise ValueError(f"{name} holds {unknown}, but the model's vocabulary has ids 0 to {vocabulary - 1}.")
    return tuple(sorted(set(token_ids)))


def region_rows(rows: Sequence[Mapping[str, Any]], token_ids: Sequence[int], *, free_positions: int = 0) -> Dataset:
    """
    Rows whose labels mark what counts, with room for the free positions.

    Without `token_ids`, that is each row's own response. With them, a row ends with its prompt, and one token more
    whose label marks the place: it is predicted there, and read by nobody.

    Args:
        rows (`Sequence[Mapping]`):
            `input_ids` and `labels`, lists of one length; perhaps `free_at`, the column before which the free
            positions go: 0 to the length of the prompt. By default before the prompt's last token.
        token_ids (`Sequence[int]`):
            Ids whose total probability counts, or none.
        free_positions (`int`, *optional*, defaults to `0`):
            F.

    Returns:
        `Dataset`: `input_ids`, `labels`, `index`, and `free_at` (0 where there are no free positions). Free positions
        hold some token of the row.

    Raises:
        ValueError: no rows, a row without response where one is needed, no prompt, or a column outside of it.
    """
    if not len(rows):
        raise ValueError("Got 0 rows; expected at least one tokenised prompt.")
    made: dict[str, list[Any]] = {"input_ids": [], "labels": [], "index": list(range(len(rows))), "free_at": []}
    for number, row in enumerate(rows):
        ids, labels = list(row["input_ids"]), list(row["labels"])
        if len(ids) != len(labels):
            raise ValueError(f"Row {number} has {len(ids)} input_ids and {len(labels)} labels; expected as many.")
        prompt = next((column for column, label in enumerate(labels) if label != IGNORE_INDEX), len(ids))
        if prompt == 0:
            raise ValueError(
                f"Row {number} has no prompt; expected at least one token with the label -100 before all."
            )
        if token_ids:
            ids, labels = [*ids[:prompt], token_ids[0]], [IGNORE_INDEX] * prompt + [token_ids[0]]
        elif prompt == len(ids):
            raise ValueError(
                f"Row {number} is a prompt alone (all labels are -100) and token_ids is None; expected a response in "
                "every row, or token_ids whose probability as the next token counts."
            )
        at = _column(row, number, prompt) if free_positions else 0
        filler = [ids[at]] * free_positions
        made["input_ids"].append(ids[:at] + filler + ids[at:])
        made["labels"].append(labels[:at] + [IGNORE_INDEX] * free_positions + labels[at:])
        made["free_at"].append(at)
    return Dataset.from_dict(made)


def retain_dataset(rows: Sequence[Mapping[str, Any]] | None) -> Dataset | None:
    """
    Rows of the retain term, with their responses.

    Raises:
        ValueError: an empty list, or no row with a response.
    """
    if rows is None:
        return None
    if not any(label != IGNORE_INDEX for row in rows for label in list(row["labels"])[1:]):
        raise ValueError(
            f"The {len(rows)} retain_rows have no response token; expected rows whose labels mark what the model must "
            "go on to say, or None."
        )
    return Dataset.from_dict({key: [list(row[key]) for row in rows] for key in ("input_ids", "labels")})


def _column(row: Mapping[str, Any], number: int, prompt: int) -> int:
    at = row.get("free_at")
    if at is None:
        if prompt < 2:
            raise ValueError(f"The prompt of row {number} has one token; give `free_at`, where free positions go.")
        return prompt - 1
    if isinstance(at, bool) or not isinstance(at, int) or not 0 <= at <= prompt:
        raise ValueError(f"free_at of row {number} is {at!r}; expected a column of its prompt, 0 to {prompt}.")
    return at
