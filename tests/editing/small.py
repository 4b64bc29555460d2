"""Small problems with a real weight, and slow, obvious twins of what the solvers compute."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from hf_unlearn.editing import Kind


@dataclass(frozen=True)
class Small:
    weight: Tensor
    inputs: Tensor
    concepts: Tensor
    eps: float
    kind: Kind = "ball"

    @property
    def outputs(self) -> Tensor:
        return self.inputs @ self.weight.T

    def margins(self, delta: Tensor) -> Tensor:
        """By the product (W + Delta) h, one pair at a time."""
        rows = []
        for h in self.inputs:
            moved = (self.weight + delta.double()) @ h
            if self.kind == "ball":
                rows.append([float((moved - c).norm()) - self.eps for c in self.concepts])
            else:
                rows.append([self.eps - float(c @ moved) for c in self.concepts])
        return torch.tensor(rows, dtype=torch.float64)

    def violated(self) -> int:
        return int((self.margins(torch.zeros_like(self.weight)) < 0).sum())


def make(seed: int, n_act: int, m: int, d: int, n_con: int, *, factor: float = 1.05, kind: Kind = "ball") -> Small:
    """eps is `factor` times the median distance (ball), or a low quantile of w^T o (half-space)."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(d, m, generator=g, dtype=torch.float64) / m**0.5
    inputs = torch.randn(n_act, m, generator=g, dtype=torch.float64) + 0.5
    concepts = torch.randn(n_con, d, generator=g, dtype=torch.float64)
    outputs = inputs @ weight.T
    if kind == "ball":
        eps = factor * float(torch.cdist(outputs, concepts).median())
    else:
        eps = float((outputs @ concepts.T).quantile(0.6))
    return Small(weight, inputs, concepts, eps, kind)


def dense_metric(retain: Tensor | None, m: int, ridge: float = 0.01) -> Tensor:
    """C as a matrix, entry by entry from its definition."""
    if retain is None:
        return torch.eye(m, dtype=torch.float64)
    second = torch.zeros(m, m, dtype=torch.float64)
    for k in retain.double():
        second += torch.outer(k, k) / len(retain)
    return second + ridge * float(second.diagonal().mean()) * torch.eye(m, dtype=torch.float64)


def cost_of(delta: Tensor, metric: Tensor) -> float:
    return 0.5 * float(torch.trace(delta.double() @ metric @ delta.double().T))


def slsqp(small: Small, metric: Tensor, starts: list[Tensor]) -> float:
    """The cheapest feasible Delta that SLSQP finds over all d * m entries, from several starts; inf if none."""
    d, m = small.weight.shape
    c, h, o = metric.numpy(), small.inputs.numpy(), small.outputs.numpy()
    concepts, eps = small.concepts.numpy(), small.eps

    def margins(x: np.ndarray) -> np.ndarray:
        moved = o + h @ x.reshape(d, m).T
        if small.kind == "half_space":
            return (eps - moved @ concepts.T).ravel()
        return (((moved[:, None] - concepts) ** 2).sum(-1) - eps**2).ravel()

    def slopes(x: np.ndarray) -> np.ndarray:
        moved = o + h @ x.reshape(d, m).T
        if small.kind == "half_space":
            normals = np.broadcast_to(-concepts, (len(h), *concepts.shape))
        else:
            normals = 2 * (moved[:, None] - concepts)
        return np.einsum("jid,jm->jidm", normals, h).reshape(-1, d * m)

    best = np.inf
    for start in starts:
        found = minimize(
            lambda x: 0.5 * float(np.einsum("ij,jk,ik->", x.reshape(d, m), c, x.reshape(d, m))),
            start.numpy().ravel(),
            jac=lambda x: (x.reshape(d, m) @ c).ravel(),
            constraints=[{"type": "ineq", "fun": margins, "jac": slopes}],
            method="SLSQP",
            options={"ftol": 1e-15, "maxiter": 500},
        )
        if margins(found.x).min() > -1e-8:
            best = min(best, float(found.fun))
    return best


def random_starts(small: Small, count: int, seed: int = 0, scale: float = 0.5) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(small.weight.shape, generator=g, dtype=torch.float64) for _ in range(count)]
