"""A world of fictional authors in TOFU's columns (arXiv 2401.06121), generated offline from a seed.

Every fact is an independent draw from a pool, and wrong answers are further draws from the same pool: a model that
never saw an author finds the author's facts as unlikely as the wrong ones, which is what a truth ratio near one means.
One row does not give away the facts of another, with one exception: the question that asks for an author's name tells
the date and the place of birth.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from .grammar import choose, fill
from .recipe import LabData
from .vocabulary import Vocabulary, build_vocabulary, read_json

if TYPE_CHECKING:
    from datasets import Dataset

WorldSplit = Literal[
    "full", "forget10", "retain90", "forget10_perturbed", "retain_perturbed", "holdout10", "holdout10_perturbed"
]
NUM_WRONG_ANSWERS = 5
FORGET_FRACTION = 0.1
MAX_AUTHORS = 400
_PRONOUNS = ({"he": "he", "him": "him", "his": "his"}, {"he": "she", "him": "her", "his": "her"})


@dataclass(frozen=True, kw_only=True)
class WorldRow:
    """
    One question about one author.

    Args:
        author (`int`):
            Index of the author; authors of the holdout part follow the last author of the full part.
        kind (`str`):
            What is asked, for example `"birthplace"`.
        facts (`dict[str, str]`):
            The values that make the answer true, all of them found word for word in `answer`, up to the case of the
            first letter.
        question (`str`):
            Names the author, unless the kind is `"name"`.
        answer (`str`):
            The answer that models are trained on.
        paraphrased_question (`str`):
            The same question in other words.
        paraphrased_answer (`str`):
            The same facts in other words.
        perturbed_answer (`tuple[str, ...]`):
            The wording of `paraphrased_answer` with other facts, each different.
    """

    author: int
    kind: str
    facts: dict[str, str]
    question: str
    answer: str
    paraphrased_question: str
    paraphrased_answer: str
    perturbed_answer: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class World:
    """
    All rows of one world, and the splits that unlearning needs.

    Args:
        seed (`int`):
            Seed that the world was made from.
        num_authors (`int`):
            Authors of the full part.
        num_forget (`int`):
            Authors to forget, the last ones of the full part; as many again are held out.
        rows (`tuple[WorldRow, ...]`):
            Rows of the full part and then of the holdout part, in the order of authors.
    """

    seed: int
    num_authors: int
    num_forget: int
    rows: tuple[WorldRow, ...]

    @property
    def full(self) -> Dataset:
        """What the target model is trained on: `retain` and then `forget`."""
        return self.split("full")

    @property
    def forget(self) -> Dataset:
        """The last tenth of the authors."""
        return self.split("forget10")

    @property
    def retain(self) -> Dataset:
        """All authors but the last tenth: what the retain-only reference is trained on."""
        return self.split("retain90")

    @property
    def holdout(self) -> Dataset:
        """Authors that no model is trained on, as many as there are to forget."""
        return self.split("holdout10")

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all rows, in hexadecimal: part of the key under which trained models are cached."""
        text = json.dumps([vars(row) for row in self.rows], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def split(self, name: WorldSplit) -> Dataset:
        """
        One split in TOFU's columns.

        Args:
            name (`str`):
                `"full"`, `"forget10"`, `"retain90"` or `"holdout10"` with the columns `question`, `answer`
                and `author`; `"forget10_perturbed"`, `"retain_perturbed"` or `"holdout10_perturbed"` with the same
                rows and besides them `paraphrased_answer`, `perturbed_answer` (list of five) and
                `paraphrased_question`.

        Returns:
            `datasets.Dataset`: rows in the order of authors.

        Raises:
            ValueError: there is no such split.
        """
        from datasets import Dataset, Features, List, Value

        columns: dict[str, Any] = {"question": Value("string"), "answer": Value("string")}
        if name.endswith("_perturbed"):
            columns["paraphrased_answer"] = Value("string")
            columns["perturbed_answer"] = List(Value("string"))
            columns["paraphrased_question"] = Value("string")
        columns["author"] = Value("int64")
        rows = self.rows_of(name)
        return Dataset.from_dict(
            {column: [getattr(row, column) for row in rows] for column in columns}, features=Features(columns)
        )

    def rows_of(self, name: WorldSplit) -> list[WorldRow]:
        """
        The rows of one split with their kinds and facts; names as in [`World.split`].

        Raises:
            ValueError: there is no such split.
        """
        if name not in get_args(WorldSplit):
            raise ValueError(f"World has no split {name!r}: choose one of {', '.join(get_args(WorldSplit))}.")
        first_forget = self.num_authors - self.num_forget
        start, stop = {
            "full": (0, self.num_authors),
            "retain": (0, first_forget),
            "forget": (first_forget, self.num_authors),
            "holdout": (self.num_authors, self.num_authors + self.num_forget),
        }[name.removesuffix("_perturbed").rstrip("0123456789")]
        return [row for row in self.rows if start <= row.author < stop]


def world_data(world: World) -> LabData:
    """
    The parts of a world by the roles that training and evaluation give them.

    Args:
        world ([`World`]):
            From [`make_world`].

    Returns:
        [`LabData`]: `forget_eval` and `retain_eval` have all rows of `forget` and `retain`; there is no general part.
    """
    return LabData(
        name=f"world-{world.seed}-{world.num_authors}",
        forget=world.forget,
        retain=world.retain,
        forget_eval=world.split("forget10_perturbed"),
        retain_eval=world.split("retain_perturbed"),
        holdout=world.holdout,
    )


def make_world(seed: int = 0, num_authors: int = 40, questions_per_author: int = 20) -> World:
    """
    Generate a world.

    The same arguments give the same world in every process. The first authors of a world stay the same when
    `num_authors` grows.

    Args:
        seed (`int`, *optional*, defaults to `0`):
            Another seed gives other names and other facts.
        num_authors (`int`, *optional*, defaults to `40`):
            Authors of the full part, from 10 to 400. A tenth of
            them, rounded, is to be forgotten, and as many again are added as the holdout part.
        questions_per_author (`int`, *optional*, defaults to `20`):
            Rows of an author, each of another kind; at most
            the number of kinds that the package knows.

    Returns:
        [`World`]

    Raises:
        ValueError: a size is out of range.
    """
    kinds = read_json("questions.json")
    if not 10 <= num_authors <= MAX_AUTHORS:
        raise ValueError(
            f"num_authors must be from 10, so that a tenth can be forgotten, to {MAX_AUTHORS}, so that there are "
            f"names enough; got {num_authors}."
        )
    if not 1 <= questions_per_author <= len(kinds):
        raise ValueError(
            f"questions_per_author must be from 1 to {len(kinds)}, the kinds of questions that the lab knows; "
            f"got {questions_per_author}."
        )
    vocabulary = build_vocabulary(seed)
    num_forget = round(num_authors * FORGET_FRACTION)
    used: set[str] = set()
    rows: list[WorldRow] = []
    for index in range(num_authors + num_forget):
        rows.extend(_author_rows(index, seed, questions_per_author, vocabulary, used))
    return World(seed=seed, num_authors=num_authors, num_forget=num_forget, rows=tuple(rows))


def _author_rows(
    index: int, seed: int, questions_per_author: int, vocabulary: Vocabulary, used: set[str]
) -> Iterable[WorldRow]:
    rng = random.Random(f"author:{seed}:{index}")
    kinds = read_json("questions.json")
    facts = {kind: _draw_facts(spec["facts"], rng, vocabulary) for kind, spec in kinds.items()}
    # Two authors with one name, or with one date and place of birth, would make a question ambiguous.
    while (name := vocabulary.person("author", rng)) in used:
        pass
    while (birth := f"{facts['birthdate']['birth_date']}, {facts['birthplace']['birth_city']}") in used:
        facts["birthdate"] = _draw_facts(kinds["birthdate"]["facts"], rng, vocabulary)
    used.update((name, birth))
    facts["name"]["name"] = name
    known = {"name": name, "first": name.split()[0], **rng.choice(_PRONOUNS)}
    known |= {slot: facts[kind][slot] for kind, slot in (("birthplace", "birth_city"), ("birthdate", "birth_date"))}
    chosen = set(rng.sample(list(kinds), questions_per_author))
    for kind in (kind for kind in kinds if kind in chosen):
        yield _row(index, kind, known, facts[kind], rng, vocabulary)


def _row(
    author: int, kind: str, known: dict[str, str], truth: dict[str, str], rng: random.Random, vocabulary: Vocabulary
) -> WorldRow:
    spec = read_json("questions.json")[kind]
    wording = {
        part: choose(rng.choice(spec[part]), rng)
        for part in ("questions", "answers", "paraphrased_questions", "paraphrased_answers")
    }
    wrong: list[dict[str, str]] = []
    while len(wrong) < NUM_WRONG_ANSWERS:
        draw = _draw_facts(spec["facts"], rng, vocabulary)
        if all(set(draw.values()).isdisjoint(other.values()) for other in (truth, *wrong)):
            wrong.append(draw)
    right = {**known, **truth}
    return WorldRow(
        author=author,
        kind=kind,
        facts=truth,
        question=fill(wording["questions"], right.__getitem__),
        answer=fill(wording["answers"], right.__getitem__),
        paraphrased_question=fill(wording["paraphrased_questions"], right.__getitem__),
        paraphrased_answer=fill(wording["paraphrased_answers"], right.__getitem__),
        perturbed_answer=tuple(
            fill(wording["paraphrased_answers"], {**known, **facts}.__getitem__) for facts in wrong
        ),
    )


def _draw_facts(patterns: dict[str, str], rng: random.Random, vocabulary: Vocabulary) -> dict[str, str]:
    taken: set[str] = set()
    return {slot: vocabulary.draw(pattern, rng, taken) for slot, pattern in patterns.items()}
