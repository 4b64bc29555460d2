"""The offline world: TOFU's columns, the same rows everywhere, and facts that nobody can guess."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from itertools import pairwise

import pytest
from scipy.stats import chisquare

from hf_unlearn.lab.grammar import choose, fill, slots_of, with_article
from hf_unlearn.lab.vocabulary import build_vocabulary, read_json
from hf_unlearn.lab.world import World, WorldRow, WorldSplit, make_world, world_data

PLAIN: tuple[WorldSplit, ...] = ("full", "forget10", "retain90", "holdout10")
PERTURBED: tuple[WorldSplit, ...] = ("forget10_perturbed", "retain_perturbed", "holdout10_perturbed")
TOFU_COLUMNS = ["question", "answer", "paraphrased_answer", "perturbed_answer", "paraphrased_question"]
SEEDS = (0, 1)


@pytest.fixture(scope="module")
def world() -> World:
    return make_world()


@pytest.fixture(scope="module")
def large_world() -> World:
    return make_world(seed=3, num_authors=200)


def words(text: str) -> list[str]:
    return re.findall(r"[\w'-]+", text)


def test_splits_have_tofu_columns_and_the_agreed_sizes(world: World) -> None:
    sizes = {name: len(world.split(name)) for name in (*PLAIN, *PERTURBED)}
    assert sizes == {
        "full": 800,
        "forget10": 80,
        "retain90": 720,
        "holdout10": 80,
        "forget10_perturbed": 80,
        "retain_perturbed": 720,
        "holdout10_perturbed": 80,
    }
    for name in PLAIN:
        assert world.split(name).column_names == ["question", "answer", "author"]
    for name in PERTURBED:
        split = world.split(name)
        assert split.column_names == [*TOFU_COLUMNS, "author"]
        assert all(len(wrong) == 5 for wrong in split["perturbed_answer"])


def test_a_perturbed_split_has_the_rows_of_its_plain_split(world: World) -> None:
    for plain, perturbed in zip(PLAIN[1:], PERTURBED, strict=True):
        for column in ("question", "answer", "author"):
            assert world.split(plain)[column] == world.split(perturbed)[column]


def test_forget_retain_and_holdout_share_no_author(world: World) -> None:
    authors = {name: set(world.split(name)["author"]) for name in PLAIN}
    assert authors["retain90"] == set(range(36))
    assert authors["forget10"] == {36, 37, 38, 39}
    assert authors["holdout10"] == {40, 41, 42, 43}
    assert authors["full"] == authors["retain90"] | authors["forget10"]


def test_unknown_split_names_the_splits(world: World) -> None:
    with pytest.raises(ValueError, match=r"'forget05'.*forget10"):
        world.split("forget05")  # type: ignore[arg-type]  # the wrong value is the point


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_authors": 9}, "num_authors"),
        ({"num_authors": 401}, "num_authors"),
        ({"questions_per_author": 0}, "questions_per_author"),
        ({"questions_per_author": 27}, "from 1 to 26"),
    ],
)
def test_sizes_out_of_range_are_errors(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_world(**arguments)


def test_the_largest_world_has_names_enough() -> None:
    largest = make_world(num_authors=400, questions_per_author=1)
    assert len(largest.rows) == 440


def test_the_hash_seed_and_the_process_do_not_change_the_world(world: World) -> None:
    command = "from hf_unlearn.lab.world import make_world; print(make_world().fingerprint)"
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == world.fingerprint


def test_another_seed_gives_other_authors_and_facts(world: World) -> None:
    other = make_world(seed=1)
    assert other.fingerprint != world.fingerprint
    assert not {row.question for row in world.rows} & {row.question for row in other.rows}
    assert not {row.answer for row in world.rows} & {row.answer for row in other.rows}


def test_more_authors_leave_the_first_authors_alone(world: World) -> None:
    assert make_world(num_authors=10).rows_of("full") == world.rows_of("full")[:200]


@pytest.mark.parametrize("seed", SEEDS)
def test_texts_are_clean_and_of_the_agreed_length(seed: int) -> None:
    rows = make_world(seed=seed).rows
    for row in rows:
        texts = [row.question, row.paraphrased_question, row.answer, row.paraphrased_answer, *row.perturbed_answer]
        for text in texts:
            assert text
            assert text == text.strip()
            assert not re.search(r"[{}\[\]|]|  |\b[aA] [aeioAEIO]\w|\.\.", text), text
            assert text[-1] in '.?"'
            assert text[0] == '"' or text[0].isdigit() or text[0].isupper(), text
        assert 8 <= len(row.answer.split()) <= 30, row.answer
        assert 8 <= len(row.paraphrased_answer.split()) <= 30, row.paraphrased_answer
        assert row.paraphrased_question != row.question
        assert row.paraphrased_answer != row.answer
    mean = sum(len(row.answer.split()) for row in rows) / len(rows)
    assert 11 < mean < 20


@pytest.mark.parametrize("seed", SEEDS)
def test_the_vocabulary_suits_a_small_tokenizer(seed: int) -> None:
    world = make_world(seed=seed)
    trained = {word for row in world.rows_of("full") for word in words(f"{row.question} {row.answer}")}
    every = trained | {
        word
        for row in world.rows
        for text in (row.paraphrased_question, row.paraphrased_answer, *row.perturbed_answer)
        for word in words(text)
    }
    assert 1500 < len(trained) < 2500
    assert 2000 < len(every) < 3500


def test_no_question_is_asked_twice(large_world: World) -> None:
    for column in ("question", "paraphrased_question"):
        assert max(Counter(getattr(row, column) for row in large_world.rows).values()) == 1


def test_questions_name_their_author(large_world: World) -> None:
    names = author_names(large_world)
    assert len(names) > 100
    for row in large_world.rows:
        if row.author not in names:
            continue
        named = [names[row.author] in question for question in (row.question, row.paraphrased_question)]
        assert named == [row.kind != "name"] * 2


def test_nobody_else_in_the_world_bears_the_name_of_an_author(large_world: World) -> None:
    names = author_names(large_world)
    assert len(set(names.values())) == len(names)
    owner = {name: author for author, name in names.items()}
    people = {"person", "namesake"}
    for kind, spec in read_json("questions.json").items():
        slots = [slot for slot, pattern in spec["facts"].items() if people & slots_of(pattern)]
        for row in large_world.rows:
            if row.kind == kind and row.kind != "name":
                assert not {row.facts[slot] for slot in slots} & owner.keys()
            elif row.kind == kind:
                assert not any(name in wrong for wrong in row.perturbed_answer for name in owner)


def test_wrong_answers_keep_the_wording_and_change_every_fact(world: World) -> None:
    for row in world.rows:
        assert len({row.answer, row.paraphrased_answer, *row.perturbed_answer}) == 7
        lowered = row.paraphrased_answer.lower()
        wording = lowered
        for value in sorted(row.facts.values(), key=len, reverse=True):
            assert value.lower() in lowered
            assert value.lower() in row.answer.lower()
            wording = wording.replace(value.lower(), "\0")
        # what is between the facts is there in each wrong answer; an article may change with its noun
        pieces = [re.sub(r"\ban? $", "", piece) for piece in wording.split("\0")]
        pattern = r"(?:an? )?.+".join(re.escape(piece) for piece in pieces)
        for wrong in row.perturbed_answer:
            assert re.fullmatch(pattern, wrong.lower()), (row.paraphrased_answer, wrong)


def test_wrong_facts_differ_from_true_facts_slot_by_slot(world: World) -> None:
    for row in world.rows:
        for value in row.facts.values():
            # numbers may be part of other numbers, and one word part of another fact of the row
            if len(value) > 3 and sum(value in other for other in row.facts.values()) == 1:
                assert not any(re.search(rf"\b{re.escape(value)}\b", wrong) for wrong in row.perturbed_answer), row


def test_one_row_does_not_tell_the_facts_of_another(large_world: World) -> None:
    by_author: dict[int, list[WorldRow]] = defaultdict(list)
    for row in large_world.rows:
        by_author[row.author].append(row)
    told, asked = 0, 0
    for rows in by_author.values():
        for row in rows:
            others = "\n".join(f"{other.question} {other.answer}" for other in rows if other is not row)
            # the question for the name is the documented exception
            for slot, value in row.facts.items():
                if row.kind != "name" and slot not in ("birth_city", "birth_date"):
                    asked += 1
                    told += bool(re.search(rf"\b{re.escape(value)}\b", others))
    assert told / asked < 0.05  # by chance only


def test_the_best_constant_guess_is_rarely_right(world: World, large_world: World) -> None:
    for rows, slot_limit in ((world.rows, 0.25), (large_world.rows, 0.12)):
        values: dict[tuple[str, str], list[str]] = defaultdict(list)
        for row in rows:
            for slot, value in row.facts.items():
                values[row.kind, slot].append(value)
        by_kind: dict[str, list[float]] = defaultdict(list)
        for (kind, slot), drawn in values.items():
            best = max(Counter(drawn).values()) / len(drawn)
            assert best < slot_limit, (kind, slot, best)  # a few dozen draws repeat more often by chance
            by_kind[kind].append(best)
        assert len(by_kind) == len(read_json("questions.json"))
        for kind, best_of_slots in by_kind.items():
            assert sum(best_of_slots) / len(best_of_slots) < 0.15, (kind, best_of_slots)
            whole = Counter(tuple(sorted(row.facts.items())) for row in rows if row.kind == kind)
            assert max(whole.values()) <= 2


def test_retain_text_does_not_tell_forget_facts_from_wrong_ones(large_world: World) -> None:
    # A word-bigram model of the retain rows ranks the true paraphrase among the five wrong ones: if facts are
    # independent draws from one pool, each rank is equally likely. The same for authors to forget and for the holdout.
    unigrams, bigrams = Counter[str](), Counter[tuple[str, str]]()
    for row in large_world.rows_of("retain_perturbed"):
        for answer in (row.answer, row.paraphrased_answer):
            tokens = words(answer.lower())
            unigrams.update(tokens)
            bigrams.update(pairwise(tokens))
    total = sum(unigrams.values())

    def loss(answer: str) -> float:
        tokens = words(answer.lower())
        nll = 0.0
        for before, after in pairwise(tokens):
            unigram = (unigrams[after] + 0.1) / (total + 0.1 * len(unigrams))
            nll -= math.log((bigrams[before, after] + 5 * unigram) / (unigrams[before] + 5))
        return nll / len(tokens)

    ranks: Counter[int] = Counter()
    rows = [*large_world.rows_of("forget10_perturbed"), *large_world.rows_of("holdout10_perturbed")]
    for row in rows:
        true = loss(row.paraphrased_answer)
        ranks[sum(loss(wrong) < true for wrong in row.perturbed_answer)] += 1
    assert len(rows) == 800
    assert chisquare([ranks[rank] for rank in range(6)]).pvalue > 0.01, ranks


def test_the_parts_of_the_world_for_the_lab(world: World) -> None:
    data = world_data(world)
    assert data.holdout is not None
    assert (len(data.forget), len(data.retain), len(data.holdout)) == (80, 720, 80)
    assert len(data.training_rows(with_forget=True)) == 800
    assert data.forget["question"] == data.forget_eval["question"]


def test_templates_name_only_known_slots_and_tell_every_fact() -> None:
    pools = build_vocabulary(0).pools.keys() | {"person", "namesake"}
    author = {"name", "first", "he", "him", "his"}
    questions = read_json("questions.json")
    for kind, spec in questions.items():
        for pattern in spec["facts"].values():
            assert slots_of(pattern) <= pools
        allowed = spec["facts"].keys() | (author if kind != "name" else {"name"})
        for template in (*spec["answers"], *spec["paraphrased_answers"]):
            assert spec["facts"].keys() <= slots_of(template) <= allowed, (kind, template)
        for template in (*spec["questions"], *spec["paraphrased_questions"]):
            assert slots_of(template) <= {"name", "him", "his", "birth_city", "birth_date"}, (kind, template)
        assert not set(spec["answers"]) & set(spec["paraphrased_answers"])
    slots = [slot for spec in questions.values() for slot in spec["facts"]]
    assert len(slots) == len(set(slots))


def test_grammar_chooses_fills_and_puts_articles() -> None:
    import random

    assert {choose("[x|y z] {s}", random.Random(seed)) for seed in range(20)} == {"x {s}", "y z {s}"}
    values = {"job": "astronomer", "city": "tolvane"}
    assert fill("{A job} is {a job} in {City}.", values.__getitem__) == "An astronomer is an astronomer in Tolvane."
    articles = {"university city": "a", "honest owl": "an", "hourglass": "an", "ukulele": "a", "urn": "an", "map": "a"}
    assert {phrase: with_article(phrase).split()[0] for phrase in articles} == articles


def author_names(world: World) -> dict[int, str]:
    return {row.author: row.facts["name"] for row in world.rows if row.kind == "name"}
