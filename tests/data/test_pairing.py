from __future__ import annotations

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from hf_unlearn.data import Pairing
from hf_unlearn.data.pairing import permutation


def read(pairing, name, epochs):
    return [pairing.rows(epoch, index)[name] for epoch in range(epochs) for index in range(len(pairing))]


@pytest.mark.parametrize(
    ("cycle", "length"),
    [("forget", 5), ("retain", 13), ("longest", 13), ("shortest", 3)],
    ids=lambda value: str(value),
)
def test_cycle_sets_the_length_of_an_epoch(cycle, length):
    assert len(Pairing(sizes={"forget": 5, "retain": 13, "facts": 3}, cycle=cycle, seed=0)) == length


@pytest.mark.parametrize("cycle", ["forget", "retain", "longest", "shortest"])
@pytest.mark.parametrize(("forget", "retain"), [(5, 13), (13, 5), (7, 7), (1, 4), (4, 1)])
def test_every_row_of_every_set_is_used_before_any_repeats_across_epochs(cycle, forget, retain):
    pairing = Pairing(sizes={"forget": forget, "retain": retain}, cycle=cycle, seed=3)
    for name, size in pairing.sizes.items():
        rows = read(pairing, name, epochs=9)
        for start in range(0, len(rows) - size + 1, size):  # the slow twin: cut the reading into passes
            assert sorted(rows[start : start + size]) == list(range(size)), name
        for epoch in range(1, 9):  # hence counts differ by at most one whenever an epoch ends
            counts = Counter(rows[: epoch * len(pairing)])
            assert max(counts.values()) - min(counts.get(row, 0) for row in range(size)) <= 1


def test_the_forget_row_is_the_index_when_the_forget_side_sets_the_length():
    for cycle in ("forget", "longest"):
        pairing = Pairing(sizes={"forget": 6, "retain": 4}, cycle=cycle, seed=0)
        assert read(pairing, "forget", 2) == [*range(6), *range(6)]


def test_ranks_hold_disjoint_retain_rows_within_a_pass():
    pairing = Pairing(sizes={"forget": 64, "retain": 64}, seed=1)
    order = np.random.default_rng(0).permutation(64).tolist()  # whatever a sampler does
    for start in range(0, 64, 16):
        step = [[pairing.rows(2, i)["retain"] for i in order[start + rank : start + 16 : 4]] for rank in range(4)]
        assert len({row for rank in step for row in rank}) == 16


def test_partners_change_with_seed_set_and_pass():
    def rows(seed, name, epoch=0):
        pairing = Pairing(sizes={"forget": 50, name: 50}, seed=seed)
        return [pairing.rows(epoch, index)[name] for index in range(50)]

    assert rows(0, "retain") == rows(0, "retain")
    assert (
        len({tuple(rows(0, "retain")), tuple(rows(1, "retain")), tuple(rows(0, "x")), tuple(rows(0, "retain", 1))})
        == 4
    )


def test_resuming_at_any_item_gives_the_same_tail():
    straight = read(Pairing(sizes={"forget": 7, "retain": 5}, seed=4), "retain", epochs=4)
    permutation.cache_clear()
    resumed = Pairing(sizes={"forget": 7, "retain": 5}, seed=4)
    assert [resumed.rows(*divmod(position, 7))["retain"] for position in range(10, 28)] == straight[10:]


def test_another_process_with_another_hash_seed_draws_the_same_rows():
    code = "from hf_unlearn.data import Pairing; p = Pairing(sizes={'forget': 6, 'retain': 9}, seed=5);"
    code += "print([p.rows(1, i)['retain'] for i in range(6)])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONHASHSEED": "77"})
    pairing = Pairing(sizes={"forget": 6, "retain": 9}, seed=5)
    assert shown.stdout.strip() == str([pairing.rows(1, index)["retain"] for index in range(6)]), shown.stderr


def test_the_permutation_is_frozen():
    # a change here would change every trajectory that is resumed
    assert permutation(0, "retain", 8, 0).tolist() == [7, 0, 3, 4, 6, 1, 5, 2]
    with pytest.raises(ValueError, match="read-only"):
        permutation(0, "retain", 8, 0)[0] = 1


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"sizes": {"retain": 3}, "seed": 0}, "expected the key 'forget'"),
        ({"sizes": {"forget": 0, "retain": 3}, "seed": 0}, "Empty dataset: forget"),
        ({"sizes": {"forget": 3, "facts": 0}, "seed": 0}, "Empty dataset: facts"),
        ({"sizes": {"forget": 3, "retain": 3}, "seed": -1}, "seed is -1"),
        ({"sizes": {"forget": 3, "retain": 3}, "seed": 0, "cycle": "both"}, "cycle is 'both'"),
        ({"sizes": {"forget": 3}, "seed": 0, "cycle": "retain"}, "needs a retain dataset"),
    ],
)
def test_bad_arguments_are_explained(options, match):
    with pytest.raises(ValueError, match=match):
        Pairing(**options)


def test_an_index_outside_the_epoch_is_an_index_error():
    pairing = Pairing(sizes={"forget": 3}, seed=0)
    for index in (-1, 3):
        with pytest.raises(IndexError, match="outside an epoch of 3"):
            pairing.rows(0, index)
