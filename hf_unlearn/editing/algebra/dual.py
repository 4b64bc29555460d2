"""The quadratic program behind every edit, solved in its multipliers.

Shapes: N activations, p coordinates of an output, K linear constraints.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_DENSE = 4096  # free multipliers up to which the face system is factored; above, conjugate gradients without a matrix
_CANCEL = 1e-12  # a^T Q a / (sum_k a_k sqrt(Q_kk))^2 below which the constraints contradict each other
_ITERATIONS = 100
_CUTS = 200  # times that one Newton step is cut
_FEW = 4  # times more activations than have a multiplier, from which on the others are left out of products
_CHUNK = 2048  # rows of the gram matrix of the free constraints that are computed at a time


@dataclass(frozen=True, kw_only=True)
class DualSolution:
    """Multipliers a `(K,)`, sources `(N, p)` and moves `(N, p)` of the edit that they make."""

    multipliers: Tensor
    sources: Tensor
    moves: Tensor
    value: float
    """The dual objective: a lower bound on the optimum of this program."""
    residual: float
    """Largest violation of the optimality conditions, in the units of beta."""
    conflict: Tensor
    """Indices of constraints that no edit satisfies together; empty where there is an edit."""


class _Program:
    """`max_{0 <= a <= upper} beta^T a - 1/2 a^T Q a`, `Q_kl = (u_k . u_l) gram[rows_k, rows_l]`, without Q itself."""

    def __init__(self, u: Tensor, rows: Tensor, gram: Tensor, beta: Tensor, upper: Tensor) -> None:
        self.u, self.rows, self.gram, self.beta, self.upper = u, rows, gram, beta, upper
        self.diagonal = u.square().sum(1) * gram.diagonal()[rows]
        active, counts = torch.unique_consecutive(rows, return_counts=True)
        ends = counts.cumsum(0)
        self.blocks: list[tuple[int, int, int]] = list(
            zip(active.tolist(), (ends - counts).tolist(), ends.tolist(), strict=True)
        )

    def sources(self, a: Tensor) -> Tensor:
        found = torch.zeros(len(self.gram), self.u.shape[1], dtype=torch.float64)
        return found.index_add_(0, self.rows, a[:, None] * self.u)

    def gradient(self, moves: Tensor) -> Tensor:
        return self.beta - (self.u * moves[self.rows]).sum(1)

    def _few(self, a: Tensor) -> tuple[Tensor, Tensor]:
        """The activations that have a multiplier, `(n,)`, and their sources `(n, p)`: mostly few of all."""
        at = a.nonzero().squeeze(1)
        used, inverse = torch.unique(self.rows[at], return_inverse=True)
        found = torch.zeros(len(used), self.u.shape[1], dtype=torch.float64)
        return used, found.index_add_(0, inverse, a[at, None] * self.u[at])

    def moves(self, a: Tensor) -> Tensor:
        """`gram @ sources(a)`, `(N, p)`."""
        used, b = self._few(a)
        if len(used) * _FEW > len(self.gram):
            return self.gram @ self.sources(a)
        return self.gram[used].T @ b

    def times(self, a: Tensor) -> Tensor:
        """`Q a`."""
        return (self.u * self.moves(a)[self.rows]).sum(1)

    def value(self, a: Tensor) -> float:
        used, b = self._few(a)
        if len(used) * _FEW > len(self.gram):
            b = self.sources(a)
            return float(self.beta @ a) - 0.5 * float((b * (self.gram @ b)).sum())
        return float(self.beta @ a) - 0.5 * float((b * (self.gram[used][:, used] @ b)).sum())

    def residuals(self, a: Tensor, gradient: Tensor) -> Tensor:
        return torch.where(
            a <= 0,
            gradient.clamp(min=0.0),
            torch.where(a >= self.upper, (-gradient).clamp(min=0.0), gradient.abs()),
        )

    def sweep(self, a: Tensor) -> Tensor:
        """
        One round of Hildreth's coordinate ascent, `a_k <- [a_k + (beta_k - <u_k h_k^T, Delta>) / Q_kk]_+`: one
        activation after the other, with the moves of the others by a matrix product.
        """
        a, b = a.clone(), self.sources(a)
        for row, start, stop in self.blocks:
            u, old = self.u[start:stop], a[start:stop]
            gradient = self.beta[start:stop] - u @ (self.gram[row] @ b)
            if float(self.residuals_of(old, gradient, start, stop).max()) == 0.0:
                continue
            block: list[list[float]] = ((u @ u.T) * self.gram[row, row]).tolist()
            g: list[float] = gradient.tolist()
            new: list[float] = old.tolist()
            upper: list[float] = self.upper[start:stop].tolist()
            for k, line in enumerate(block):
                if line[k] <= 0.0:
                    continue
                value = min(max(new[k] + g[k] / line[k], 0.0), upper[k])
                step = value - new[k]
                if step != 0.0:
                    new[k] = value
                    g = [of - step * q for of, q in zip(g, line, strict=True)]
            changed = torch.tensor(new, dtype=torch.float64)
            b[row] += (changed - old) @ u
            a[start:stop] = changed
        return a

    def residuals_of(self, a: Tensor, gradient: Tensor, start: int, stop: int) -> Tensor:
        upper = self.upper[start:stop]
        return torch.where((a < upper) & (gradient > 0) | (a > 0) & (gradient < 0), gradient.abs(), 0.0)

    def face_step(self, a: Tensor, gradient: Tensor) -> Tensor:
        """
        Newton's step over the multipliers that are free to move. If the dual falls where it is folded into the box, it
        is cut at the border instead, what sits there is held, and the rest goes on (as in Lawson and Hanson's NNLS).
        """
        free = ((a > 0) & (a < self.upper)) | ((a <= 0) & (gradient > 0)) | ((a >= self.upper) & (gradient < 0))
        free &= self.diagonal > 0
        value = self.value(a)
        for _ in range(_CUTS):
            where = free.nonzero().squeeze(1)
            if not len(where):
                break
            scale = self.diagonal[where].rsqrt()
            full = torch.zeros_like(a)
            if len(where) <= _DENSE:
                full[where] = self._factored(where, scale, gradient[where])
            else:
                full[where] = self._conjugate(where, scale, gradient[where])
            whole = torch.minimum((a + full).clamp(min=0.0), self.upper)
            if self.value(whole) > value:
                return whole
            held = ((a <= 0) & (full < 0)) | ((a >= self.upper) & (full > 0))
            if not bool(held.any()):
                low = torch.where(full < 0, -a / full, torch.inf)
                high = torch.where(full > 0, (self.upper - a) / full, torch.inf)
                rooms = torch.minimum(low, high)
                limit = min(1.0, float(rooms.min()))
                held = rooms <= limit
                part = torch.minimum((a + limit * full).clamp(min=0.0), self.upper)
                part = torch.where(held, torch.where(full < 0, 0.0, self.upper), part)
                reached = value if limit >= 1.0 else self.value(part)
                if reached <= value:
                    break
                a, value = part, reached
                gradient = self.gradient(self.moves(a))
            free &= ~held
        return a

    def _factored(self, where: Tensor, scale: Tensor, gradient: Tensor) -> Tensor:
        u, rows = self.u[where] * scale[:, None], self.rows[where]
        matrix = torch.empty(len(where), len(where), dtype=torch.float64)
        for start in range(0, len(where), _CHUNK):
            part = slice(start, start + _CHUNK)
            matrix[part] = (u[part] @ u.T) * self.gram[rows[part]][:, rows]
        for ridge in (1e-12, 1e-10, 1e-8):  # duplicates make Q singular: the step is then the shortest, nearly
            matrix.diagonal().add_(ridge)
            factor, failed = torch.linalg.cholesky_ex(matrix)
            if not int(failed):
                break
        return scale * torch.cholesky_solve((scale * gradient)[:, None], factor).squeeze(1)

    def _conjugate(self, where: Tensor, scale: Tensor, gradient: Tensor) -> Tensor:
        def apply(x: Tensor) -> Tensor:
            full = torch.zeros(len(self.beta), dtype=torch.float64)
            full[where] = scale * x
            return scale * self.times(full)[where] + 1e-12 * x

        x, residual = torch.zeros_like(gradient), scale * gradient
        direction, square = residual.clone(), float(residual @ residual)
        first = square
        for _ in range(200):
            image = apply(direction)
            curvature = float(direction @ image)
            if square <= 1e-26 * first or curvature <= 0:
                break
            step = square / curvature
            x, residual = x + step * direction, residual - step * image
            last, square = square, float(residual @ residual)
            direction = residual + (square / last) * direction
        return scale * x

    def conflict(self, a: Tensor, moves: Tensor, sources: Tensor) -> Tensor:
        """
        Farkas: with `a >= 0`, `sum_k a_k u_k h_k^T = 0` and `beta^T a > 0` no edit satisfies all. Indices of those
        constraints, empty without such an a.
        """
        weights = a * self.diagonal.clamp(min=0.0).sqrt()
        total = float(weights.sum())
        if total > 0 and float((sources * moves).sum()) <= _CANCEL * total**2:
            gain = float(self.beta @ a)
            if gain > 1e-8 * float(a.sum()) * float(self.beta.abs().max()):
                return (weights > 1e-6 * weights.max()).nonzero().squeeze(1)
        return torch.zeros(0, dtype=torch.long)


def solve_dual(
    u: Tensor, rows: Tensor, gram: Tensor, beta: Tensor, *, upper: Tensor | None = None, start: Tensor | None = None
) -> DualSolution:
    r"""
    The smallest edit with `u_k^T Delta h_{rows_k} >= beta_k` for all k, through its dual (PCR, joint form):

    $$\max_{0 \le a \le \kappa} \beta^\top a - \tfrac12 a^\top Q a, \quad
      Q_{kl} = (u_k^\top u_l)(h_k^\top C^{-1} h_l)$$

    Sweeps of Hildreth's coordinate ascent find which constraints bind, and Newton steps over those end it to rounding.

    Args:
        u (`Tensor`): shape `(K, p)`. rows (`Tensor`): shape `(K,)`, ascending. gram (`Tensor`): shape `(N, N)`.
        beta (`Tensor`): shape `(K,)`.
        upper (`Tensor`, *optional*): kappa of each constraint, `(K,)`; none when left out.
        start (`Tensor`, *optional*): multipliers to start from, `(K,)`.
    """
    upper = torch.full_like(beta, torch.inf) if upper is None else upper
    program = _Program(u, rows, gram, beta, upper)
    scale = float(beta.abs().max()) if len(beta) else 0.0
    stuck = (program.diagonal <= 0) & (beta > 1e-12 * scale)
    a = torch.zeros_like(beta) if start is None else torch.minimum(start.clamp(min=0.0), upper)
    hopeless = stuck & torch.isinf(upper)
    a = torch.where(stuck & ~hopeless, upper, torch.where(program.diagonal <= 0, 0.0, a))
    conflict = hopeless.nonzero().squeeze(1)
    residual, best, since = torch.inf, (torch.inf, a), 0
    for turn in range(_ITERATIONS if not len(conflict) else 0):
        if turn % 4 == 0:
            a = program.sweep(a)
        sources = program.sources(a)
        moves = program.moves(a)
        gradient = program.gradient(moves)
        residual = float(program.residuals(a, gradient)[~stuck].max()) if bool((~stuck).any()) else 0.0
        since += 1
        if residual < best[0]:
            best, since = (residual, a), 0
        if residual <= 1e-14 * scale or (since > 2 and best[0] <= 1e-12 * scale):
            break
        conflict = program.conflict(a, moves, sources)
        if len(conflict):
            break
        a = program.face_step(a, gradient)
    if not len(conflict):
        residual, a = best
    sources = program.sources(a)
    return DualSolution(
        multipliers=a,
        sources=sources,
        moves=program.moves(a),
        value=program.value(a),
        residual=residual,
        conflict=conflict,
    )
