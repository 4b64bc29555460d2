"""A real DDP run: two gloo ranks against one process with twice the batch (defects 3 and 4 of the reference code)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from kit import difference
from safetensors.torch import load_file
from two_ranks import run

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def two_ranks(lab, tmp_path_factory):
    """Results of two gloo ranks with batches of 2, and of one process with batches of 4, by (trainer, world, rank)."""
    folder = tmp_path_factory.mktemp("ddp")
    lab.target.save_pretrained(folder / "model")
    lab.tokenizer.save_pretrained(folder / "model")
    # 16 rows to forget, so that steps of 8 rows divide the epoch
    for name, rows in {"forget": lab.retain, "retain": lab.forget, "facts": lab.facts, "holdout": lab.holdout}.items():
        rows.save_to_disk(str(folder / name))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    here = Path(__file__).parent
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    process = subprocess.Popen(
        [*launcher, str(here / "two_ranks.py"), str(folder)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        run(folder, batch=4)
        output, _ = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 0, output[-4000:]
    return {
        (name, world, rank): (
            json.loads((folder / f"{name}-{world}-{rank}.json").read_text()),
            load_file(folder / f"{name}-{world}-{rank}.safetensors"),
        )
        for name in ("primal_dual", "npo")
        for world, rank in ((1, 0), (2, 0), (2, 1))
    }


@pytest.mark.parametrize("name", ["primal_dual", "npo"])
def test_3_two_ranks_equal_one_process_with_twice_the_batch(two_ranks, name):
    (one, weights), (first, first_weights), (second, second_weights) = (
        two_ranks[name, world, rank] for world, rank in ((1, 0), (2, 0), (2, 1))
    )
    assert first["state"] == second["state"], "multipliers, limits and level are bit for bit the same on every rank"
    assert first["logps"] == second["logps"]
    assert first["evaluation"] == second["evaluation"]
    assert difference(first_weights, second_weights) == 0
    assert difference(weights, first_weights) < 1e-5
    assert first["logps"].get("answer", []) == pytest.approx(one["logps"].get("answer", []), abs=1e-4)
    assert len(first["log"]) == len(one["log"]) == 4
    for entry, other in zip(first["log"], one["log"], strict=True):
        for key in ("loss", "loss/forget", "loss/retain/people", "loss/retain/facts", "num_tokens"):
            assert entry[key] == pytest.approx(other[key], rel=1e-4, abs=1e-6), key
    for key, value in one["evaluation"].items():
        assert first["evaluation"][key] == pytest.approx(value, rel=1e-4, abs=1e-5), key
    if name == "primal_dual":
        duals, other = one["state"]["duals"], first["state"]["duals"]
        assert duals["multipliers"] == pytest.approx(other["multipliers"], abs=1e-5)
        assert duals["eps"] == pytest.approx(other["eps"], rel=1e-5)
        assert all(abs(value - 1.0) > 1e-3 for value in duals["multipliers"]), "the multipliers must have moved"


def test_4_ranks_draw_different_retain_rows_and_together_those_of_one_process(two_ranks):
    one, first, second = (two_ranks["primal_dual", world, rank][0]["rows"] for world, rank in ((1, 0), (2, 0), (2, 1)))
    assert first != second
    for batch, mine, other in zip(one, first, second, strict=True):
        assert batch == [*mine, *other]
    # 7 retain rows are left for training: within one pass over them no two ranks hold the same row
    partners = [row for mine, other in zip(first, second, strict=True) for _, row in [*mine, *other]]
    assert len({tuple(row) for row in partners}) == 7
    assert [mine[0][1] for mine in first] != [other[0][1] for other in second]
