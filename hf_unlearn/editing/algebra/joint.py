"""Joint PCR: all constraints at once, by programs whose linear constraints imply the true ones.

Shapes: N activations, n concepts, p coordinates, K pairs in the working set.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .bounds import ball_bound, half_space_bound
from .dual import solve_dual
from .greedy import repair
from .problem import Problem
from .solution import Pair, Solution, kkt_residual, zero_solution
from .starts import apart_start, single_start

_SCANS = 500
_REPAIRS = 10_000  # of the greedy solver, where its result is a start
_NEW = (
    8  # violated pairs of one activation that enter the working set at a time: moving away from one often clears more
)


@dataclass(frozen=True, kw_only=True)
class _Round:
    """One program solved: the edit, its multipliers `(N, n)` and the objective of the true problem."""

    sources: Tensor
    moves: Tensor
    multipliers: Tensor
    objective: float
    conflict: tuple[Pair, ...]


def _worst(margins: Tensor, candidates: Tensor) -> Tensor:
    """The few pairs of each activation with the smallest margins among `candidates`; all shapes `(N, n)`."""
    if candidates.shape[1] <= _NEW:
        return candidates
    places = torch.where(candidates, margins, torch.inf).topk(_NEW, dim=1, largest=False).indices
    return torch.zeros_like(candidates).scatter_(1, places, True) & candidates


def _round(problem: Problem, reference: Tensor, working: Tensor, multipliers: Tensor, kappa: float | None) -> _Round:
    """
    The cheapest edit with the constraints made linear at `reference` `(N, p)`. The pairs are those in `working`
    `(N, n)`, to which all that the edit violates are added, until there are none; `working` is changed.
    """
    for _ in range(_SCANS):
        rows, columns = working.nonzero(as_tuple=True)
        u, beta = problem.normals(reference, rows, columns)
        upper = None if kappa is None else torch.full_like(beta, kappa)
        found = solve_dual(u, rows, problem.gram, beta, upper=upper, start=multipliers[rows, columns])
        multipliers = torch.zeros_like(multipliers)
        multipliers[rows, columns] = found.multipliers
        if len(found.conflict):
            pairs = zip(rows[found.conflict].tolist(), columns[found.conflict].tolist(), strict=True)
            return _Round(
                sources=found.sources,
                moves=found.moves,
                multipliers=torch.zeros_like(multipliers),
                objective=torch.inf,
                conflict=tuple(pairs),
            )
        margins = problem.margins(found.moves)
        new = (margins < 0.5 * problem.aim) & ~working
        if not bool(new.any()):
            break
        working |= _worst(margins, new)
    penalty = 0.0 if kappa is None else kappa * problem.slack(found.moves)
    return _Round(
        sources=found.sources,
        moves=found.moves,
        multipliers=multipliers,
        objective=problem.cost(found.sources) + penalty,
        conflict=(),
    )


def _bound(problem: Problem, last: _Round, kappa: float | None, *, tight: bool = False) -> float:
    if problem.kind == "half_space":
        return half_space_bound(problem, last.multipliers, tight=tight)
    return ball_bound(problem, last.multipliers, last.moves, kappa, tight=tight)


def _ahead(problem: Problem, made: _Round, working: Tensor, kappa: float | None) -> Tensor | None:
    r"""
    Where the next normals will be, to second order: the program with the curvature of the balls in its metric,
    $G^{-1} - 2\Lambda$ with $\Lambda_j = \sum_{k \in j} a_k / (2 \lVert r_k + v_j \rVert)$ (a step of sequential
    quadratic programming). Returns moves `(N, p)`, or None if that program has no solution.
    """
    rows, columns = working.nonzero(as_tuple=True)
    u, _ = problem.normals(made.moves, rows, columns)
    norms = torch.linalg.vector_norm(problem.differences(made.moves, rows, columns), dim=1).clamp(min=1e-300)
    a = made.multipliers[rows, columns]
    twice = torch.zeros(len(working), dtype=torch.float64).index_add_(0, rows, a / norms)
    root = twice.sqrt()
    values, vectors = torch.linalg.eigh(root[:, None] * problem.gram * root)
    share = min(1.0, 0.95 / max(float(values[-1]), 1e-300))
    values = (share * values).clamp(min=0.0)
    inner = (share**0.5) * (problem.gram * root) @ vectors
    gram = problem.gram + (inner / (1.0 - values)) @ inner.T
    shift = -gram @ (share * twice[:, None] * made.moves)
    wanted = (problem.eps[rows, columns] + problem.aim[rows, columns]).square() - norms.square()
    beta = wanted / (2.0 * norms) + (u * (made.moves - shift)[rows]).sum(1)
    upper = None if kappa is None else torch.full_like(beta, kappa)
    found = solve_dual(u, rows, (gram + gram.T) / 2.0, beta, upper=upper, start=a)
    return None if len(found.conflict) else shift + found.moves


def _descend(
    problem: Problem, reference: Tensor, working: Tensor, *, kappa: float | None, max_rounds: int, tolerance: float
) -> tuple[list[_Round], bool]:
    """
    Rounds from one reference, and whether they converged. An edit satisfies the constraints made linear at itself, so
    that no round costs more than the last; a reference ahead of it is tried first, and dropped if it does.
    """
    rounds: list[_Round] = []
    multipliers = torch.zeros(working.shape, dtype=torch.float64)
    ahead = False
    for _ in range(max_rounds):
        made = _round(problem, reference, working, multipliers, kappa)
        if made.conflict and not rounds:
            return [made], False
        if rounds and made.objective > rounds[-1].objective * (1.0 + 1e-13):
            if not ahead:
                break
            reference, ahead = rounds[-1].moves, False
            continue
        rounds.append(made)
        multipliers = made.multipliers
        done = kkt_residual(problem, made.sources, multipliers, kappa) <= tolerance
        if done or problem.kind == "half_space":
            return rounds, done
        forward = _ahead(problem, made, working, kappa)
        reference, ahead = (made.moves, False) if forward is None else (forward, True)
    return rounds, kkt_residual(problem, rounds[-1].sources, rounds[-1].multipliers, kappa) <= tolerance


def solve_joint(
    problem: Problem, *, kappa: float | None = None, max_rounds: int = 100, tolerance: float = 1e-6
) -> Solution:
    r"""
    `min 1/2 tr(Delta C Delta^T)` subject to all constraints (PCR, joint form).

    For unit vectors u, $u^\top (r + \Delta h) \ge \varepsilon$ implies $\lVert r + \Delta h \rVert \ge \varepsilon$.
    Each round takes $u = (r + v) / \lVert r + v \rVert$ at the last moves v and solves the program that is left. Balls
    are not convex: unless the lower bound shows that the first result is optimal, the rounds are repeated from the
    moves that are optimal for each activation alone, then from the greedy solver's result and from moves far away, and
    the cheapest result is taken.

    Args:
        problem ([`Problem`]): what to solve.
        kappa (`float`, *optional*): price of a unit of what a margin lacks; constraints are hard when left out.
        max_rounds (`int`, *optional*, defaults to 100): rounds from each start. tolerance (`float`): of the KKT
            residual, relative.
    """
    none = torch.zeros_like(problem.outputs)
    margins = problem.margins(none)
    if not bool((margins < 0).any()):
        return zero_solution(problem)
    first = margins < 0.5 * problem.aim
    if problem.kind == "ball" and kappa is None:  # Delta h is 0 for a zero activation, and can be anything for others
        fixed = first & (problem.gram.diagonal() <= 0)[:, None]
        if bool(fixed.any()):
            return zero_solution(problem, conflict=tuple((j, i) for j, i in fixed.nonzero().tolist()))
    working = _worst(margins, first)

    def descend(reference: Tensor) -> tuple[list[_Round], bool]:
        return _descend(problem, reference, working.clone(), kappa=kappa, max_rounds=max_rounds, tolerance=tolerance)

    rounds, converged = descend(none)
    if rounds[-1].conflict and problem.kind == "half_space":
        return zero_solution(problem, conflict=rounds[-1].conflict, rounds=len(rounds))
    alone = 0.0
    if problem.kind == "ball" and not _is_optimal(problem, rounds[-1], kappa, tolerance):
        moves, alone = single_start(problem, first)
        for start in (lambda: [moves], lambda: _repaired(problem), lambda: apart_start(problem)):
            for reference in start():
                others, done = descend(reference)
                if others[-1].objective < rounds[-1].objective:
                    rounds, converged = others, done
            if not rounds[-1].conflict and _is_optimal(problem, rounds[-1], kappa, tolerance):
                break
    last = rounds[-1]
    if last.conflict:  # linear constraints that contradict each other prove nothing about balls
        return replace(zero_solution(problem, rounds=len(rounds)), lower_bound=alone, converged=False)
    lower = max(_bound(problem, last, kappa), alone if kappa is None else 0.0)
    return Solution(
        sources=last.sources,
        multipliers=last.multipliers,
        objectives=tuple(made.objective for made in rounds),
        lower_bound=min(lower, last.objective),
        rounds=len(rounds),
        converged=converged,
    )


def _repaired(problem: Problem) -> list[Tensor]:
    """Moves `(N, p)` of the greedy solver where it ends, so that the joint one never costs more than it."""
    if bool((problem.gram.diagonal() <= 0).any()):
        return []
    sources, _, done, _ = repair(problem, _REPAIRS)
    return [problem.gram @ sources] if done else []


def _is_optimal(problem: Problem, last: _Round, kappa: float | None, tolerance: float) -> bool:
    """Whether the lower bound meets the objective, both of the margins as raised by `aim`."""
    if last.conflict:
        return False
    penalty = 0.0
    if kappa is not None:
        penalty = kappa * float((problem.aim - problem.margins(last.moves)).clamp(min=0.0).sum())
    bound = _bound(problem, last, kappa, tight=True)
    return problem.cost(last.sources) + penalty <= bound * (1.0 + tolerance)
