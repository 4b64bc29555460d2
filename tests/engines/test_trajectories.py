"""The same rows give the same run, however they are spread over micro-batches, processes and shards."""

from __future__ import annotations

from typing import Any

import pytest
from cases import CASES
from trajectories import RUNS

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]
TRAINED = [*((case, "accumulated") for case in CASES), *((c, e) for c, e in RUNS if (c, e) != ("npo", "fsdp2"))]


def same_weights(one: dict[str, Any], other: dict[str, Any], tolerance: float) -> None:
    """Equal by name; engines that save tied weights by both names must have kept them tied."""
    for name in other.keys() - one.keys():
        assert name == "lm_head.weight"
        assert (other[name] == other["model.embed_tokens.weight"]).all()
    worst = {name: float((other[name] - value).detach().abs().max()) for name, value in one.items()}
    assert max(worst.values()) <= tolerance, max(worst.items(), key=lambda item: item[1])


def same_state(one: dict[str, Any], other: dict[str, Any], tolerance: float) -> None:
    """Multipliers, limits, level and everything else that a method keeps."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            same_state(one[key], other[key], tolerance)
    elif isinstance(one, list):
        assert len(one) == len(other)
        for first, second in zip(one, other, strict=True):
            same_state(first, second, tolerance)
    elif isinstance(one, float):
        assert other == pytest.approx(one, rel=tolerance, abs=tolerance)
    else:
        assert one == other


@pytest.mark.parametrize(("case", "engine"), TRAINED)
def test_every_engine_takes_the_steps_of_one_process(ends, case: str, engine: str) -> None:
    plain = ends.result(f"{case}-plain-0")
    for rank in ("0",) if engine == "accumulated" else ("0", "1"):
        other = ends.result(f"{case}-{engine}-{rank}")
        same_weights(ends.weights(f"{case}-plain-0"), ends.weights(f"{case}-{engine}-{rank}"), 1e-5)
        same_state(plain["state"], other["state"], 1e-5)
        same_state(plain["evaluation"], other["evaluation"], 1e-5)
        same_state(plain["logps"], other["logps"], 1e-4)  # sums over up to 40 tokens in fp32
        assert len(other["log"]) == 4
        for entry, expected in zip(other["log"], plain["log"], strict=True):
            for key in ("loss", "grad_norm", "loss/forget", "loss/retain/people", "loss/retain/facts", "num_tokens"):
                assert entry[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-6), key


@pytest.mark.parametrize(("case", "engine"), [pair for pair in TRAINED if pair[1] != "accumulated"])
def test_what_is_measured_is_the_same_on_every_rank_to_the_last_bit(ends, case: str, engine: str) -> None:
    first, second = (ends.result(f"{case}-{engine}-{rank}") for rank in "01")
    assert first["state"] == second["state"]
    assert first["evaluation"] == second["evaluation"]
    assert first["logps"] == second["logps"]
    assert ends.weights(f"{case}-{engine}-0").keys() == ends.weights(f"{case}-{engine}-1").keys()
    same_weights(ends.weights(f"{case}-{engine}-0"), ends.weights(f"{case}-{engine}-1"), 0.0)


def test_the_runs_move_what_they_are_compared_by(ends) -> None:
    """Equal trajectories prove nothing where nothing happens: multipliers move, gradients are clipped, NPO forgets."""
    for case in ("lmf", "lora"):
        duals = ends.result(f"{case}-plain-0")["state"]["duals"]
        assert duals["updates"] == 4
        assert all(abs(value - 1.0) > 0.1 for value in duals["multipliers"])
    npo = ends.result("npo-plain-0")
    assert all(entry["grad_norm"] > 2 * CASES["npo"].arguments["max_grad_norm"] for entry in npo["log"])
    assert npo["log"][-1]["loss/forget"] < 0.9 * npo["log"][0]["loss/forget"]
    assert npo["log"][-1]["loss/retain/people"] > 1e-4, "the divergence from the reference is measured"
    lengths = [entry["num_tokens"] for entry in npo["log"]]
    assert lengths[1] - lengths[0] != lengths[0], "steps of unequal length"


def test_a_model_that_was_sharded_while_loading_has_no_copy_as_reference(ends) -> None:
    for rank in "01":
        message = ends.text(f"npo-fsdp2-{rank}.refused")
        assert "needs a frozen copy of the model" in message
        assert "peft_config" in message
