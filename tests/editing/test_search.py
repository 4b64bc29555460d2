"""The search for levels on a model that is one matrix and a softmax: targets are met, and hardly more is paid."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from hf_unlearn.editing import search
from hf_unlearn.editing.algebra.metric import Metric
from hf_unlearn.editing.algebra.solve import Edit
from hf_unlearn.editing.search import Found, LevelProblem, search_levels

V, D, M = 12, 5, 4


class Softmax:
    """Logits `U (W + Delta) h`, and pairs of an activation and a token that are asked for log-odds."""

    def __init__(
        self, seed: int, pairs: list[tuple[int, int]], target: float, places: int = 2, retain: bool = False
    ) -> None:
        g = torch.Generator().manual_seed(seed)
        self.head = 3.0 * torch.randn(V, D, generator=g, dtype=torch.float64)
        self.weight = torch.randn(D, M, generator=g, dtype=torch.float64)
        self.inputs = torch.randn(places, M, generator=g, dtype=torch.float64) + 0.5
        kept = torch.randn(50, M, generator=g, dtype=torch.float64)
        ids = sorted({token for _, token in pairs})
        self.pairs = pairs
        self.problem = LevelProblem(
            inputs=self.inputs,
            outputs=self.inputs @ self.weight.T,
            directions=self.head[ids] - self.head.mean(0),
            places=torch.tensor([place for place, _ in pairs]),
            columns=torch.tensor([ids.index(token) for _, token in pairs]),
            before=self.odds(torch.zeros(D, M, dtype=torch.float64)),
            target=torch.full((len(pairs),), target, dtype=torch.float64),
            metric=Metric.from_retain(kept, 0.01) if retain else Metric.identity(),
        )
        self.cost_matrix = torch.eye(M, dtype=torch.float64)
        if retain:
            second = kept.T @ kept / 50
            self.cost_matrix = second + 0.01 * second.diagonal().mean() * self.cost_matrix

    def odds(self, delta: Tensor) -> Tensor:
        found = []
        for place, token in self.pairs:
            p = (self.head @ ((self.weight + delta) @ self.inputs[place])).softmax(0)
            others = torch.cat([p[:token], p[token + 1 :]]).sum()
            found.append(float(p[token].log() - others.log()))
        return torch.tensor(found, dtype=torch.float64)

    def measure(self, edit: Edit) -> Tensor:
        return self.odds(edit.delta())

    def cost(self, delta: Tensor) -> float:
        return 0.5 * float(torch.trace(delta @ self.cost_matrix @ delta.T))

    def likely(self, place: int, rank: int = 0) -> int:
        return int((self.head @ self.weight @ self.inputs[place]).argsort(descending=True)[rank])


def top_pairs(seed: int, count: int) -> list[tuple[int, int]]:
    first = Softmax(seed, [(0, 0)], 0.0, count)
    return [(place, first.likely(place)) for place in range(count)]


def check(small: Softmax, found: Found, tolerance: float = 1e-6) -> None:
    """What is reported is what the edit does."""
    measured = small.odds(found.edit.delta())
    torch.testing.assert_close(found.odds, measured)
    assert found.reached == bool((measured <= small.problem.target + tolerance).all())
    assert found.edit.certificate.cost == pytest.approx(small.cost(found.edit.delta()), rel=1e-6)
    assert any(entry["cost"] == pytest.approx(found.edit.certificate.cost, rel=1e-5) for entry in found.history)
    assert (found.edit.certificate.retained_disturbance is None) == (small.problem.metric.retain is None)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("retain", [False, True])
def test_one_pair_costs_what_a_scan_of_all_shifts_finds(seed: int, retain: bool) -> None:
    target = math.log(1e-6)
    small = Softmax(seed, top_pairs(seed, 1), target, 1, retain)
    found = search_levels(small.problem, small.measure)
    check(small, found)
    assert found.reached
    # the cheapest edit for a shift s is along w and C^-1 h: cost s^2 / (2 |w|^2 h^T C^-1 h)
    w, h = small.problem.directions[0], small.inputs[0]
    solved = torch.linalg.solve(small.cost_matrix, h)
    scanned = []
    for shift in np.linspace(0.0, 200.0, 4001):
        delta = -shift * torch.outer(w, solved) / (w @ w * (h @ solved))
        if float(small.odds(delta)[0]) <= target:
            scanned.append(small.cost(delta))
            break
    assert found.edit.certificate.cost == pytest.approx(scanned[0], rel=0.07)
    assert -0.5 <= float(found.odds[0]) - target <= 1e-6


@pytest.mark.parametrize("seed", range(6))
def test_several_pairs_cost_little_more_than_the_cheapest_steps_along_their_directions(seed: int) -> None:
    """SLSQP over the length of each pair's step, on the true log-odds."""
    pairs, target = top_pairs(seed, 3), -14.0
    small = Softmax(seed, pairs, target, 3)
    found = search_levels(small.problem, small.measure)
    check(small, found)
    assert found.reached
    w = small.problem.directions[small.problem.columns]

    def delta(steps: np.ndarray) -> Tensor:
        return -sum(step * torch.outer(w[k], small.inputs[k]) for k, step in enumerate(steps.tolist()))

    start = torch.linalg.lstsq(
        torch.stack([torch.outer(w[k], small.inputs[k]).flatten() for k in range(3)], dim=1),
        -found.edit.delta().flatten()[:, None],
    ).solution[:, 0]
    torch.testing.assert_close(delta(start.numpy()), found.edit.delta())  # the edit is of that kind
    best = minimize(
        lambda x: small.cost(delta(x)),
        start.numpy(),
        constraints=[{"type": "ineq", "fun": lambda x: target - small.odds(delta(x)).numpy()}],
        method="SLSQP",
        options={"ftol": 1e-9, "maxiter": 100},
    )
    assert (small.odds(delta(best.x)) <= target + 1e-3).all()
    assert best.fun * 0.99 <= found.edit.certificate.cost <= 1.3 * best.fun


@pytest.mark.parametrize("seed", range(4))
def test_slack_is_used_where_the_last_tenths_of_a_nat_cost_something(seed: int) -> None:
    small = Softmax(seed, top_pairs(seed, 3), -14.0, 3)
    exact, loose = (search_levels(small.problem, small.measure, slack=slack) for slack in (0.0, 1.5))
    assert exact.reached
    assert loose.reached
    assert float((loose.odds - small.problem.target).max()) <= 1.5
    assert loose.edit.certificate.cost <= exact.edit.certificate.cost * 1.02
    enough = [entry["cost"] for entry in loose.history if entry["excess"] <= 1.5]
    assert loose.edit.certificate.cost == pytest.approx(min(enough), rel=1e-5), "the cheapest that is near enough"
    assert len(loose.history) <= len(exact.history)


def test_slack_does_not_pay_for_the_last_nat_at_any_price() -> None:
    small = Softmax(3, top_pairs(3, 1), 0.0, 1)
    problem = replace(small.problem, target=small.problem.before - 8.0)
    stubborn = bent(small, lambda moves: moves.clamp(max=7.2) + 0.2 * (moves - 7.2).clamp(min=0.0))
    exact, loose = (search_levels(problem, stubborn, slack=slack) for slack in (0.0, 1.5))
    assert exact.reached
    assert loose.reached
    assert 1.5 * loose.edit.certificate.cost < exact.edit.certificate.cost


def test_the_first_steps_do_not_end_a_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step into the unknown may cost a hundredfold and make things worse; the next one knows the slope."""
    monkeypatch.setattr(search, "_GROWTH", 1.0)
    small = Softmax(0, top_pairs(0, 3), -14.0, 3)
    calls = []

    def measure(edit: Edit) -> Tensor:
        calls.append(edit)
        return small.measure(edit) + (20.0 if len(calls) == 2 else 0.0)

    assert search_levels(small.problem, measure).reached


def test_a_free_pair_that_another_lifts_is_brought_down_too() -> None:
    seed = 2
    top = Softmax(seed, [(0, 0)], 0.0, 1)
    pairs = [(0, top.likely(0)), (0, top.likely(0, 1))]
    target = float(Softmax(seed, pairs, 0.0, 1).problem.before[1]) + 0.5
    small = Softmax(seed, pairs, target, 1)
    assert small.problem.before[1] < target < small.problem.before[0], "one is low enough at first"
    alone = Softmax(seed, pairs[:1], target, 1)
    lifted = small.odds(search_levels(alone.problem, alone.measure).edit.delta())
    assert lifted[1] > target + 1.0, "and high without a constraint of its own"
    found = search_levels(small.problem, small.measure)
    check(small, found)
    assert found.reached


@pytest.mark.parametrize("solver", ["joint", "greedy"])
@pytest.mark.parametrize("seed", range(3))
def test_all_pairs_of_several_places_are_brought_down_by_both_solvers(solver: Any, seed: int) -> None:
    first = Softmax(seed, [(0, 0)], 0.0, 3)
    pairs = [(place, first.likely(place, rank)) for place in range(3) for rank in range(3)]
    small = Softmax(seed, sorted(pairs), -6.0, 3)
    found = search_levels(replace(small.problem, solver=solver), small.measure)
    check(small, found)
    assert found.reached


def test_one_round_is_not_enough_and_says_so() -> None:
    small = Softmax(0, top_pairs(0, 2), -12.0, 2)
    small.problem = replace(small.problem, directions=small.problem.directions * 100.0)  # falls far less than it asks
    found = search_levels(small.problem, small.measure, max_rounds=1)
    check(small, found)
    assert not found.reached
    assert len(found.history) == 1
    assert found.history[0]["excess"] == pytest.approx(float((found.odds + 12.0).max()))
    assert search_levels(small.problem, small.measure).reached


def test_nothing_to_do_is_an_edit_of_rank_zero() -> None:
    small = Softmax(0, top_pairs(0, 2), 1000.0, 2)
    found = search_levels(small.problem, small.measure)
    assert (found.reached, found.edit.certificate.rank, len(found.history)) == (True, 0, 1)
    torch.testing.assert_close(found.odds, small.problem.before)


def bent(small: Softmax, curve: Any) -> Any:
    """Log-odds that follow the moves by any curve, not by a softmax."""

    def measure(edit: Edit) -> Tensor:
        return small.problem.before - curve(small.problem.moves(edit))

    return measure


def test_log_odds_that_respond_late_and_then_steeply_are_met_without_going_to_and_fro() -> None:
    small = Softmax(3, top_pairs(3, 1), 0.0, 1)
    target = small.problem.before - 8.0
    problem = replace(small.problem, target=target)
    found = search_levels(problem, bent(small, lambda moves: 0.2 * moves + 12.0 * (moves - 5.0).clamp(min=0.0)))
    assert found.reached
    needed = 5.0 + (8.0 - 1.0) / 12.2
    moved = float(problem.moves(found.edit))
    assert needed <= moved <= 1.02 * needed


def test_a_target_out_of_reach_ends_early_with_an_edit_that_is_not_absurd() -> None:
    """A final norm bounds log-odds: growing an edit for ever would only ruin the model."""
    small = Softmax(3, top_pairs(3, 1), 0.0, 1)
    problem = replace(small.problem, target=small.problem.before - 8.0)
    found = search_levels(problem, bent(small, lambda moves: 6.0 * moves / (1.0 + moves.abs())))
    assert not found.reached
    assert len(found.history) < 16
    costs = [entry["cost"] for entry in found.history]
    assert found.edit.certificate.cost <= 100.0**2 * costs[0]
    assert costs[-1] > 100.0 * costs[0], "it has tried"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", [0, 2, 4])
def test_the_cost_does_not_hang_on_the_size_of_the_outputs(seed: int, dtype: torch.dtype) -> None:
    """Only moves count; large outputs make the solver go further beyond a level, for rounding, and pairs still bind."""
    small = Softmax(seed, top_pairs(seed, 3), -14.0, 3)
    problem = replace(small.problem, inputs=small.inputs.to(dtype), outputs=small.problem.outputs.to(dtype))
    far = torch.randn(D, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    costs = []
    for size in (0.0, 1e2, 3e3):
        found = search_levels(replace(problem, outputs=problem.outputs + (size * far).to(dtype)), small.measure)
        assert found.reached
        costs.append(found.edit.certificate.cost)
    assert costs[1] == pytest.approx(costs[0], rel=0.02)
    assert costs[2] == pytest.approx(costs[0], rel=0.05)


def test_what_is_weighed_afterwards_is_the_certificate_that_the_solver_would_have_made() -> None:
    small = Softmax(1, top_pairs(1, 2), -9.0, 2, retain=True)
    found = search_levels(small.problem, small.measure)
    certificate = found.edit.certificate
    assert certificate.gap == pytest.approx(
        (certificate.cost - certificate.lower_bound) / certificate.cost, rel=1e-9, abs=1e-12
    )
    assert certificate.retained_disturbance is not None


def test_contradicting_pairs_are_refused() -> None:
    small = Softmax(0, [(0, 0), (1, 0)], -50.0, 2)
    small.inputs[1] = -small.inputs[0]
    problem = replace(small.problem, inputs=small.inputs, outputs=small.inputs @ small.weight.T)
    problem = replace(problem, before=small.odds(torch.zeros(D, M, dtype=torch.float64)))
    with pytest.raises(ValueError, match="No edit of this matrix brings all pairs down: 2 contradict each other"):
        search_levels(problem, small.measure)


def test_moves_are_how_far_each_output_falls_along_its_direction() -> None:
    small = Softmax(2, [(0, 1), (0, 7), (1, 7)], -5.0)
    shifts = torch.tensor([2.0, -torch.inf, -0.5], dtype=torch.float64)
    edit = small.problem.solve(shifts)
    wanted = []
    for place, token in small.pairs:
        w = small.head[token] - small.head.mean(0)
        wanted.append(-float(w @ (edit.delta() @ small.inputs[place])))
    moves = small.problem.moves(edit)
    torch.testing.assert_close(moves, torch.tensor(wanted, dtype=torch.float64))
    assert moves[0] == pytest.approx(2.0, rel=1e-6)
    assert moves[2] >= -0.5 - 1e-6
