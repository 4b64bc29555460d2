"""The projection onto the simplex: against bisection and a quadratic program, exact points, odd shapes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from hf_unlearn.editing.regions.simplex import project_onto_simplex


def bisected(point: Tensor) -> Tensor:
    """One point: the tau with sum(max(y - tau, 0)) = 1 by halving an interval."""
    low, high = float(point.min()) - 1.0, float(point.max())
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if float((point - middle).clamp(min=0).sum()) > 1 else (low, middle)
    return (point - low).clamp(min=0)


@pytest.mark.parametrize("shape", [(1,), (2,), (7,), (3, 1), (4, 5), (2, 3, 11), (0, 4), (1000,)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_every_point_is_the_one_that_bisection_finds(shape: tuple[int, ...], scale: float) -> None:
    points = scale * torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = project_onto_simplex(points)
    assert found.shape == points.shape
    assert found.dtype == points.dtype
    for point, projected in zip(points.reshape(-1, shape[-1]), found.reshape(-1, shape[-1]), strict=True):
        torch.testing.assert_close(projected, bisected(point), rtol=0, atol=1e-12 * max(1.0, scale))


@pytest.mark.parametrize("seed", range(5))
def test_a_quadratic_program_finds_the_same(seed: int) -> None:
    point = torch.randn(6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).numpy()
    solved = minimize(
        lambda x: float(((x - point) ** 2).sum()),
        np.full(6, 1 / 6),
        jac=lambda x: 2 * (x - point),
        bounds=[(0, None)] * 6,
        constraints=[{"type": "eq", "fun": lambda x: x.sum() - 1, "jac": lambda x: np.ones(6)}],
        method="SLSQP",
        options={"ftol": 1e-15},
    )
    np.testing.assert_allclose(project_onto_simplex(torch.from_numpy(point)).numpy(), solved.x, atol=1e-6)


def test_points_of_the_simplex_stay_and_far_ones_become_vertices() -> None:
    inside = torch.tensor([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0]])
    torch.testing.assert_close(project_onto_simplex(inside), inside)
    torch.testing.assert_close(project_onto_simplex(torch.tensor([1e6, 0.0, -1e6])), torch.tensor([1.0, 0.0, 0.0]))
    torch.testing.assert_close(project_onto_simplex(torch.full((4,), -3e7)), torch.full((4,), 0.25))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_large_vocabulary_sums_to_one(dtype: torch.dtype) -> None:
    points = torch.randn(2, 50_000, generator=torch.Generator().manual_seed(0)).mul(0.01).to(dtype)
    found = project_onto_simplex(points)
    assert found.dtype == dtype
    assert (found >= 0).all()
    assert float((found.double().sum(-1) - 1).abs().max()) < (1e-2 if dtype == torch.bfloat16 else 1e-4)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (torch.zeros(3, 0), r"shape \(3, 0\); expected"),
        (torch.tensor(1.0), r"shape \(\); expected"),
        (torch.tensor([1.0, float("nan")]), "NaN or infinite"),
        (torch.tensor([1.0, float("inf")]), "NaN or infinite"),
    ],
)
def test_bad_points_are_refused(points: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        project_onto_simplex(points)
