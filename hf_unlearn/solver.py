"""Gradient descent-ascent on small constrained problems: the algorithm of [`DualVariables`] without a trainer.

It exists to prove the update against exact solutions, and to try a problem on paper-sized examples:

```python
>>> import torch
>>> from hf_unlearn.duals import DualVariables, RetainConstraint
>>> from hf_unlearn.solver import solve_constrained

>>> duals = DualVariables([RetainConstraint(name="ball", eps=1.0)], step_size=0.2)
>>> solution = solve_constrained(
...     lambda x: ((x - 3) ** 2).sum(), {"ball": lambda x: (x**2).sum()}, torch.zeros(1), duals, lr=0.05, steps=2000
... )
>>> round(solution.x.item(), 3), round(solution.multipliers["ball"], 3)
(1.0, 2.0)
```
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_unlearn.duals import DualVariables

# the last part of a run over which the growth of the multipliers is measured
GROWTH_SHARE = 0.25


@dataclass(frozen=True, kw_only=True)
class ConstrainedSolution:
    """What descent-ascent found.

    Args:
        x (`Tensor`): the feasible iterate with the least objective; if none was feasible, the least violated one.
        objective (`float`): objective at `x`, not normalised.
        multipliers (`dict[str, float]`): multipliers at the end (their mean over the averaged part, with averaging).
        feasible (`bool`): whether `x` satisfies every constraint up to the slack.
        violations (`dict[str, float]`): L_k(x) - eps_k, not normalised.
        growth (`dict[str, float]`): mean change of each multiplier per step over the last quarter of the run. Where no
            iterate is feasible, growth that stays positive is the certificate: on a convex problem the multipliers of
            constraints that contradict each other diverge, and otherwise converge.
        steps (`int`): steps taken.
    """

    x: Tensor
    objective: float
    multipliers: dict[str, float]
    feasible: bool
    violations: dict[str, float]
    growth: dict[str, float]
    steps: int


def solve_constrained(
    objective: Callable[[Tensor], Tensor],
    constraint_fns: Mapping[str, Callable[[Tensor], Tensor]],
    x0: Tensor,
    duals: DualVariables,
    *,
    lr: float,
    steps: int,
    slack: float = 1e-6,
    tol: float = 0.0,
    average: float = 0.0,
) -> ConstrainedSolution:
    r"""Minimise `objective(x)` subject to `constraint_fns[k](x) <= eps_k` in at most `steps` steps.

    Each step is `x <- x - lr * grad_x [L_f(x) + sum_k lambda_k v_k(x)]`, then `duals.ascend` at the new x. With
    `duals.normalize` the objective is divided by its absolute value at `x0`.

    Args:
        objective (`Callable[[Tensor], Tensor]`):
            L_f, from x to a scalar.
        constraint_fns (`Mapping[str, Callable[[Tensor], Tensor]]`):
            L_k by the name of its constraint in `duals`.
        x0 (`Tensor`):
            Where to start; converted to 64 bits.
        duals (`DualVariables`):
            Multipliers, updated in place.
        lr (`float`):
            Step size of the descent.
        steps (`int`):
            Bound on the number of steps: an infeasible problem ends here too.
        slack (`float`, *optional*, defaults to `1e-6`):
            Absolute slack up to which a constraint counts as satisfied.
        tol (`float`, *optional*, defaults to `0.0`):
            Stop once x and every multiplier move by no more than this in a step. 0 goes on until nothing moves.
        average (`float`, *optional*, defaults to `0.0`):
            Share of the run, counted from its end, whose mean iterate competes with the single ones. Without strong
            convexity (linear programs) descent-ascent circles the solution, and only the mean converges to it.

    Raises:
        `ValueError`: on a non-positive `lr` or `steps`, `average` outside [0, 1], names that differ from those of
            `duals`, or an objective that cannot be normalised or is not finite.
    """
    if not (math.isfinite(lr) and lr > 0) or steps < 1 or not 0 <= average <= 1:
        raise ValueError(f"Expected lr > 0, steps >= 1 and average in [0, 1], got {lr=}, {steps=}, {average=}.")
    if set(constraint_fns) != set(duals.names):
        raise ValueError(f"constraint_fns has {sorted(constraint_fns)}, duals has {sorted(duals.names)}.")
    x = x0.detach().to(torch.float64).clone()
    scale = abs(float(objective(x))) if duals.normalize else 1.0
    if not math.isfinite(scale) or scale == 0:
        raise ValueError(f"The objective is {scale} at x0 and cannot be normalised by it: start elsewhere.")

    best = _Best(objective, constraint_fns, duals, slack)
    best.offer(x)
    history = [duals.multipliers]
    x_sum, averaged, first_averaged = torch.zeros_like(x), 0, steps - round(average * steps)
    for step in range(steps):
        x.requires_grad_(True)
        losses = {name: fn(x) for name, fn in constraint_fns.items()}
        lagrangian = objective(x) / scale + duals.lagrangian(losses)
        (gradient,) = torch.autograd.grad(lagrangian, x)
        previous, x = x.detach(), x.detach() - lr * gradient
        if not bool(x.isfinite().all()):
            raise ValueError(f"Descent diverged at step {step}: lower lr={lr} or cap the multipliers.")
        duals.ascend(best.offer(x))
        history.append(duals.multipliers)
        if step >= first_averaged:
            x_sum, averaged = x_sum + x, averaged + 1
        dual_move = (history[-1] - history[-2]).abs().max() if len(duals) else torch.zeros(())
        if not duals.warming_up and max(float((x - previous).abs().max()), float(dual_move)) <= tol:
            break
    multipliers = history[-1]
    if averaged:
        best.offer(x_sum / averaged)
        multipliers = torch.stack(history[-averaged:]).mean(0)
    window = max(1, math.ceil(GROWTH_SHARE * (len(history) - 1)))
    growth = (history[-1] - history[-1 - window]) / window
    return ConstrainedSolution(
        x=best.x,
        objective=best.objective_value,
        multipliers=dict(zip(duals.names, multipliers.tolist(), strict=True)),
        feasible=best.feasible,
        violations=best.violations,
        growth=dict(zip(duals.names, growth.tolist(), strict=True)),
        steps=len(history) - 1,
    )


class _Best:
    """The best iterate so far: feasible before infeasible, then the least objective or the least violation."""

    def __init__(
        self,
        objective: Callable[[Tensor], Tensor],
        constraint_fns: Mapping[str, Callable[[Tensor], Tensor]],
        duals: DualVariables,
        slack: float,
    ) -> None:
        self.objective, self.constraint_fns, self.duals, self.slack = objective, constraint_fns, duals, slack
        self.key = (2, math.inf)
        self.feasible = False

    @torch.no_grad()
    def offer(self, x: Tensor) -> dict[str, Tensor]:
        """Keep a copy of `x` if it is the best so far; returns its losses."""
        losses = {name: fn(x) for name, fn in self.constraint_fns.items()}
        violations = {name: float(loss) - self.duals.eps[name] for name, loss in losses.items()}
        value, feasible = float(self.objective(x)), self.duals.feasible(losses, self.slack)
        key = (0, value) if feasible else (1, max(violations.values()))
        if key < self.key:
            self.key, self.x, self.objective_value = key, x.detach().clone(), value
            self.feasible, self.violations = feasible, violations
        return losses
