"""What a solver hands back, and how far it is from the optimality conditions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .problem import Problem

Pair = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Solution:
    """An edit in the coordinates of its [`Problem`]; N activations, n concepts, p coordinates."""

    sources: Tensor
    """shape `(N, p)`; the edit is `sum_j sources_j (C^-1 h_j)^T`."""
    multipliers: Tensor
    """shape `(N, n)`, not negative."""
    objectives: tuple[float, ...]
    """Cost, with the penalty of a soft margin, after each round."""
    lower_bound: float
    rounds: int
    """Linear programs of the joint solver, or repairs of the greedy one."""
    converged: bool
    cycled: bool = False
    conflict: tuple[Pair, ...] = ()
    """Pairs (activation, concept) that no edit satisfies together."""


def zero_solution(problem: Problem, *, conflict: tuple[Pair, ...] = (), rounds: int = 0) -> Solution:
    """No edit: because nothing is violated, or because `conflict` leaves no edit."""
    return Solution(
        sources=torch.zeros_like(problem.outputs),
        multipliers=torch.zeros(len(problem.outputs), len(problem.concepts), dtype=torch.float64),
        objectives=(0.0,),
        lower_bound=torch.inf if conflict else 0.0,
        rounds=rounds,
        converged=not conflict,
        conflict=conflict,
    )


def scatter(problem: Problem, multipliers: Tensor, u: Tensor, rows: Tensor) -> Tensor:
    """`sum_k a_k u_k` of the pairs of each activation, shape `(N, p)`; `multipliers` `(K,)`, `u` `(K, p)`."""
    found = torch.zeros_like(problem.outputs)
    return found.index_add_(0, rows, multipliers[:, None] * u)


def kkt_residual(problem: Problem, sources: Tensor, multipliers: Tensor, kappa: float | None = None) -> float:
    r"""
    The largest of three relative residuals of the true problem, normals taken where the edit ends:

    It is that of the problem as solved, with every margin raised by `aim`, which only rounding may use up:
    stationarity $\lVert \Delta - \sum_k a_k u_k (C^{-1} h_k)^\top \rVert_C / \lVert \Delta \rVert_C$; what a margin
    lacks, over the longest move; complementarity $\sum_k a_k |m_k| / \mathrm{tr}(\Delta C \Delta^\top)$. With a soft
    margin, pairs whose multiplier is at kappa may lack what they lack.

    Args:
        problem ([`Problem`]): the problem.
        sources (`Tensor`): shape `(N, p)`. multipliers (`Tensor`): shape `(N, n)`.
        kappa (`float`, *optional*): the bound on multipliers.
    """
    moves = problem.gram @ sources
    margins = problem.margins(moves)
    tight = margins - problem.aim
    if kappa is not None:
        capped = multipliers >= kappa
        margins = torch.where(capped, margins.clamp(min=0.0), margins)
        tight = torch.where(capped, tight.clamp(min=0.0), tight)
    energy = float((sources * moves).sum())
    lack = float((-margins).clamp(min=0.0).max())
    if energy <= 0.0:
        return 0.0 if lack == 0.0 else 1.0
    rows, columns = (multipliers > 0).nonzero(as_tuple=True)
    a = multipliers[rows, columns]
    off = sources - scatter(problem, a, problem.normals(moves, rows, columns)[0], rows)
    stationarity = (max(float((off * (problem.gram @ off)).sum()), 0.0) / energy) ** 0.5
    primal = lack / float(torch.linalg.vector_norm(moves, dim=1).max())
    complementarity = float((a * tight[rows, columns].abs()).sum()) / energy
    return max(stationarity, primal, complementarity)
