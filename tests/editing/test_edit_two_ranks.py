"""Two processes read, measure and plan what one does, in the same order, and both end with the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from plans_worker import run
from small_lab import SmallLab

from hf_unlearn.editing import EditPlan

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, lab: SmallLab) -> Path:
    folder = tmp_path_factory.mktemp("plans")
    torch.save(lab, folder / "lab.pt")
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parents[1]), os.environ.get("PYTHONPATH", "")])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    shown = subprocess.run(
        [*launcher, str(here / "plans_worker.py"), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert shown.returncode == 0, shown.stderr[-4000:]
    run(folder, lab, None)
    return folder


def test_activations_of_two_ranks_are_those_of_one_in_the_order_of_rows_and_tokens(folder: Path) -> None:
    one, first, second = (torch.load(folder / f"found-{name}.pt")["captured"] for name in ("1-0", "2-0", "2-1"))
    assert len(one) == 6
    for key, alone in one.items():
        for mine, other, wanted in zip(first[key], second[key], alone, strict=True):
            assert torch.equal(mine, other)
            torch.testing.assert_close(mine, wanted)
        places = list(zip(first[key][2].tolist(), first[key][3].tolist(), strict=True))
        assert places == sorted(set(places))
        assert len({row for row, _ in places}) == (4 if key[0] == "response" else 5)


def test_odds_of_two_ranks_are_those_of_one(folder: Path) -> None:
    one, first, second = (torch.load(folder / f"found-{name}.pt")["odds"] for name in ("1-0", "2-0", "2-1"))
    for mine, other, wanted in zip(first, second, one, strict=True):
        assert torch.equal(mine, other)
        torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-5)


def test_two_ranks_make_the_plan_of_one(folder: Path) -> None:
    one, first, second = (EditPlan.load(folder / f"plan-{name}") for name in ("1-0", "2-0", "2-1"))
    for mine, other, alone in zip(first.edits, second.edits, one.edits, strict=True):
        assert torch.equal(mine.lora_a, other.lora_a)
        assert torch.equal(mine.lora_b, other.lora_b)
        assert mine.rank == alone.rank > 0
        torch.testing.assert_close(mine.delta(), alone.delta(), rtol=1e-2, atol=1e-3)
    assert first.measures == second.measures
    assert first.measures["pairs"] == one.measures["pairs"]
    reach = [plan.measures["constrained"]["after"] for plan in (first, one)]
    assert reach[0] == pytest.approx(reach[1], rel=0.02)
    assert max(reach) <= 1e-3 * 1.001
