"""Descent-ascent with DualVariables against exact solutions of small problems."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from hf_unlearn.duals import DualVariables, RetainConstraint
from hf_unlearn.solver import solve_constrained

A = torch.tensor([3.0, -1.0, 2.0], dtype=torch.float64)
B = torch.tensor([0.5, 0.5, 0.5], dtype=torch.float64)


def squared_distance(center: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: ((x - center) ** 2).sum()


def ball(eps: float, **kwargs: Any) -> DualVariables:
    return DualVariables([RetainConstraint(name="ball", eps=eps)], **kwargs)


@pytest.mark.parametrize("warmup", [0, 100])
def test_projection_on_a_ball_has_the_closed_form_primal_and_multiplier(warmup: int) -> None:
    # min ||x - a||^2 s.t. ||x - b||^2 <= r: x = b + sqrt(r) (a - b) / ||a - b||, lambda = ||a - b|| / sqrt(r) - 1
    r = 1.7
    solution = solve_constrained(
        squared_distance(A),
        {"ball": squared_distance(B)},
        torch.zeros(3),
        ball(r, step_size=0.2, warmup_updates=warmup),
        lr=0.05,
        steps=4000,
        tol=1e-12,
    )
    distance = (A - B).norm().item()
    assert torch.allclose(solution.x, B + math.sqrt(r) * (A - B) / distance, atol=1e-6)
    assert solution.multipliers["ball"] == pytest.approx(distance / math.sqrt(r) - 1, abs=1e-6)
    assert solution.feasible
    assert abs(solution.violations["ball"]) <= 1e-6
    assert solution.objective == pytest.approx((distance - math.sqrt(r)) ** 2, abs=1e-5)
    assert solution.steps < 4000


def test_several_constraints_equal_slsqp_and_the_slack_one_has_multiplier_zero() -> None:
    centers = {"first": [0.0, 0.0, 0.0], "second": [2.0, 1.0, 0.0], "loose": [1.0, 0.0, 1.0]}
    eps = {"first": 3.0, "second": 4.0, "loose": 50.0}
    functions = {name: squared_distance(torch.tensor(c, dtype=torch.float64)) for name, c in centers.items()}
    duals = DualVariables([RetainConstraint(name=name, eps=value) for name, value in eps.items()], step_size=0.1)
    objective = lambda x: ((x - A) ** 4).sum() / 10 + ((x - A) ** 2).sum()  # noqa: E731
    solution = solve_constrained(objective, functions, torch.zeros(3), duals, lr=0.02, steps=5000, tol=1e-11)

    a = A.numpy()
    exact = minimize(
        lambda x: ((x - a) ** 4).sum() / 10 + ((x - a) ** 2).sum(),
        np.zeros(3),
        method="SLSQP",
        constraints=[
            {"type": "ineq", "fun": lambda x, n=n: eps[n] - ((x - np.array(centers[n])) ** 2).sum()} for n in centers
        ],
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert exact.success
    assert np.allclose(solution.x.numpy(), exact.x, atol=1e-4)
    assert solution.objective == pytest.approx(exact.fun, abs=1e-4)
    assert solution.multipliers["loose"] == 0.0
    # stationarity with the returned multipliers: an independent check of their values
    x = solution.x.clone().requires_grad_(True)
    lagrangian = objective(x) + sum(solution.multipliers[n] * fn(x) for n, fn in functions.items())
    (gradient,) = torch.autograd.grad(lagrangian, x)
    assert gradient.abs().max() < 1e-3


def test_inactive_constraint_ends_at_multiplier_zero_and_the_free_minimum() -> None:
    solution = solve_constrained(
        squared_distance(A), {"ball": squared_distance(B)}, torch.zeros(3), ball(100.0), lr=0.1, steps=300
    )
    assert solution.multipliers["ball"] == 0.0
    assert torch.allclose(solution.x, A, atol=1e-6)


def contradiction(cap: float | None) -> DualVariables:
    # x <= -1 and x >= 1
    names = ("below", "above")
    return DualVariables([RetainConstraint(name=n, eps=0.0) for n in names], step_size=0.1, max_multiplier=cap)


CONTRADICTION = {"below": lambda x: (x + 1).sum(), "above": lambda x: (1 - x).sum()}


def test_infeasible_problem_is_reported_after_a_bounded_number_of_steps() -> None:
    solution = solve_constrained(squared_distance(torch.zeros(1)), CONTRADICTION, torch.ones(1), contradiction(None), lr=0.05, steps=800)  # fmt: skip
    assert not solution.feasible
    assert solution.steps == 800
    # the least violated point is x = 0, one away from both; each multiplier grows by eta * 1 a step
    assert solution.x.item() == pytest.approx(0.0, abs=1e-2)
    assert max(solution.violations.values()) == pytest.approx(1.0, abs=1e-2)
    assert solution.growth == pytest.approx({"below": 0.1, "above": 0.1}, rel=1e-3)
    assert min(solution.multipliers.values()) > 50


def test_cap_stops_the_multipliers_of_an_infeasible_problem() -> None:
    duals = contradiction(7.0)
    solution = solve_constrained(squared_distance(torch.zeros(1)), CONTRADICTION, torch.ones(1), duals, lr=0.05, steps=800)  # fmt: skip
    assert not solution.feasible
    assert solution.multipliers == {"below": 7.0, "above": 7.0}
    assert duals.multipliers.max() == 7.0


def test_feasible_problem_has_multipliers_that_stop_growing() -> None:
    solution = solve_constrained(
        squared_distance(A), {"ball": squared_distance(B)}, torch.zeros(3), ball(1.7), lr=0.02, steps=3000
    )
    assert abs(solution.growth["ball"]) < 1e-9


def test_multiplier_of_a_linear_program_is_found_by_the_mean_of_the_iterates() -> None:
    # min x s.t. x >= 1: descent-ascent circles (1, 1) and only the mean converges to it
    duals = DualVariables([RetainConstraint(name="above", eps=0.0)], step_size=0.02)
    solution = solve_constrained(
        lambda x: x.sum(), {"above": lambda x: (1 - x).sum()}, torch.full((1,), 3.0), duals, lr=0.02, steps=2200, average=0.8, slack=0.02
    )  # fmt: skip
    assert solution.feasible
    assert solution.x.item() == pytest.approx(1.0, abs=0.05)
    assert solution.multipliers["above"] == pytest.approx(1.0, abs=0.05)
    assert abs(duals.multiplier("above").item() - 1.0) > 0.5


def test_best_feasible_iterate_is_returned_when_the_last_one_is_not_feasible() -> None:
    # two steps from a feasible start cross the limit, because lambda starts at 0
    solution = solve_constrained(
        squared_distance(A), {"ball": squared_distance(B)}, B.clone(), ball(1.0, multiplier=0.0), lr=0.1, steps=4
    )
    assert solution.feasible
    last = A + (B - A) * 0.8**4
    assert squared_distance(B)(last) > 1.0
    assert squared_distance(B)(solution.x) <= 1.0
    assert not torch.equal(solution.x, B)


def test_normalisation_makes_the_trajectory_independent_of_the_units() -> None:
    def trajectory(c_objective: float, c_constraint: float) -> tuple[Tensor, float]:
        duals = ball(1.7 * c_constraint, normalize=True, step_size=0.1, multiplier=0.3)
        solution = solve_constrained(
            lambda x: c_objective * squared_distance(A)(x),
            {"ball": lambda x: c_constraint * squared_distance(B)(x)},
            torch.zeros(3),
            duals,
            lr=0.3,
            steps=150,
            slack=1e9,
        )
        return solution.x, solution.multipliers["ball"]

    x, multiplier = trajectory(1.0, 1.0)
    for constants in ((400.0, 1.0), (1.0, 0.01), (625.0, 1e-3)):
        x_scaled, multiplier_scaled = trajectory(*constants)
        assert torch.allclose(x_scaled, x, rtol=1e-9)
        assert multiplier_scaled == pytest.approx(multiplier, rel=1e-9)


def test_published_settings_convert_to_normalised_units_as_documented() -> None:
    eps, lam, eta, lr, steps = 1.7, 0.8, 0.1, 0.02, 200
    plain = solve_constrained(
        squared_distance(A), {"ball": squared_distance(B)}, torch.zeros(3), ball(eps, multiplier=lam, step_size=eta), lr=lr, steps=steps
    )  # fmt: skip
    scale = squared_distance(A)(torch.zeros(3)).item()
    duals = ball(eps, multiplier=lam * eps / scale, step_size=eta * eps**2 / scale, normalize=True)
    other = solve_constrained(
        squared_distance(A), {"ball": squared_distance(B)}, torch.zeros(3), duals, lr=lr * scale, steps=steps
    )
    assert torch.allclose(plain.x, other.x, rtol=1e-9)
    assert other.multipliers["ball"] * scale / eps == pytest.approx(plain.multipliers["ball"], rel=1e-9)


def test_updates_once_an_epoch_reach_the_same_solution() -> None:
    # the caller's other schedule: many theta steps, then one ascent on the losses measured at the epoch's end
    duals, r = ball(1.7, step_size=0.5), 1.7
    x = torch.zeros(3, dtype=torch.float64)
    for _ in range(200):
        for _ in range(20):
            x.requires_grad_(True)
            loss = squared_distance(A)(x) + duals.lagrangian({"ball": squared_distance(B)(x)})
            (gradient,) = torch.autograd.grad(loss, x)
            x = (x - 0.05 * gradient).detach()
        duals.ascend({"ball": squared_distance(B)(x).item()})
    distance = (A - B).norm().item()
    assert duals.updates == 200
    assert duals.multiplier("ball").item() == pytest.approx(distance / math.sqrt(r) - 1, abs=1e-6)
    assert squared_distance(B)(x).item() == pytest.approx(r, abs=1e-6)


def test_bad_input_is_refused() -> None:
    fns = {"ball": squared_distance(B)}
    with pytest.raises(ValueError, match="steps >= 1"):
        solve_constrained(squared_distance(A), fns, torch.zeros(3), ball(1.0), lr=0.1, steps=0)
    with pytest.raises(ValueError, match="duals has"):
        solve_constrained(squared_distance(A), {}, torch.zeros(3), ball(1.0), lr=0.1, steps=1)
    with pytest.raises(ValueError, match="cannot be normalised"):
        solve_constrained(squared_distance(A), fns, A, ball(1.0, normalize=True), lr=0.1, steps=1)
    with pytest.raises(ValueError, match="diverged"):
        solve_constrained(squared_distance(A), fns, torch.zeros(3), ball(1.0), lr=1e200, steps=5)
