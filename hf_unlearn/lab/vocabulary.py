"""Words of the offline world: common words from the package's lists, and names invented from syllables."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from .grammar import choose, fill

_NUMBERS: dict[str, range] = {
    "day": range(1, 29),
    "year": range(1901, 1966),
    "recent": range(1985, 2025),
    "age": range(9, 70),
    "count": range(5, 60),
    "number": range(2, 190, 2),
    "hundreds": range(110, 990, 20),
}
# How many names of each sort one world holds. Large enough that no answer can be guessed from the other authors,
# small enough that a 2k-token vocabulary learns them from 40 authors.
_INVENTED = {"city": 90, "pet": 60, "language": 50}
_GIVEN_NAMES = 24
_FAMILY_NAMES = 33
# Full names fall into three parts with the same given and family names in all of them, so that nobody who is met as a
# mentor or an editor, and no wrong answer to the question for a name, is an author of this world.
_PARTS = ("author", "person", "namesake")


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """
    Pools of words from which all facts of one world are drawn.

    Args:
        pools (`dict[str, tuple[str, ...]]`):
            Distinct words or short phrases by the name that templates use.
        people (`tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]`):
            Given names and family names of each culture; a person takes both from one culture.
    """

    pools: dict[str, tuple[str, ...]]
    people: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]

    def person(self, part: str, rng: random.Random) -> str:
        """Draw a full name, "Given Family"; names of different parts (`"author"`, `"person"`, ...) never agree."""
        given, family = rng.choice(self.people)
        first, last = rng.randrange(len(given)), rng.randrange(len(family) // len(_PARTS))
        # Each given name meets each third family name in each part, so no part can be told from the tokens.
        last = len(_PARTS) * last + (_PARTS.index(part) + first) % len(_PARTS)
        return f"{given[first]} {family[last]}"

    def draw(self, pattern: str, rng: random.Random, taken: set[str]) -> str:
        """
        Draw a value for a pattern such as `{material} {object}`.

        Args:
            pattern (`str`):
                Template over pool names, and `{person}` or `{namesake}` for a full name.
            rng (`random.Random`):
                Source of the draws.
            taken (`set[str]`):
                Words this row has used already. They are not drawn again, so that nobody studies law and law; new
                words are added.

        Returns:
            `str`: the value.
        """

        def word(pool: str) -> str:
            while True:
                value = self.person(pool, rng) if pool in _PARTS else rng.choice(self.pools[pool])
                if value not in taken:
                    taken.add(value)
                    return value

        return fill(choose(pattern, rng), word)


def build_vocabulary(seed: int) -> Vocabulary:
    """
    Assemble the words of the world with this seed.

    Common words are the same for all seeds. Names of people, cities, pets and languages are invented anew for each.

    Args:
        seed (`int`):
            Seed of the world.

    Returns:
        [`Vocabulary`]
    """
    rng = random.Random(f"vocabulary:{seed}")
    words = read_json("words.json")
    pools = {name: tuple(values) for name, values in words["pools"].items()}
    pools |= {name: tuple(str(number) for number in numbers) for name, numbers in _NUMBERS.items()}
    for name, source in (("city", "cities"), ("pet", "pets"), ("language", "languages")):
        pools[name] = _invent(words[source], _INVENTED[name], rng)
    people = []
    for *given_syllables, family_starts, family_ends in words["cultures"].values():
        given = _invent(given_syllables, _GIVEN_NAMES, rng)
        people.append((given, _invent([family_starts, family_ends], _FAMILY_NAMES, rng)))
    pools["given_name"] = tuple(name for given, _ in people for name in given)
    return Vocabulary(pools=pools, people=tuple(people))


@cache
def read_json(name: str) -> dict[str, Any]:
    """Read one of the package's data files, `hf_unlearn/lab/data/<name>`; the result is shared: do not change it."""
    text = files("hf_unlearn.lab").joinpath("data", name).read_text(encoding="utf-8")
    data: dict[str, Any] = json.loads(text)
    return data


def _invent(syllables: list[list[str]], count: int, rng: random.Random) -> tuple[str, ...]:
    names: dict[str, None] = {}  # a dict and not a set: the order must not depend on the hash seed
    while len(names) < count:
        names["".join(rng.choice(part) for part in syllables)] = None
    return tuple(names)
