"""The paper's solver: repair the most violated constraint, again and again. A baseline, not a minimiser."""

from __future__ import annotations

import torch
from torch import Tensor

from .bounds import ball_bound, half_space_bound
from .dual import solve_dual
from .problem import Problem, finite
from .solution import Solution, zero_solution
from .starts import single_start

_REFRESH = 256  # repairs after which running sums are computed anew


def _multipliers(problem: Problem, sources: Tensor) -> Tensor:
    """
    The multipliers `(N, n)` whose edit is nearest to the one given, over the constraints that bind there: the greedy
    solver has none of its own. If they reproduce the edit, it is stationary.
    """
    moves = problem.gram @ sources
    near = problem.margins(moves) <= 1e-6 * (1.0 + finite(problem.eps).abs()) + 2.0 * problem.aim
    found = torch.zeros(near.shape, dtype=torch.float64)
    rows, columns = near.nonzero(as_tuple=True)
    if len(rows):
        u = problem.normals(moves, rows, columns)[0]
        found[rows, columns] = solve_dual(u, rows, problem.gram, (u * moves[rows]).sum(1)).multipliers
    return found


def _lower_bound(problem: Problem, multipliers: Tensor, moves: Tensor) -> float:
    if problem.kind == "half_space":
        return half_space_bound(problem, multipliers)
    alone = single_start(problem, problem.margins(torch.zeros_like(moves)) < 0)[1]
    return max(ball_bound(problem, multipliers, moves), alone)


def repair(problem: Problem, max_rounds: int) -> tuple[Tensor, int, bool, bool]:
    """
    The loop of [`solve_greedy`]: sources `(N, p)`, the number of repairs, whether all constraints hold, and whether it
    ran in a circle. No violated activation may be zero.
    """
    moved = problem.outputs.clone()
    sources = torch.zeros_like(moved)
    diagonal = problem.gram.diagonal()
    constant = problem.concepts.square().sum(1)
    weights = constant if problem.kind == "half_space" else torch.ones_like(constant)
    products, squares = moved @ problem.concepts.T, moved.square().sum(1)
    saved, next_save, cycled, done, rounds = moved.clone(), 1, False, False, 0
    while rounds < max_rounds:
        if rounds % _REFRESH == 0:
            moved = problem.outputs + problem.gram @ sources
            products, squares = moved @ problem.concepts.T, moved.square().sum(1)
        if problem.kind == "half_space":
            margins = problem.eps - products
        else:
            margins = (squares[:, None] + constant - 2.0 * products).clamp(min=0.0).sqrt() - problem.eps
        row, column = divmod(int((margins - 0.5 * problem.aim).argmin()), len(problem.concepts))
        if float(margins[row, column]) >= 0.5 * float(problem.aim[row, column]):
            done = True
            break
        u, lack = _repair(problem, moved, row, column)
        step = max(lack, 0.0) / float(weights[column])
        sources[row] += step / diagonal[row] * u
        along = (step / diagonal[row]) * problem.gram[:, row]
        squares += 2.0 * along * (moved @ u) + along.square() * (u @ u)
        products += along[:, None] * (problem.concepts @ u)
        moved += along[:, None] * u
        rounds += 1
        if float((moved - saved).abs().max()) <= 1e-10 * float(moved.abs().max()):
            # repairs that shrink towards a limit also come to rest: no circle if what is left is rounding
            done = bool((problem.margins(problem.gram @ sources) >= -problem.aim).all())
            cycled = not done
            break
        if rounds == next_save:
            saved, next_save = moved.clone(), 2 * next_save
    return sources, rounds, done, cycled


def solve_greedy(problem: Problem, *, max_rounds: int = 10_000) -> Solution:
    r"""
    Repairs the pair with the smallest margin by the closed form for that pair alone,
    `Delta += [eps - ||r||]_+ / (h^T C^-1 h) * r / ||r|| (C^-1 h)^T`, until all hold (PCR, as published).

    A later repair keeps what earlier ones spent even where it is no longer needed, so the result costs more than the
    optimum; and with two concepts on either side of an output the repairs undo each other for ever. A repeated state
    is found by Brent's method and ends the run with `cycled`.

    Args:
        problem ([`Problem`]): what to solve. max_rounds (`int`, *optional*, defaults to 10,000): repairs at most.
    """
    none = torch.zeros_like(problem.outputs)
    if not bool((problem.margins(none) < 0).any()):
        return zero_solution(problem)
    fixed = (problem.margins(none) < 0) & (problem.gram.diagonal() <= 0)[:, None]
    if bool(fixed.any()):
        return zero_solution(problem, conflict=tuple((j, i) for j, i in fixed.nonzero().tolist()))
    sources, rounds, done, cycled = repair(problem, max_rounds)
    multipliers = _multipliers(problem, sources)
    cost = problem.cost(sources)
    return Solution(
        sources=sources,
        multipliers=multipliers,
        objectives=(cost,),
        lower_bound=_lower_bound(problem, multipliers, problem.gram @ sources),
        rounds=rounds,
        converged=done,
        cycled=cycled,
    )


def _repair(problem: Problem, moved: Tensor, row: int, column: int) -> tuple[Tensor, float]:
    """The direction `(p,)` of one repair and what the pair lacks."""
    if problem.kind == "half_space":
        w = problem.concepts[column]
        return -w, float(w @ moved[row] - problem.eps[row, column] + problem.aim[row, column])
    apart = moved[row] - problem.concepts[column]
    norm = float(torch.linalg.vector_norm(apart))
    size = float(torch.linalg.vector_norm(moved[row]))
    u = apart / norm if norm > 1e-13 * size else problem.spare
    return u, float(problem.eps[row, column] + problem.aim[row, column]) - norm
