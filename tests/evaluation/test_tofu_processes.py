"""TOFU on two processes and after a kill: the numbers of one process in one go, and nothing scored twice."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tofu_worker
from tofu_kit import build, parts

from hf_unlearn.evaluation import session as session_module
from hf_unlearn.evaluation.tofu_files import TofuEvaluation

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(200)]
HERE = Path(__file__).parent
PIECES = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two processes and one that is killed have been here, side by side."""
    folder = tmp_path_factory.mktemp("processes")
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    script = str(HERE / "tofu_worker.py")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    # what torchrun would tell them, without the seconds that it takes to start
    ranks = [{**meeting, "RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
    running = [
        subprocess.Popen(
            [sys.executable, script, str(folder), *arguments],
            env={**environment, **told},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for told, arguments in [*((rank, ()) for rank in ranks), ({}, (str(PIECES),))]
    ]
    try:
        texts = [process.communicate(timeout=180)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    for process, text, expected in zip(running, texts, (0, 0, -signal.SIGKILL), strict=True):
        assert process.returncode == expected, text[-4000:]
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> TofuEvaluation:
    """One process, in one go."""
    return tofu_worker.evaluate(tofu_worker.build(), tmp_path_factory.mktemp("one"))


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    for name in ("mean_nll", "score_tokens", "greedy"):
        monkeypatch.setattr(session_module, name, getattr(session_module, name))  # to be put back
    return tofu_worker.count_items()


def seen(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"seen-{rank}.json").read_text(encoding="utf-8")) for rank in "01"]


def items() -> dict[str, int]:
    """All there is to score: a sequence for each answer, paraphrase, paraphrased question and wrong answer."""
    forget, retain, holdout = (len(parts()[name]) for name in ("forget", "retain", "holdout"))
    general = sum(map(len, parts()["general"].values()))
    return {
        "mean_nll": (forget + retain) * (3 + 5) + general * (1 + 5),
        "score_tokens": forget + holdout,
        "greedy": forget + retain + general,
    }


def test_two_processes_find_what_one_finds_and_both_know_it(folder: Path, one: TofuEvaluation) -> None:
    first, second = seen(folder)
    assert first["values"] == second["values"]
    assert first["processes"] == 2
    assert set(first["values"]) == set(one.evaluation.metrics)
    for name, value in one.evaluation.values().items():
        assert first["values"][name] == pytest.approx(value, abs=1e-5), name
    for rank in (first, second):
        assert rank["answers"] == {name: part.generations for name, part in one.scores.parts.items()}
    assert TofuEvaluation.load(folder / "two").evaluation.values() == first["values"]


def test_every_row_is_scored_by_one_of_the_processes_and_both_work(folder: Path) -> None:
    first, second = (rank["counts"] for rank in seen(folder))
    for name, count in items().items():
        assert first[name] + second[name] == count, name
        assert min(first[name], second[name]) > count / 3, name


def test_pieces_of_two_processes_serve_one(folder: Path, counts: dict[str, int]) -> None:
    found = tofu_worker.evaluate(tofu_worker.build(), folder / "two")
    assert counts == {}
    assert found.evaluation.values() == seen(folder)[0]["values"]


def test_a_killed_run_goes_on_where_it_was_and_finds_the_same(
    folder: Path, one: TofuEvaluation, counts: dict[str, int]
) -> None:
    kept = list((folder / "killed" / "pieces").glob("*.json"))
    assert len(kept) == PIECES
    assert not (folder / "killed" / "evaluation.json").exists()
    finished = sum(len(json.loads(path.read_text(encoding="utf-8"))["values"]) for path in kept)
    assert finished == PIECES * 4 * tofu_worker.BATCH
    found = tofu_worker.evaluate(tofu_worker.build(), folder / "killed")
    assert counts == {**items(), "mean_nll": items()["mean_nll"] - finished}
    assert found.evaluation.values() == one.evaluation.values()
    assert found.evaluation.standard_errors() == one.evaluation.standard_errors()


def test_a_failure_on_one_process_ends_both_and_keeps_what_was_finished(folder: Path) -> None:
    first, second = seen(folder)
    assert "failed on another process. process 1: MemoryError: it is full" in first["failed"]
    assert second["failed"] == "MemoryError: it is full"
    (kept,) = (folder / "failing" / "pieces").glob("*.json")
    assert sorted(map(int, json.loads(kept.read_text(encoding="utf-8"))["values"])) == list(range(4, 12))


def test_an_unwritable_folder_and_different_models_end_both(folder: Path) -> None:
    for rank in seen(folder):
        assert "cannot be written" in rank["unwritable"]
        assert "different weights" in rank["different"]
    assert session_module.model_hash(build(0)) != session_module.model_hash(build(1))
