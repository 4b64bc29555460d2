"""What an edit achieves, measured on the edit itself and not taken from the solver that made it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .metric import Metric
from .problem import Kind
from .solution import Pair


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """
    The proof that comes with an edit `Delta`; pairs are (activation, concept), margins are in the units of the output
    for balls and of `w^T o` for half-spaces, costs are `1/2 tr(Delta C Delta^T)`.
    """

    feasible: bool
    """Whether every constraint holds, up to the rounding of the inputs' type."""
    smallest_margin: float
    """Over all pairs, by the product `(W + Delta) h` with the factors as they are returned."""
    cost: float
    """Of the factors as they are returned."""
    penalty: float
    """With a soft margin, its price times the sum of what the margins lack; 0 without."""
    lower_bound: float
    """On cost + penalty, for any edit that satisfies the constraints; infinite where there is none."""
    gap: float
    """`(cost + penalty - lower_bound) / (cost + penalty)`: 0 says that no edit is cheaper."""
    kkt_residual: float
    """Relative; 0 at a point that no small change improves, 1 or more where constraints are violated."""
    rank: int
    """Of the edit; at most the number of activations with a constraint that binds."""
    rounds: int
    """Programs of the joint solver, or repairs of the greedy one."""
    objectives: tuple[float, ...]
    """Cost + penalty after each round of the joint solver; never rises."""
    converged: bool
    """Whether the solver ended by its tolerance and not by its bound on rounds."""
    cycled: bool
    """Whether the greedy solver came back to where it had been."""
    violated: tuple[Pair, ...]
    """Pairs that the edit leaves violated."""
    conflict: tuple[Pair, ...]
    """Pairs that contradict each other, so that no edit satisfies them; then the edit is zero."""
    retained_disturbance: float | None
    """Mean over the retain activations k of `||Delta k||^2`; None without them."""
    seconds: float
    """Wall-clock time of the solver, with the metric and this measurement."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def true_margins(moved: Tensor, concepts: Tensor, eps: Tensor, kind: Kind) -> Tensor:
    """Margins `(N, n)` of outputs `(N, d)`, distances by differences and not by inner products."""
    if kind == "half_space":
        return eps - moved @ concepts.T
    return torch.cdist(moved, concepts, compute_mode="donot_use_mm_for_euclid_dist") - eps


def measure(
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    inputs: Tensor,
    outputs: Tensor,
    concepts: Tensor,
    eps: Tensor,
    kind: Kind,
    metric: Metric | float,
    slack: Tensor,
    soft_margin: float | None,
) -> dict[str, Any]:
    """
    The fields of [`Certificate`] that an edit itself tells.

    Args:
        lora_a, lora_b (`Tensor`): shapes `(r, m)` and `(d, r)`, as they will be used.
        inputs, outputs, concepts, eps (`Tensor`): shapes `(N, m)`, `(N, d)`, `(n, d)`, `(N, n)`, float64.
        kind (`str`): of the constraints. metric ([`Metric`] or `float`): of the cost; or the cost, where it is known.
        slack (`Tensor`): shape `(N, n)`, what rounding may take from a margin.
        soft_margin (`float`, *optional*): the price of a unit that a margin lacks.
    """
    moved = outputs + (inputs @ lora_a.double().T) @ lora_b.double().T
    margins = true_margins(moved, concepts, eps, kind)
    cost, disturbance = (metric, None) if isinstance(metric, float) else metric.cost(lora_a, lora_b)
    violated = tuple((j, i) for j, i in (margins < -slack).nonzero().tolist())
    return {
        "feasible": not violated,
        "smallest_margin": float(margins.min()),
        "cost": cost,
        "penalty": 0.0 if soft_margin is None else soft_margin * float((-margins).clamp(min=0.0).sum()),
        "rank": len(lora_a),
        "violated": violated,
        "retained_disturbance": disturbance,
    }


def relative_gap(objective: float, lower_bound: float) -> float:
    """`(objective - lower_bound) / objective`, not below 0; infinite where nothing is feasible."""
    if math.isinf(lower_bound):
        return math.inf
    return max(objective - lower_bound, 0.0) / objective if objective > 0 else 0.0
