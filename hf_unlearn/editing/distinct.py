"""Which tokens of a word are made unlikely: those by which it is least like what has to stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


class SaidText:
    """
    Tokenised rows, prompts and responses, to look sequences of tokens up in.

    Args:
        rows (`Sequence[Mapping]`):
            `input_ids`.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        pieces: list[int] = []
        for row in rows:
            pieces += [*row["input_ids"], -1]
        self._ids = np.asarray(pieces, dtype=np.int64)

    def count(self, tokens: Sequence[int]) -> int:
        """How often the rows say the tokens, one after the other; at least one token."""
        first, *others = tokens
        places = np.flatnonzero(self._ids[: max(len(self._ids) - len(others), 0)] == first)
        for offset, token in enumerate(others, 1):
            places = places[self._ids[places + offset] == token]
        return len(places)


def distinct_tokens(tokens: Sequence[int], said: SaidText, count: int = 1) -> list[int]:
    """
    The places in a word's tokens of those to make unlikely, ascending.

    What the word begins with may begin other words, too, and those would lose as much: "Jinshin" of one person's name
    is another's. So the word is followed up to where nothing that has to stay goes on like it, and from there on the
    tokens are taken that follow the one before them most rarely; of several, the rarest, then the first.

    Args:
        tokens (`Sequence[int]`):
            The word.
        said ([`SaidText`]):
            What has to stay. Where it says the whole word, the last token is left.
        count (`int`, *optional*, defaults to `1`):
            So many, where the word has as many from there on.
    """
    last = len(tokens) - 1
    leaves = next((at for at in range(last) if not said.count(tokens[: at + 1])), last)
    rarest = sorted(
        range(leaves, len(tokens)),
        key=lambda at: (said.count(tokens[max(at - 1, 0) : at + 1]), said.count(tokens[at : at + 1]), at),
    )
    return sorted(rarest[:count])
