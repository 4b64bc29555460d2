"""Which words of a model's answer give the right answer away: what the page marks in the generations."""

from __future__ import annotations

import re

_WORD = re.compile(r"\w+(?:['’]\w+)*")
_SMALL_WORDS = """
    also been from have into more most over such than that their them then there they this were what when where which
    while with would your about after being could other these those through under until
"""
_SMALL = frozenset(_SMALL_WORDS.split())
_MAX_WORDS = 400
"""Longer answers are compared up to here: the table below is quadratic."""


def leaked_words(text: str, answer: str, question: str) -> list[tuple[str, bool]]:
    """Cut `text` into pieces and say of each whether it repeats the right answer.

    A word is marked when it lies on a longest common subsequence with `answer` (as in ROUGE-L), is not in `question`,
    and is no small word (below four letters, no digit): small words and words of the question show no knowledge.

    Args:
        text (`str`): what the model said.
        answer (`str`): the right answer.
        question (`str`): the question.

    Returns:
        `list[tuple[str, bool]]`: pieces that joined give `text` again, neighbours of one kind merged.
    """
    words = list(_WORD.finditer(text))[:_MAX_WORDS]
    right = [word.group().lower() for word in _WORD.finditer(answer)][:_MAX_WORDS]
    given = {word.group().lower() for word in _WORD.finditer(question)}
    common = _common_subsequence([word.group().lower() for word in words], right)
    pieces: list[tuple[str, bool]] = []
    end = 0
    for index in common:
        word = words[index].group()
        telling = len(word) > 3 or any(character.isdigit() for character in word)
        if not telling or word.lower() in given or word.lower() in _SMALL:
            continue
        start = words[index].start()
        between = text[end:start]
        if pieces and pieces[-1][1] and not between.strip():
            pieces[-1] = (pieces[-1][0] + between + word, True)
        else:
            pieces += [(between, False)] if between else []
            pieces.append((word, True))
        end = words[index].end()
    if end < len(text):
        pieces.append((text[end:], False))
    return pieces


def _common_subsequence(left: list[str], right: list[str]) -> list[int]:
    """Indices into `left` of one longest common subsequence of `left` and `right`."""
    length = [[0] * (len(right) + 1) for _ in range(len(left) + 1)]
    for i in reversed(range(len(left))):
        for j in reversed(range(len(right))):
            if left[i] == right[j]:
                length[i][j] = length[i + 1][j + 1] + 1
            else:
                length[i][j] = max(length[i + 1][j], length[i][j + 1])
    indices, i, j = [], 0, 0
    while i < len(left) and j < len(right):
        if left[i] == right[j]:
            indices.append(i)
            i, j = i + 1, j + 1
        elif length[i + 1][j] >= length[i][j + 1]:
            i += 1
        else:
            j += 1
    return indices
