"""Degenerate and impossible problems, types, and what a caller is told."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from small import Small, make

from hf_unlearn.editing import Edit, Kind, solve_pcr

D = torch.float64


def rows(*values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=D)


def test_nothing_violated_is_an_edit_of_rank_zero() -> None:
    small = make(0, 5, 6, 4, 3, factor=0.0)
    for solver in ("joint", "greedy"):
        edit = solve_pcr(small.inputs, small.outputs, small.concepts, small.eps, solver=solver)
        assert edit.lora_a.shape == (0, 6)
        assert edit.lora_b.shape == (4, 0)
        assert not edit.delta().any()
        proof = edit.certificate
        assert (proof.feasible, proof.cost, proof.gap, proof.rank, proof.kkt_residual) == (True, 0.0, 0.0, 0, 0.0)


def test_contradicting_half_spaces_are_named() -> None:
    """h and -2 h, and both outputs shall move down along the same direction."""
    inputs = rows([1.0, 2.0, 0.0], [-2.0, -4.0, 0.0], [0.0, 0.0, 1.0])
    edit = solve_pcr(
        inputs, torch.zeros(3, 2, dtype=D), rows([1.0, 0.0], [0.0, 1.0]), rows([-1.0, 5.0])[0], kind="half_space"
    )
    proof = edit.certificate
    assert proof.conflict == ((0, 0), (1, 0))
    assert not proof.feasible
    assert not proof.converged
    assert proof.violated == ((0, 0), (1, 0), (2, 0))
    assert proof.lower_bound == float("inf")
    assert not edit.delta().any()


def test_a_soft_margin_solves_what_contradicts_itself() -> None:
    inputs = rows([1.0, 2.0], [-2.0, -4.0])
    zeros = torch.zeros(2, 1, dtype=D)
    proof = solve_pcr(inputs, zeros, rows([1.0]), -1.0, kind="half_space", soft_margin=0.5).certificate
    assert not proof.conflict
    # one move x of the first output costs x^2 / 10; the slacks are 1 + x and 1 - 2 x, at half a unit each
    best = min(x * x / 10 + 0.5 * (max(1 + x, 0) + max(1 - 2 * x, 0)) for x in (k / 1e4 for k in range(-20000, 20000)))
    assert proof.cost + proof.penalty == pytest.approx(best, rel=1e-6)
    assert proof.gap < 1e-6


@pytest.mark.parametrize("kind", ["ball", "half_space"])
@pytest.mark.parametrize("solver", ["joint", "greedy"])
def test_a_zero_activation_is_left_alone_or_reported(kind: Any, solver: Any) -> None:
    inputs = rows([0.0, 0.0], [1.0, 1.0])
    concept, eps = (rows([0.1, 0.0]), 1.0) if kind == "ball" else (rows([1.0, 0.0]), -1.0)
    proof = solve_pcr(inputs, torch.zeros(2, 2, dtype=D), concept, eps, kind=kind, solver=solver).certificate
    assert proof.conflict == ((0, 0),)
    assert not proof.feasible
    outputs = rows([-9.0, 0.0], [0.0, 0.0])  # the zero activation's own constraint holds
    proof = solve_pcr(inputs, outputs, concept, eps, kind=kind, solver=solver).certificate
    assert proof.feasible
    assert proof.rank == 1


def test_balls_around_opposite_activations_are_left_on_opposite_sides() -> None:
    """The outputs lie so that the nearest ways out contradict each other, yet balls can be left on any side."""
    inputs = rows([1.0, 0.0], [-1.0, 0.0])
    outputs = rows([0.1, 0.0, 0.0], [0.1, 0.0, 0.0])
    small = Small(torch.zeros(3, 2, dtype=D), inputs, torch.zeros(1, 3, dtype=D), 1.0)
    edit = solve_pcr(inputs, outputs, small.concepts, 1.0)
    moved = outputs + inputs @ edit.delta().T
    assert edit.certificate.feasible
    assert float(moved.norm(dim=1).min()) >= 1.0
    # aside: 0.1^2 + t^2 = 1, both outputs by the same t, so Delta has norm t
    assert edit.certificate.cost == pytest.approx(0.5 * (1 - 0.01), rel=1e-4)


def test_outputs_on_their_concepts_have_a_deterministic_way_out() -> None:
    outputs = rows([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0], [0.0, 1.0, 0.0, 0.0])
    inputs = rows([1.0, 0.0], [1.0, 0.0], [0.0, 1.0])
    edits = [solve_pcr(inputs, outputs, outputs[[0, 2]], 2.0) for _ in range(2)]
    proof = edits[0].certificate
    assert proof.feasible
    assert proof.cost == pytest.approx(0.5 * (4.0 + 4.0), rel=1e-4)
    assert torch.equal(edits[0].delta(), edits[1].delta())


@pytest.mark.parametrize("width", [1, 2, 3, 7])
def test_collinear_concepts_make_the_greedy_solver_cycle_and_not_the_joint_one(width: int) -> None:
    axis = torch.zeros(width, dtype=D)
    axis[0] = 1.0
    concepts = torch.stack([-axis, axis])
    inputs, outputs = rows([1.0, 2.0]), torch.full((1, width), 0.0, dtype=D) + 0.1 * axis
    greedy = solve_pcr(inputs, outputs, concepts, 1.5, solver="greedy", max_rounds=500).certificate
    assert greedy.cycled
    assert greedy.rounds < 50
    assert not greedy.feasible
    assert greedy.violated
    proof = solve_pcr(inputs, outputs, concepts, 1.5).certificate
    assert proof.feasible
    if width > 1:
        assert proof.gap < 1e-6
    else:  # on a line the way out jumps over a concept: 1 + 1.5 - 0.1 to the side of the output
        assert proof.cost == pytest.approx(0.5 * 2.4**2 / 5, rel=1e-6)


@pytest.mark.parametrize("shape", [(1, 3), (5, 1)])
def test_parallel_activations_and_coincident_concepts(shape: tuple[int, int]) -> None:
    n_act, n_con = shape
    base = make(0, 1, 6, 5, n_con)
    scales = torch.linspace(0.5, 1.5, n_act, dtype=D)[:, None]
    small = Small(base.weight, base.inputs * scales, torch.cat([base.concepts] * 2), 1.1 * base.eps)
    edit = solve_pcr(small.inputs, small.outputs, small.concepts, small.eps)
    assert edit.certificate.feasible
    assert edit.certificate.rank == 1
    assert float(small.margins(edit.delta()).min()) >= 0
    assert edit.certificate.kkt_residual < 1e-4


def test_eps_may_differ_between_concepts() -> None:
    small = make(1, 4, 6, 5, 3)
    eps = small.eps * rows([0.5, 1.0, 1.3])[0]
    edit = solve_pcr(small.inputs, small.outputs, small.concepts, eps)
    moved = small.inputs @ (small.weight + edit.delta()).T
    assert float((torch.cdist(moved, small.concepts) - eps).min()) >= -1e-12


@pytest.mark.parametrize(
    ("given", "returned"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_types_of_result_and_strictness_after_rounding(given: torch.dtype, returned: torch.dtype) -> None:
    small = make(2, 10, 30, 24, 8)
    inputs, outputs, concepts = (t.to(given) for t in (small.inputs, small.outputs, small.concepts))
    edit = solve_pcr(inputs, outputs, concepts, small.eps, retain_inputs=inputs[:3].flip(0) * 2)
    assert edit.lora_a.dtype == edit.lora_b.dtype == returned
    moved = outputs.double() + inputs.double() @ edit.delta().double().T
    assert float((moved[:, None] - concepts.double()).norm(dim=2).min()) >= small.eps
    assert edit.certificate.feasible
    assert edit.certificate.gap < 1e-3


def test_retain_inputs_lower_the_disturbance() -> None:
    small = make(3, 6, 30, 20, 5)
    retain = torch.randn(12, 30, generator=torch.Generator().manual_seed(1)).double() * 3
    plain = solve_pcr(small.inputs, small.outputs, small.concepts, small.eps)
    kept = solve_pcr(small.inputs, small.outputs, small.concepts, small.eps, retain_inputs=retain)
    assert plain.certificate.retained_disturbance is None
    before = float((retain @ plain.delta().T).square().sum(1).mean())
    after = float((retain @ kept.delta().T).square().sum(1).mean())
    assert kept.certificate.retained_disturbance == pytest.approx(after, rel=1e-8)
    assert after < 0.1 * before


def test_certificate_goes_through_json_and_cannot_be_changed() -> None:
    proof = solve_pcr(rows([1.0]), rows([0.1]), rows([0.0]), 1.0).certificate
    assert json.loads(json.dumps(proof.as_dict()))["rank"] == 1
    with pytest.raises(AttributeError):
        proof.cost = 0.0  # type: ignore[misc]  # frozen: that is the point


GOOD: dict[str, Any] = {
    "inputs": torch.ones(2, 3),
    "outputs": torch.ones(2, 4),
    "concepts": torch.ones(5, 4),
    "eps": 1.0,
}


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"inputs": torch.tensor([[1.0, float("nan"), 0.0]] * 2)}, ValueError, "nan or inf in row 0"),
        ({"outputs": torch.full((2, 4), float("inf"))}, ValueError, "expected outputs to be finite"),
        ({"inputs": torch.ones(2, 3, dtype=torch.int64)}, TypeError, "expected inputs to be a floating-point tensor"),
        ({"concepts": [[1.0]]}, TypeError, "got a list"),
        ({"inputs": torch.ones(3)}, ValueError, r"got \(3,\)"),
        ({"outputs": torch.ones(3, 4)}, ValueError, r"outputs of shape \(N, d\) = \(2, any\)"),
        ({"concepts": torch.ones(5, 3)}, ValueError, r"\(any, 4\) with at least one row, got \(5, 3\)"),
        ({"concepts": torch.ones(0, 4)}, ValueError, "at least one row"),
        ({"retain_inputs": torch.ones(5, 2)}, ValueError, "retain_inputs"),
        ({"eps": -1.0}, ValueError, "0 or more"),
        ({"eps": float("nan")}, ValueError, "expected eps to be finite"),
        ({"eps": torch.ones(3)}, ValueError, r"\(n,\) = \(5,\)"),
        ({"kind": "cone"}, ValueError, "ball, half_space"),
        ({"solver": "newton"}, ValueError, "'joint' or 'greedy'"),
        ({"solver": "greedy", "soft_margin": 1.0}, ValueError, "no soft_margin"),
        ({"soft_margin": 0.0}, ValueError, "above 0"),
        ({"ridge": -1.0}, ValueError, "ridge"),
        ({"tolerance": float("inf")}, ValueError, "tolerance"),
        ({"max_rounds": 0}, ValueError, "at least 1"),
        ({"kind": "half_space", "concepts": torch.zeros(5, 4)}, ValueError, "zero vector in row 0"),
    ],
)
def test_bad_input_is_refused_with_what_to_do(change: dict[str, Any], error: type[Exception], text: str) -> None:
    assert isinstance(solve_pcr(**GOOD), Edit)
    with pytest.raises(error, match=text):
        solve_pcr(**{**GOOD, **change})


def test_solvers_need_torch_only() -> None:
    code = (
        "import sys; from hf_unlearn.editing import solve_pcr; "
        "print([m for m in ('transformers', 'peft', 'scipy', 'datasets') if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


@pytest.mark.parametrize("kind", ["ball", "half_space"])
@pytest.mark.parametrize("solver", ["joint", "greedy"])
def test_a_level_for_each_pair_binds_that_pair_alone(kind: Kind, solver: Any) -> None:
    small = make(2, 6, 14, 10, 4, kind=kind)
    whole = solve_pcr(small.inputs, small.outputs, small.concepts, small.eps, kind=kind, solver=solver)
    same = torch.full((6, 4), small.eps, dtype=torch.float64)
    again = solve_pcr(small.inputs, small.outputs, small.concepts, same, kind=kind, solver=solver)
    assert torch.equal(whole.delta(), again.delta())

    free = torch.rand(6, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    levels = torch.where(free, 0.0 if kind == "ball" else torch.inf, same)
    some = solve_pcr(small.inputs, small.outputs, small.concepts, levels, kind=kind, solver=solver)
    margins = small.margins(some.delta())
    assert some.certificate.feasible
    assert float(margins[~free].min()) >= 0
    if solver == "joint":
        assert some.certificate.cost < whole.certificate.cost
        assert some.certificate.kkt_residual < 1e-4
        alone = [  # a pair at a time costs no more than all together
            solve_pcr(small.inputs[[j]], small.outputs[[j]], small.concepts[[i]], small.eps, kind=kind)
            for j, i in (~free).nonzero().tolist()
        ]
        assert max(edit.certificate.cost for edit in alone) <= some.certificate.cost * (1 + 1e-9)
    nothing = solve_pcr(
        small.inputs,
        small.outputs,
        small.concepts,
        torch.full((6, 4), 0.0 if kind == "ball" else torch.inf),
        kind=kind,
        solver=solver,
    )
    assert nothing.certificate.rank == 0


def test_a_level_that_leaves_a_pair_free_is_for_half_spaces() -> None:
    small = make(0, 3, 6, 5, 2)
    with pytest.raises(ValueError, match="expected eps to be finite"):
        solve_pcr(small.inputs, small.outputs, small.concepts, torch.full((3, 2), torch.inf))
    with pytest.raises(ValueError, match=r"\(n,\) = \(2,\) or \(N, n\) = \(3, 2\), got \(2, 3\)"):
        solve_pcr(small.inputs, small.outputs, small.concepts, torch.ones(2, 3))
