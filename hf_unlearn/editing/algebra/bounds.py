"""Lower bounds on the cost of any edit that satisfies the constraints, valid for whatever multipliers are given."""

from __future__ import annotations

import torch
from torch import Tensor

from .problem import Problem


def half_space_bound(problem: Problem, multipliers: Tensor, *, tight: bool = False) -> float:
    """
    The dual objective `beta^T a - 1/2 a^T Q a`: for half-spaces the problem is convex and the bound is tight at the
    optimal multipliers `(N, n)`. `tight`: a bound for margins raised by `aim`, which is what the solvers solve.
    """
    rows, columns = (multipliers > 0).nonzero(as_tuple=True)
    a = multipliers[rows, columns]
    u, beta = problem.normals(torch.zeros_like(problem.outputs), rows, columns)
    sources = torch.zeros_like(problem.outputs).index_add_(0, rows, a[:, None] * u)
    aim = 0.0 if tight else problem.aim[rows, columns]
    return max(float(((beta - aim) * a).sum()) - problem.cost(sources), 0.0)


def ball_bound(
    problem: Problem, multipliers: Tensor, moves: Tensor, kappa: float | None = None, *, tight: bool = False
) -> float:
    r"""
    The Lagrangian of the squared constraints `||r_k + v_j||^2 >= eps_k^2`, minimised over all edits, at
    $\lambda_k = t\, a_k / (2 \lVert r_k + v_j \rVert)$ with the best t in [0, 1]:

    $$\sum_k \lambda_k b_k - \tfrac12 \mathrm{tr}\, S^\top (G^{-1} - 2\Lambda)^{-1} S, \qquad
      b_k = \varepsilon_k^2 - \lVert r_k \rVert^2,\; S_j = 2 \sum_{k \in j} \lambda_k r_k$$

    where $G^{-1} - 2 \Lambda$ is positive definite. If it still is at t = 1, the bound meets the cost of a stationary
    point, which is then the global optimum.

    Args:
        problem ([`Problem`]): with balls.
        multipliers (`Tensor`): a, shape `(N, n)`. moves (`Tensor`): v, shape `(N, p)`.
        kappa (`float`, *optional*): the bound on the multipliers of a soft margin, whose penalty then counts.
        tight (`bool`, *optional*, defaults to `False`): a bound for margins raised by `aim`.
    """
    rows, columns = (multipliers > 0).nonzero(as_tuple=True)
    if not len(rows):
        return 0.0
    r = problem.outputs[rows] - problem.concepts[columns]
    apart = torch.linalg.vector_norm(problem.differences(moves, rows, columns), dim=1)
    weights = multipliers[rows, columns] / (2.0 * apart.clamp(min=1e-300))
    which, index = torch.unique(rows, return_inverse=True)
    per_row = torch.zeros(len(which), dtype=torch.float64).index_add_(0, index, weights)
    sides = torch.zeros(len(which), r.shape[1], dtype=torch.float64)
    sides.index_add_(0, index, 2.0 * weights[:, None] * r)
    root = (2.0 * per_row).sqrt()
    values, vectors = torch.linalg.eigh(root[:, None] * problem.gram[which][:, which] * root)
    values = values.clamp(min=0.0)
    energies = (vectors.T @ (sides / root[:, None])).square().sum(1)
    eps, squares = problem.eps[rows, columns], r.square().sum(1)
    if tight:
        eps = eps + problem.aim[rows, columns]

    def bound(t: float) -> float:
        share = t * values
        if float(share.max()) >= 1.0:
            return 0.0
        w = t * weights
        kept = w * eps.square()
        if kappa is not None:  # min over a slack s in [0, eps] of kappa s + w (eps - s)^2
            soft = kappa * eps - kappa**2 / (4.0 * w.clamp(min=1e-300))
            kept = torch.where(2.0 * w * eps > kappa, soft, kept)
        return float((kept - w * squares).sum()) - 0.5 * t * float((share / (1.0 - share) * energies).sum())

    most = min(1.0, (1.0 - 1e-9) / max(float(values.max()), 1e-300))
    # concave in t: golden-section search, and the end itself
    low, high, ratio = 0.0, most, (5.0**0.5 - 1.0) / 2.0
    for _ in range(60):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if bound(left) < bound(right):
            low = left
        else:
            high = right
    return max(bound(most), bound((low + high) / 2.0), 0.0)
