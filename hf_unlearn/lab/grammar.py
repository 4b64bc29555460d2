"""The two marks that the lab's sentence templates use, and nothing more.

`[one|another]` is a choice and `{slot}` is a hole. `{a slot}` puts the right article before the value, and a capital
first letter (`{Slot}`, `{A slot}`) capitalises what comes out. Choices are made before holes are filled, so that one
chosen wording can be filled twice: once with the true facts and once with wrong ones.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable

_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_HOLE = re.compile(r"\{(?:([aA]) )?(\w+)\}")
# The sound decides, not the letter: "a university", "an honest".
_CONSONANT_SOUND = ("uni", "uku", "eu", "one ")
_VOWEL_SOUND = ("hour", "honest", "honour")


def choose(template: str, rng: random.Random) -> str:
    """
    Resolve each `[one|another]` of a template.

    Args:
        template (`str`):
            Text with choices, which do not nest.
        rng (`random.Random`):
            Source of the choices; one draw a choice.

    Returns:
        `str`: the template with its holes, without choices.
    """
    return _CHOICE.sub(lambda match: rng.choice(match.group(1).split("|")), template)


def fill(template: str, lookup: Callable[[str], str]) -> str:
    """
    Fill each `{slot}` of a template.

    Args:
        template (`str`):
            Text with holes and without choices.
        lookup (`Callable[[str], str]`):
            The value of a slot, asked once a hole, from left to right, in lower case.

    Returns:
        `str`: plain text.
    """

    def value(match: re.Match[str]) -> str:
        article, slot = match.groups()
        text = lookup(slot[0].lower() + slot[1:])
        if slot[0].isupper():
            text = capitalise(text)
        if article is None:
            return text
        text = with_article(text)
        return capitalise(text) if article == "A" else text

    return _HOLE.sub(value, template)


def slots_of(template: str) -> set[str]:
    """Names of the slots that a template mentions, whichever choices are made."""
    return {slot[0].lower() + slot[1:] for _, slot in _HOLE.findall(template)}


def with_article(phrase: str) -> str:
    """Put "a" or "an" before a phrase."""
    lowered = phrase.lower()
    vowel = lowered.startswith(_VOWEL_SOUND) or (lowered[0] in "aeiou" and not lowered.startswith(_CONSONANT_SOUND))
    return f"{'an' if vowel else 'a'} {phrase}"


def capitalise(text: str) -> str:
    """Upper-case the first letter and leave the others alone."""
    return text[:1].upper() + text[1:]
