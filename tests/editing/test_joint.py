"""The joint solver: feasible by a real product, optimal against SLSQP, never worse than the greedy one."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from small import Small, cost_of, dense_metric, make, random_starts, slsqp

from hf_unlearn.editing import Certificate, Edit, Kind, solve_pcr
from hf_unlearn.editing.algebra import dual
from hf_unlearn.editing.algebra.joint import solve_joint
from hf_unlearn.editing.algebra.problem import reduce_problem
from hf_unlearn.editing.algebra.solution import kkt_residual
from hf_unlearn.editing.algebra.starts import apart_start

SHAPES = [(1, 5, 6, 4), (4, 5, 3, 4), (6, 20, 3, 3), (12, 20, 30, 9), (15, 10, 8, 12)]


def solve(small: Small, **kwargs: Any) -> Edit:
    return solve_pcr(small.inputs, small.outputs, small.concepts, small.eps, kind=small.kind, **kwargs)


def objective(proof: Certificate) -> float:
    return proof.cost + proof.penalty


@pytest.mark.parametrize("kind", ["ball", "half_space"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", [0, 1])
def test_edit_holds_by_a_real_product_and_costs_what_it_says(seed: int, shape: tuple[int, ...], kind: Kind) -> None:
    small = make(seed, *shape, kind=kind)
    retain = torch.randn(9, shape[1], generator=torch.Generator().manual_seed(seed)).double()
    for kept in (None, retain):
        edit = solve(small, retain_inputs=kept)
        proof, margins = edit.certificate, small.margins(edit.delta())
        assert small.violated() > 0
        assert proof.feasible
        assert float(margins.min()) >= 0
        assert proof.smallest_margin == pytest.approx(float(margins.min()), abs=1e-12)
        assert proof.cost == pytest.approx(cost_of(edit.delta(), dense_metric(kept, shape[1])), rel=1e-8)
        assert proof.kkt_residual < 1e-4
        assert proof.converged
        assert 0 < proof.lower_bound <= proof.cost * (1 + 1e-9)
        assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(proof.objectives))
        assert 1 <= proof.rank <= int((margins < 1e-6).any(1).sum())
        assert int(torch.linalg.matrix_rank(edit.delta())) == proof.rank == len(edit.lora_a) == edit.lora_b.shape[1]


@pytest.mark.parametrize("few", [0.0, 2.0, 1e9])  # activations without a multiplier left out always, at half, never
@pytest.mark.parametrize("active", [0, 1, 5, 24])
def test_products_of_the_dual_are_those_with_its_whole_matrix(
    active: int, few: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dual, "_FEW", few)
    generator = torch.Generator().manual_seed(active)
    rows = torch.randint(9, (24,), generator=generator).sort().values
    u = torch.randn(24, 4, generator=generator).double()
    half = torch.randn(9, 9, generator=generator).double()
    gram, beta = half @ half.T, torch.rand(24, generator=generator).double()
    a = torch.zeros(24).double()
    a[torch.randperm(24, generator=generator)[:active]] = torch.rand(active, generator=generator).double()
    program = dual._Program(u, rows, gram, beta, torch.full_like(beta, torch.inf))
    q = (u @ u.T) * gram[rows][:, rows]
    torch.testing.assert_close(program.times(a), q @ a)
    assert program.value(a) == pytest.approx(float(beta @ a - 0.5 * a @ q @ a), rel=1e-12, abs=1e-12)
    torch.testing.assert_close(program.gradient(program.moves(a)), beta - q @ a)


@pytest.mark.parametrize("kind", ["ball", "half_space"])
@pytest.mark.parametrize("shape", SHAPES)
def test_joint_costs_at_most_what_the_greedy_solver_spends(shape: tuple[int, ...], kind: Kind) -> None:
    costs = []
    for seed in range(3):
        small = make(seed, *shape, kind=kind)
        joint, greedy = solve(small).certificate, solve(small, solver="greedy").certificate
        if greedy.feasible:
            costs.append(greedy.cost / joint.cost)
            assert greedy.lower_bound <= joint.cost * (1 + 1e-9)
            assert greedy.gap >= -1e-12
    assert costs
    assert min(costs) > 1 - 1e-9
    if shape[0] > 5 and kind == "ball":
        assert max(costs) > 1.05  # the baseline is no minimiser


def test_joint_beats_greedy_where_concepts_surround_the_outputs() -> None:
    """Few dimensions, many local optima: the greedy result is one of the starts."""
    for seed in (100, 101, 102, 104, 109, 113):
        for shape in ((6, 3, 2, 5), (8, 4, 2, 4), (5, 30, 1, 3)):
            small = make(seed, *shape, factor=0.6)
            joint, greedy = solve(small).certificate, solve(small, solver="greedy").certificate
            assert joint.feasible
            assert joint.kkt_residual < 1e-4
            assert not joint.conflict
            if greedy.feasible:
                assert joint.cost <= greedy.cost * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("with_retain", [False, True])
def test_half_spaces_are_solved_exactly(seed: int, with_retain: bool) -> None:
    small = make(seed, 4, 5, 3, 4, kind="half_space")
    retain = torch.randn(8, 5, generator=torch.Generator().manual_seed(seed)).double() if with_retain else None
    metric = dense_metric(retain, 5)
    edit = solve(small, retain_inputs=retain)
    assert edit.certificate.cost == pytest.approx(slsqp(small, metric, random_starts(small, 2)), rel=1e-6)
    assert edit.certificate.gap < 1e-8


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("shape", [(3, 4, 4, 3), (4, 5, 3, 4)])
def test_balls_are_no_worse_than_the_best_of_slsqp(seed: int, shape: tuple[int, ...]) -> None:
    small = make(seed, *shape)
    found = solve(small).certificate
    best = slsqp(small, torch.eye(shape[1], dtype=torch.float64), random_starts(small, 8, seed))
    assert found.cost <= best * (1 + 1e-6)
    assert found.lower_bound <= best * (1 + 1e-6)  # a bound that some edit beats is no bound


def test_most_ball_problems_are_certified_as_global_optima() -> None:
    gaps = [solve(make(seed, *shape)).certificate.gap for seed in range(4) for shape in SHAPES]
    assert sum(gap < 1e-6 for gap in gaps) >= 0.8 * len(gaps)


def test_more_rounds_lower_the_cost() -> None:
    small = make(1, 15, 10, 8, 12)
    proof = solve(small).certificate
    assert proof.objectives[-1] < 0.9 * proof.objectives[0]
    assert solve(small, max_rounds=1).certificate.rounds == 1


@pytest.mark.parametrize("kind", ["ball", "half_space"])
def test_order_and_duplicates_do_not_matter(kind: Kind) -> None:
    small = make(3, 8, 12, 10, 6, kind=kind)
    plain = solve(small).delta()
    g = torch.Generator().manual_seed(0)
    mixed = Small(
        small.weight,
        small.inputs[torch.randperm(8, generator=g)],
        small.concepts[torch.randperm(6, generator=g)],
        small.eps,
        kind,
    )
    doubled = Small(small.weight, small.inputs.repeat(2, 1), small.concepts.repeat(3, 1), small.eps, kind)
    for other in (mixed, doubled):
        edit = solve(other)
        assert torch.allclose(edit.delta(), plain, atol=1e-6 * float(plain.norm()))
        assert edit.certificate.rank == int(torch.linalg.matrix_rank(plain))
        assert edit.certificate.feasible


@pytest.mark.parametrize("kind", ["ball", "half_space"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_second_solve_returns_nothing(kind: Kind, dtype: torch.dtype) -> None:
    for seed in range(5):
        small = make(seed, 12, 40, 30, 9, kind=kind)
        inputs, outputs, concepts = (t.to(dtype) for t in (small.inputs, small.outputs, small.concepts))
        first = solve_pcr(inputs, outputs, concepts, small.eps, kind=kind)
        edited = outputs + (inputs @ first.lora_a.T) @ first.lora_b.T
        second = solve_pcr(inputs, edited, concepts, small.eps, kind=kind)
        assert first.certificate.rank > 0
        assert second.certificate.rank == 0
        assert second.certificate.cost == 0.0
        assert second.certificate.feasible


@pytest.mark.parametrize("solver", ["joint", "greedy"])
def test_two_calls_agree_bit_for_bit(solver: str) -> None:
    small = make(2, 12, 20, 30, 9)
    first, second = solve(small, solver=solver), solve(small, solver=solver)
    assert torch.equal(first.lora_a, second.lora_a)
    assert torch.equal(first.lora_b, second.lora_b)
    assert {**first.certificate.as_dict(), "seconds": 0} == {**second.certificate.as_dict(), "seconds": 0}


@pytest.mark.parametrize("shape", SHAPES)
def test_moves_far_away_satisfy_everything_and_belong_to_an_edit(shape: tuple[int, ...]) -> None:
    small = make(5, *shape)
    inputs = torch.cat([small.inputs, -2.0 * small.inputs[:1]])  # one activation against another
    eps = torch.full((shape[3],), small.eps, dtype=torch.float64)
    gram, outputs = inputs @ inputs.T, inputs @ small.weight.T
    problem = reduce_problem(gram, outputs, small.concepts, eps, kind="ball", rounding=0.0)
    starts = apart_start(problem)
    assert len(starts) == 2
    for moves in starts:
        assert float(problem.margins(moves).min()) >= 0
        assert torch.allclose(
            inputs @ (torch.linalg.pinv(inputs) @ moves), moves, atol=1e-6 * float(moves.abs().max())
        )


def test_moves_far_away_are_far_enough_where_there_is_no_room_aside() -> None:
    """On a line, each output next to a concept on the side that the move passes."""
    outputs = torch.tensor([[0.0], [0.0]], dtype=torch.float64)
    concepts = torch.tensor([[3.0], [-3.0]], dtype=torch.float64)
    eps = torch.tensor([4.0, 4.0], dtype=torch.float64)
    problem = reduce_problem(torch.eye(2, dtype=torch.float64), outputs, concepts, eps, kind="ball", rounding=0.0)
    for moves in apart_start(problem):
        assert float(problem.margins(moves).min()) >= 0


def test_kkt_residual_sees_wrong_multipliers_and_wrong_edits() -> None:
    small = make(0, 4, 5, 3, 4)
    gram = small.inputs @ small.inputs.T
    eps = torch.full((4,), small.eps, dtype=torch.float64)
    problem = reduce_problem(gram, small.outputs, small.concepts, eps, kind="ball", rounding=0.0)
    found = solve_joint(problem)
    assert kkt_residual(problem, found.sources, found.multipliers) < 1e-5
    assert kkt_residual(problem, found.sources, 1.1 * found.multipliers) > 1e-2
    assert kkt_residual(problem, 1.1 * found.sources, 1.1 * found.multipliers) > 1e-2
    assert kkt_residual(problem, 0.9 * found.sources, found.multipliers) > 1e-2


@pytest.mark.parametrize("kind", ["ball", "half_space"])
def test_a_soft_margin_trades_cost_for_slack(kind: Kind) -> None:
    small = make(1, 10, 12, 8, 6, kind=kind)
    hard = solve(small).certificate
    costs = []
    for price in (1e-3, 1e-2, 1e-1, 1e4):
        proof = solve(small, soft_margin=price).certificate
        slack = float((-small.margins(solve(small, soft_margin=price).delta())).clamp(min=0).sum())
        assert proof.penalty == pytest.approx(price * slack, rel=1e-6, abs=1e-9)
        assert proof.lower_bound <= objective(proof) * (1 + 1e-9)
        assert objective(proof) <= hard.cost * (1 + 1e-6)
        assert proof.kkt_residual < 1e-4
        assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(proof.objectives))
        costs.append(proof.cost)
    assert costs == sorted(costs)
    assert costs[0] < 0.5 * hard.cost
    assert costs[-1] == pytest.approx(hard.cost, rel=1e-6)
