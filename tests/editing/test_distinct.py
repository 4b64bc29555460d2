"""Which tokens stop a word: those by which it leaves what has to stay, found by looking at every place."""

from __future__ import annotations

import random

import pytest
import torch
from small_lab import SmallLab
from test_plan_edit import plan_of, word_probabilities

from hf_unlearn.editing.added import edits_in_force
from hf_unlearn.editing.concepts import Concept, find_occurrences, word_concepts
from hf_unlearn.editing.distinct import SaidText, distinct_tokens
from hf_unlearn.editing.edit_rows import word_pairs


def counted(rows: list[list[int]], tokens: list[int]) -> int:
    """Place by place."""
    return sum(row[at : at + len(tokens)] == tokens for row in rows for at in range(len(row)))


def said(rows: list[list[int]]) -> SaidText:
    return SaidText([{"input_ids": row} for row in rows])


def test_sequences_are_counted_within_rows_and_may_overlap() -> None:
    random.seed(0)
    rows = [[random.randrange(3) for _ in range(random.randrange(9))] for _ in range(30)]
    text = said(rows)
    for size in (1, 2, 3, 5):
        for _ in range(20):
            tokens = [random.randrange(4) for _ in range(size)]
            assert text.count(tokens) == counted(rows, tokens)
    assert said([[5, 5, 5]]).count([5, 5]) == 2
    assert said([[1], [2]]).count([1, 2]) == 0, "of two rows"
    assert said([]).count([1]) == said([[]]).count([1, 2]) == 0


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        ([], 0),  # nothing has to stay: the word may not begin
        ([[9, 9]], 0),
        ([[1, 7]], 1),  # another word begins alike
        ([[1, 2, 7]], 2),
        ([[1, 2, 3, 4]], 3),  # the word itself has to stay: its end is left
        ([[1, 7], [1, 2, 3]], 3),
        ([[1, 9], [7, 1, 2]], 2),
        ([[1, 9], [9, 2, 3], [3]], 1),  # 1 2 and 3 4 follow nowhere; 2 and 4 are as rare as each other but for [9, 2]
        ([[1, 9], [2, 3]], 3),  # of 2, which is said once, and 4, which is not
    ],
)
def test_the_token_is_where_the_word_leaves_what_stays_and_then_the_rarest(rows: list[list[int]], wanted: int) -> None:
    word = [1, 2, 3, 4]
    text = said(rows)
    leaves = next((at for at in range(3) if not counted(rows, word[: at + 1])), 3)
    keys = [
        (counted(rows, word[max(at - 1, 0) : at + 1]), counted(rows, word[at : at + 1]), at) for at in range(leaves, 4)
    ]
    assert distinct_tokens(word, text) == [min(keys)[2]]
    for count in (2, 3, 9):
        assert distinct_tokens(word, text, count) == sorted(at for _, _, at in sorted(keys)[:count])
    if rows != [[1, 9], [9, 2, 3], [3]]:
        assert distinct_tokens(word, text) == [wanted]


def test_pairs_stop_a_word_there_and_other_spellings_with_the_same_beginning(lab: SmallLab) -> None:
    (plain,) = word_concepts(lab.tokenizer, ["greyhound"])
    rows = lab.rows()
    one = find_occurrences(lab.tokenizer, rows, [plain])[0]
    row = rows[one.row]
    own = row["input_ids"][one.start : one.stop]
    assert len(own) > 1
    others = ((own[0], 577, 578), (own[0],), (579, 580))
    concept = Concept(text=plain.text, spellings=(tuple(own), *others), first=(own[0], 579))
    first = word_pairs(lab.tokenizer, [row], [concept], "occurrence", None)
    assert set(first.ids.tolist()) == {own[0], 579}
    assert set(first.tokens.tolist()) == {one.start - 1}
    second = word_pairs(lab.tokenizer, [row], [concept], "occurrence", None, said([[own[0], 599]]))
    assert set(second.tokens.tolist()) == {one.start}
    assert set(second.ids.tolist()) == {own[1], 577}


def test_tokens_of_a_word_share_what_it_has_to_lose(lab: SmallLab) -> None:
    (plain,) = word_concepts(lab.tokenizer, ["greyhound"])
    row, one = next((row, one) for row in lab.rows() for one in find_occurrences(lab.tokenizer, [row], [plain])[:1])
    own = row["input_ids"][one.start : one.stop]
    size = len(own)
    assert size > 2
    spellings = (tuple(own), (own[0], 577), (own[0], 578, 4), (579,), (580, 4))
    concept = Concept(text=plain.text, spellings=spellings, first=(own[0], 579, 580))

    def shares(count: int, rows: list[list[int]]) -> dict[tuple[int, int], float]:
        pairs = word_pairs(lab.tokenizer, [row], [concept], "occurrence", None, said(rows), count)
        places = zip((pairs.tokens - one.start + 1).tolist(), pairs.ids.tolist(), strict=True)
        return dict(zip(places, pairs.shares.tolist(), strict=True))

    assert shares(1, []) == {(0, own[0]): 1.0, (0, 579): 1.0, (0, 580): 1.0}
    assert shares(2, []) == {
        (0, own[0]): 0.5,
        (0, 579): 1.0,
        (0, 580): 0.5,  # 579 is the whole word: nothing else stops it
        (1, own[1]): 0.5,
        (1, 577): 0.5,
        (1, 578): 0.5,  # after own[0], which has its share
    }
    assert shares(2, [own[:-1]]) == {(size - 1, own[-1]): 1.0}, "only one is left: it has to do all alone"
    several = shares(9, [])
    assert {at for at, _ in several} == set(range(size))
    assert {several[at, token] for at, token in enumerate(own)} == {1.0 / size}


@pytest.mark.parametrize("count", [2, 3])
def test_a_word_that_two_tokens_stop_is_below_the_probability_as_a_whole(lab: SmallLab, count: int) -> None:
    model = lab.model()
    plan = plan_of(lab, model, tokens_per_word=count, variants=3)
    assert plan.demands is not None
    with edits_in_force(model, plan.edits):
        assert max(word_probabilities(model, lab)) <= 1e-4 * (1 + 1e-3)
        rows, pairs = plan.demands.rows, plan.demands.pairs
        found = []
        table = zip(pairs.rows.tolist(), pairs.tokens.tolist(), pairs.ids.tolist(), pairs.shares, strict=True)
        for number, place, token, share in table:
            ids = torch.tensor([rows[number]["input_ids"][: place + 1]])
            with torch.no_grad():
                found.append(float(model(input_ids=ids).logits[0, -1].double().softmax(0)[token]) ** float(1 / share))
    assert {round(1 / share) for share in pairs.shares.tolist()} >= {count}
    assert max(found) <= 1e-4 * (1 + 1e-3)
    assert plan.measures["constrained"]["after"] == pytest.approx(max(found), rel=1e-3)


def test_without_retain_rows_the_first_token_is_stopped(lab: SmallLab) -> None:
    distinct = plan_of(lab, retain=None, token="distinct")
    first = plan_of(lab, retain=None, token="first")
    assert torch.equal(distinct.edits[0].lora_a, first.edits[0].lora_a)
    assert distinct.measures["constrained"] == first.measures["constrained"]


def test_levels_and_points_are_about_first_tokens(lab: SmallLab) -> None:
    for changes in ({"eps": 1.0}, {"source": "activation", "probability": 0.1}):
        plans = [plan_of(lab, variants=0, token=token, **changes) for token in ("distinct", "first")]
        assert torch.equal(plans[0].edits[0].lora_a, plans[1].edits[0].lora_a)
        assert ("constrained" in plans[0].measures) == ("eps" not in changes)
