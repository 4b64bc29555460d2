"""What an edit costs: the metric C on the input side of the edited matrix, and its inverse.

Shapes: N activations, T retain activations, m width of the input, d width of the output.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK = 1024  # columns of the retain activations that are held in float64 at a time


@dataclass(frozen=True, kw_only=True)
class Metric:
    r"""
    `C = I`, or `C = l I + (1/T) K^T K` with retain activations K as rows, so that the cost of an edit,
    `1/2 tr(Delta C Delta^T)`, is half the mean squared disturbance of the retained outputs plus `l/2 ||Delta||_F^2`
    (PCR, joint form).

    `C^-1 h` is applied by Woodbury's identity with a T x T matrix. When T > m, the rows of K are first replaced by at
    most m others with the same Gram matrix, as that is smaller than K itself; C^-1 is never formed.
    """

    retain: Tensor | None = None
    """The rows K `(T, m)`, in any floating type; None for `C = I`."""
    ridge: float = 1.0
    """l, absolute."""
    factor: Tensor | None = None
    """Cholesky factor of `l T I + K K^T`, float64."""
    count: int = 0
    """T, of the retain activations that were given."""

    @classmethod
    def identity(cls) -> Metric:
        """The plain Frobenius norm of the edit."""
        return cls()

    @classmethod
    def from_retain(cls, retain: Tensor, ridge: float = 0.01) -> Metric:
        """
        Args:
            retain (`Tensor`): shape `(T, m)`, the inputs at positions whose outputs should stay.
            ridge (`float`, *optional*, defaults to 0.01):
                l as a share of the mean diagonal of `(1/T) K^T K`, without a unit.

        Raises:
            ValueError: every retain activation is zero.
        """
        count, width = retain.shape
        retain = retain.detach().cpu()
        energy = float(retain.double().square().sum()) if count * width < 2**24 else _energy(retain)
        if energy == 0.0:
            raise ValueError(
                "expected retain activations that are not all zero, got only zeros, which give every edit the cost 0; "
                "leave retain_inputs out to weigh the edit by its own norm."
            )
        absolute = ridge * energy / (count * width)
        if count > width:
            retain = _compress(retain)
        gram = _gram(retain)
        gram.diagonal().add_(absolute * count)
        return cls(retain=retain, ridge=absolute, factor=torch.linalg.cholesky(gram), count=count)

    def solve(self, rows: Tensor) -> Tensor:
        """`C^-1 h` for every row h of `rows` `(N, m)`, in float64, shape `(N, m)`."""
        rows = rows.double()
        if self.retain is None or self.factor is None:
            return rows
        inner = torch.cholesky_solve(_times(self.retain, rows), self.factor)
        found = rows.clone()
        for start in range(0, rows.shape[1], _CHUNK):
            stop = start + _CHUNK
            found[:, start:stop] -= inner.T @ self.retain[:, start:stop].double()
        return found / self.ridge

    def disturbance(self, lora_a: Tensor, lora_b: Tensor) -> float | None:
        """
        Mean over the retain activations k of `||Delta k||^2` with `Delta = lora_b @ lora_a`, in squared units of the
        output; None without retain activations. Shapes `(r, m)` and `(d, r)`.
        """
        if self.retain is None:
            return None
        inner = _times(self.retain, lora_a.detach().cpu().double())
        b = lora_b.detach().cpu().double()
        return float(((inner.T @ inner) * (b.T @ b)).sum()) / self.count

    def cost(self, lora_a: Tensor, lora_b: Tensor) -> tuple[float, float | None]:
        """`1/2 tr(Delta C Delta^T)` with `Delta = lora_b @ lora_a`, and the disturbance in it."""
        a, b = lora_a.detach().cpu().double(), lora_b.detach().cpu().double()
        plain = float(((a @ a.T) * (b.T @ b)).sum())
        disturbance = self.disturbance(a, b)
        return 0.5 * (self.ridge * plain + (disturbance or 0.0)), disturbance


def _energy(retain: Tensor) -> float:
    chunks = range(0, retain.shape[1], _CHUNK)
    return sum(float(retain[:, start : start + _CHUNK].double().square().sum()) for start in chunks)


def _gram(rows: Tensor) -> Tensor:
    """`K K^T` in float64, a block of columns at a time."""
    gram = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for start in range(0, rows.shape[1], _CHUNK):
        block = rows[:, start : start + _CHUNK].double()
        gram.addmm_(block, block.T)
    return gram


def _times(retain: Tensor, rows: Tensor) -> Tensor:
    """`K rows^T`, shape `(T, N)`, a block of columns at a time."""
    found = torch.zeros(len(retain), len(rows), dtype=torch.float64)
    for start in range(0, rows.shape[1], _CHUNK):
        stop = start + _CHUNK
        found.addmm_(retain[:, start:stop].double(), rows[:, start:stop].T)
    return found


def _compress(retain: Tensor) -> Tensor:
    """At most m rows with the Gram matrix `K^T K` of the T > m rows given."""
    triangle = torch.zeros(0, retain.shape[1], dtype=torch.float64)
    step = retain.shape[1] + _CHUNK
    for start in range(0, len(retain), step):
        triangle = torch.linalg.qr(torch.cat([triangle, retain[start : start + step].double()]), mode="r").R
    return triangle
