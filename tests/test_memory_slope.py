"""The slope that `make bench` finds in a run's memory: right, with an error that knows that memory moves by jumps."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

STEPS = np.arange(5.0, 1_005.0, 5.0)
PAGE = 4 / 1024  # MiB


@pytest.fixture(scope="module")
def leak() -> Any:
    return runpy.run_path(str(Path(__file__).parent / "benchmarks" / "leak.py"))


@pytest.fixture(scope="module")
def least_squares(leak: Any) -> Any:
    return leak["least_squares"]


def jumps(rng: np.random.Generator, count: int) -> np.ndarray:
    """Memory that takes a page at `count` moments, and keeps it."""
    memory = np.full(len(STEPS), 500.0)
    for moment in rng.choice(np.arange(1, len(STEPS)), count, replace=False):
        memory[moment:] += PAGE
    return memory


def test_the_slope_is_that_of_a_line_through_the_samples(least_squares: Any) -> None:
    memory = np.random.default_rng(0).normal(size=len(STEPS)).cumsum()
    slope, error = least_squares(STEPS, memory)
    assert slope == pytest.approx(np.polyfit(STEPS, memory, 1)[0], rel=1e-9)
    assert error > 0
    slope, error = least_squares(STEPS, 500 + 2e-6 * STEPS)
    assert (slope, error) == (pytest.approx(2e-6), pytest.approx(0.0, abs=1e-12))


def test_a_page_or_two_are_no_slope_and_many_are(least_squares: Any) -> None:
    rng = np.random.default_rng(1)
    found = dict.fromkeys((1, 2, 8, 12), 0)
    for count in found:
        for _ in range(100):
            slope, error = least_squares(STEPS, jumps(rng, count))
            found[count] += slope - 1.96 * error > 0
    assert found[1] == 0
    assert found[2] <= 5
    assert found[8] >= 95, "32 bytes a step"
    assert found[12] == 100


@pytest.mark.parametrize(("bytes_a_step", "seen"), [(0, False), (64, True)])
def test_a_leak_is_seen_through_what_differs_between_batches(leak: Any, bytes_a_step: int, seen: bool) -> None:
    """Noise of the size that a run has, 18 KiB, and whole pages."""
    rng = np.random.default_rng(3)
    count = 0
    for _ in range(100):
        pages = np.floor(bytes_a_step * STEPS / 4096 + rng.random())
        memory = 500 + PAGE * (pages + rng.normal(scale=4.6, size=len(STEPS)).round())
        slope, error = leak["least_squares"](leak["pooled"](STEPS), leak["pooled"](memory))
        count += slope - 1.96 * error > 0
    assert count >= 95 if seen else count <= 3


def test_memory_that_goes_to_and_fro_has_no_slope_more_often_than_one_time_in_twenty(least_squares: Any) -> None:
    rng = np.random.default_rng(2)
    above = below = 0
    for _ in range(600):
        moves = rng.integers(-1, 2, len(STEPS)) * (rng.random(len(STEPS)) < 0.1)
        slope, error = least_squares(STEPS, 500 + PAGE * moves.cumsum())
        above += slope - 1.96 * error > 0
        below += slope + 1.96 * error < 0
    assert above <= 30
    assert below <= 30
