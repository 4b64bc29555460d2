"""One activation, many concepts: the exact optimum, and a lower bound for any number of activations.

Shapes: n concepts, d width of the output.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .dual import solve_dual


@dataclass(frozen=True, kw_only=True)
class SingleActivation:
    """The shortest move that leaves every ball."""

    move: Tensor
    """v, shape `(d,)`."""
    square: float
    """A lower bound on `||v||^2`, attained where `exact`."""
    exact: bool
    """False only where the concepts surround the output in all d dimensions, so that there is no room aside."""


def _room(differences: Tensor) -> Tensor | None:
    """A unit vector orthogonal to all rows, from the axis that sticks out most; None where they fill the space."""
    size, vectors = torch.linalg.svd(differences, full_matrices=False)[1:]
    vectors = vectors[size > 1e-12 * size.max().clamp(min=1e-300)]
    left = 1.0 - vectors.square().sum(0)
    axis = torch.zeros(differences.shape[1], dtype=torch.float64)
    axis[int(left.argmax())] = 1.0
    for _ in range(2):
        axis = axis - (axis @ vectors.T) @ vectors
        norm = float(torch.linalg.vector_norm(axis))
        if norm < 1e-6:
            return None
        axis = axis / norm
    return axis


def solve_single_activation(differences: Tensor, eps: Tensor, *, aside: Tensor | None = None) -> SingleActivation:
    r"""
    `min ||v||` subject to `||r_i + v|| >= eps_i` for all i, globally, although the set is not convex (PCR):

    with $b_i = \varepsilon_i^2 - \lVert r_i \rVert^2$ and $G = R R^\top$,

    $$\lVert v^* \rVert^2 = \max_{w \ge 0} \frac{b^\top w - w^\top G w}{1 + 1^\top w}$$

    by Dinkelbach's method; $v^* = R^\top w$, plus a step aside, orthogonal to all r, where the norm is still short.

    Args:
        differences (`Tensor`): r_i = o - c_i, shape `(n, d)`.
        eps (`Tensor`): shape `(n,)`, in the units of the output.
        aside (`Tensor`, *optional*): a unit vector `(d,)` orthogonal to all r_i; searched for when left out.
    """
    r, eps = differences.double(), eps.double()
    norms = torch.linalg.vector_norm(r, dim=1)
    b = eps.square() - norms.square()
    square = float((eps - norms).clamp(min=0.0).square().max())
    move = torch.zeros(r.shape[1], dtype=torch.float64)
    if square == 0.0:
        return SingleActivation(move=move, square=0.0, exact=True)
    rows = torch.zeros(len(r), dtype=torch.long)
    curvature = torch.full((1, 1), 2.0, dtype=torch.float64)  # so that 1/2 a^T Q a is w^T G w
    weights: Tensor | None = None
    for _ in range(60):
        found = solve_dual(r, rows, curvature, b - square, start=weights)
        weights = found.multipliers
        if len(found.conflict):  # the value grows without bound along a ray: its slope is the ratio
            ray = torch.zeros_like(weights)
            ray[found.conflict] = weights[found.conflict]
            better, weights = (float(b @ ray) / float(ray.sum()) if float(ray.sum()) > 0 else square), None
        else:
            short = weights @ r
            better = (float(b @ weights) - float(short @ short)) / (1.0 + float(weights.sum()))
        if better <= square * (1.0 + 1e-14):
            break
        square = better
    move = move if weights is None else weights @ r
    lack = square - float(move @ move)
    exact = True
    if lack > 1e-12 * square:
        direction = aside if aside is not None else _room(r)
        exact = direction is not None
        if direction is not None:
            move = move + lack**0.5 * direction
    return SingleActivation(move=move, square=square, exact=exact)
