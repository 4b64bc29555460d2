"""Where the rounds of joint PCR may start when the outputs themselves do not lead to the optimum.

Shapes: N activations, n concepts, p coordinates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dinkelbach import solve_single_activation
from .problem import Problem


def single_start(problem: Problem, violated: Tensor) -> tuple[Tensor, float]:
    r"""
    The shortest moves `(N, p)` that satisfy the constraints of each activation alone, and the lower bound
    $\max_j \lVert v_j^* \rVert^2 / (2\, h_j^\top C^{-1} h_j)$ on the cost of any edit.

    `violated` `(N, n)` are the pairs that no edit at all leaves violated.
    """
    moves = torch.zeros_like(problem.outputs)
    squares = torch.zeros(len(moves), dtype=torch.float64)
    everyone = torch.arange(len(moves))
    # one violated concept: the closed form, for all at once
    apart = problem.margins(moves)
    worst = apart.argmin(1)
    u = problem.normals(moves, everyone, worst)[0]
    lack = (-apart.gather(1, worst[:, None]).squeeze(1)).clamp(min=0.0)
    moves = lack[:, None] * u
    squares = lack.square()
    open_rows = violated.any(1) & (problem.margins(moves) < -1e-9 * (1.0 + problem.eps)).any(1)
    for row in open_rows.nonzero().squeeze(1).tolist():
        own = violated[row].clone()
        aside = problem.signs[row] * problem.spare if problem.has_room else None
        for _ in range(len(own)):
            differences = problem.outputs[row] - problem.concepts[own]
            found = solve_single_activation(differences, problem.eps[row, own], aside=aside)
            distances = torch.linalg.vector_norm(problem.outputs[row] + found.move - problem.concepts, dim=1)
            new = (distances < problem.eps[row] * (1.0 - 1e-9)) & ~own
            if not bool(new.any()):
                break
            own |= new
        moves[row], squares[row] = found.move, found.square
    diagonal = problem.gram.diagonal()
    costs = torch.where(diagonal > 0, squares / (2.0 * diagonal.clamp(min=1e-300)), 0.0)
    return moves, float(costs.max())


def apart_start(problem: Problem) -> list[Tensor]:
    """
    Moves `(N, p)` of a real edit that satisfies everything: one direction, so far that no ball is near. There is one
    whenever no violated activation is zero, as balls can be left on any side.
    """
    rows = (problem.gram.diagonal() > 0).nonzero().squeeze(1)
    root = problem.gram.diagonal().clamp(min=1e-300).sqrt()
    weights = torch.where(problem.gram.diagonal() > 0, problem.signs / root, 0.0)
    for row in rows.tolist():
        # an activation that this direction of inputs hardly sees is added to it
        seen = float(problem.gram[row] @ weights)
        if abs(seen) < 0.1 * float(root[row]):
            weights[row] += 1.0 / root[row] if seen >= 0 else -1.0 / root[row]
    reach = problem.gram @ weights
    nearest = float(reach[rows].abs().min())
    if nearest <= 0.0:
        return []
    distance = float((problem.margins(torch.zeros_like(problem.outputs)) + problem.eps).max())
    need = distance + float((problem.eps + problem.aim).max())
    return [sign * need / nearest * reach[:, None] * problem.spare for sign in (1.0, -1.0)]
