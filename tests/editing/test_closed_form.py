"""One constraint, one activation, and the metric: against SLSQP and against dense matrices."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from small import Small, cost_of, dense_metric, make, slsqp

from hf_unlearn.editing import Metric, closed_form, solve_pcr, solve_single_activation
from hf_unlearn.editing.algebra.solve import weighed


def random(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("with_retain", [False, True])
def test_closed_form_is_what_slsqp_finds(seed: int, with_retain: bool) -> None:
    made = make(seed, 1, 4, 3, 1)
    distance = float((made.outputs[0] - made.concepts[0]).norm())
    small = Small(made.weight, made.inputs, made.concepts, 1.5 * distance)
    metric = dense_metric(random(7, 4, seed=seed) if with_retain else None, 4)
    solved = torch.linalg.solve(metric, small.inputs[0])
    column, row = closed_form(small.inputs[0], small.outputs[0], small.concepts[0], small.eps, solved=solved)
    found = torch.outer(column, row)
    assert float(small.margins(found).min()) == pytest.approx(0.0, abs=1e-12)
    best = slsqp(small, metric, [0.9 * found + 0.05 * random(3, 4, seed=seed)])
    assert cost_of(found, metric) == pytest.approx(best, rel=1e-8)


def test_closed_form_at_the_concept_itself_takes_the_first_axis() -> None:
    h = torch.tensor([1.0, 2.0])
    point = torch.tensor([3.0, 4.0, 5.0])
    column, row = closed_form(h, point, point, 2.0)
    assert torch.equal(torch.outer(column, row) @ h.double(), torch.tensor([2.0, 0.0, 0.0], dtype=torch.float64))


def test_closed_form_leaves_a_satisfied_constraint_and_refuses_a_zero_activation() -> None:
    far = closed_form(torch.ones(2), torch.full((3,), 9.0), torch.zeros(3), 2.0)
    assert not far[0].any()
    with pytest.raises(ValueError, match="leave this position out"):
        closed_form(torch.zeros(2), torch.zeros(3), torch.zeros(3), 2.0)
    assert not closed_form(torch.zeros(2), torch.full((3,), 9.0), torch.zeros(3), 2.0)[0].any()


@pytest.mark.parametrize(("count", "width"), [(5, 9), (9, 9), (30, 9), (2100, 9)])
def test_woodbury_is_the_dense_inverse(count: int, width: int) -> None:
    retain, rows = random(count, width, seed=1) + 0.3, random(4, width, seed=2)
    metric = Metric.from_retain(retain, ridge=0.02)
    dense = dense_metric(retain, width, 0.02)
    assert torch.allclose(metric.solve(rows), torch.linalg.solve(dense, rows.T).T, rtol=1e-9, atol=1e-9)
    a, b = random(2, width, seed=3), random(6, 2, seed=4)
    cost, disturbance = metric.cost(a, b)
    assert cost == pytest.approx(cost_of(b @ a, dense), rel=1e-10)
    assert disturbance == metric.disturbance(a, b)
    by_hand = np.mean([float((b @ a @ k).square().sum()) for k in retain])
    assert metric.disturbance(a, b) == pytest.approx(by_hand, rel=1e-10)


def test_the_metric_reads_wide_activations_in_blocks() -> None:
    retain, rows = random(3, 2500, seed=5).float(), random(2, 2500, seed=6)
    dense = dense_metric(retain, 2500)
    assert torch.allclose(dense @ Metric.from_retain(retain).solve(rows).T, rows.T, atol=1e-8)


@pytest.mark.parametrize("retain", [None, 9, 40])
def test_what_a_search_leaves_out_of_its_rounds_changes_no_number(retain: int | None) -> None:
    g = torch.Generator().manual_seed(3)
    h, o, w = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((5, 12), (5, 7), (3, 7)))
    kept = None if retain is None else torch.randn(retain, 12, generator=g, dtype=torch.float64)
    metric = Metric.identity() if kept is None else Metric.from_retain(kept)
    options: dict[str, Any] = {"kind": "half_space", "retain_inputs": metric}
    whole = solve_pcr(h, o, w, -1.0, **options)
    quick = solve_pcr(h, o, w, -1.0, **options, solved=metric.solve(h), weigh=False)
    assert torch.equal(quick.lora_a, whole.lora_a)
    assert torch.equal(quick.lora_b, whole.lora_b)
    assert quick.certificate.retained_disturbance is None
    assert quick.certificate.cost == pytest.approx(whole.certificate.cost, rel=1e-10)
    ready, wanted = (dict(edit.certificate.as_dict(), seconds=0.0) for edit in (weighed(quick, metric), whole))
    assert {**ready, "gap": 0.0} == {**wanted, "gap": 0.0}
    assert ready["gap"] == pytest.approx(wanted["gap"], abs=1e-10)


def test_retain_activations_of_zeros_are_refused() -> None:
    with pytest.raises(ValueError, match="not all zero"):
        solve_pcr(torch.ones(1, 3), torch.zeros(1, 2), torch.zeros(1, 2), 1.0, retain_inputs=torch.zeros(4, 3))


@pytest.mark.parametrize(("n", "d", "eps"), [(3, 5, 2.5), (4, 8, 4.0), (6, 5, 3.0), (10, 20, 5.0)])
def test_many_concepts_of_one_activation_are_solved_to_the_best_of_slsqp(n: int, d: int, eps: float) -> None:
    r = random(n, d, seed=n)
    found = solve_single_activation(r, torch.full((n,), eps))
    assert found.exact
    assert float(found.move @ found.move) == pytest.approx(found.square, rel=1e-9)
    assert float((r + found.move).norm(dim=1).min()) >= eps - 1e-9
    best = np.inf
    for seed in range(8):
        tried = minimize(
            lambda v: float(v @ v),
            3 * random(d, seed=seed).numpy(),
            jac=lambda v: 2 * v,
            constraints=[{"type": "ineq", "fun": lambda v: ((r.numpy() + v) ** 2).sum(1) - eps**2}],
            method="SLSQP",
            options={"ftol": 1e-14, "maxiter": 400},
        )
        if ((r.numpy() + tried.x) ** 2).sum(1).min() > eps**2 - 1e-7:
            best = min(best, float(tried.fun))
    assert found.square == pytest.approx(best, rel=1e-6)


def test_an_output_between_two_concepts_steps_aside() -> None:
    r = torch.tensor([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0]])
    found = solve_single_activation(r, torch.tensor([2.0, 2.0]))
    assert found.square == pytest.approx(3.0)
    assert found.move.abs().tolist() == pytest.approx([0.0, 3**0.5, 0.0])


def test_concepts_all_around_in_one_dimension_give_a_bound_only() -> None:
    found = solve_single_activation(torch.tensor([[1.0], [-1.0]]), torch.tensor([2.0, 2.0]))
    assert not found.exact
    assert 0 < found.square <= 9.0 + 1e-9  # the optimum goes past one of them
