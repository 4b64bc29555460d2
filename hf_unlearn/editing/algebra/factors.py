"""From a solution to the two factors of an adapter."""

from __future__ import annotations

import torch
from torch import Tensor

_RELATIVE = 1e-12  # singular values below this share of the largest are rounding


def low_rank_factors(sources: Tensor, gram: Tensor, solved: Tensor, basis: Tensor | None) -> tuple[Tensor, Tensor]:
    r"""
    `lora_a` `(r, m)` and `lora_b` `(d, r)` of the edit $\sum_j b_j (C^{-1} h_j)^\top$, r its rank: the singular value
    decomposition of $\Delta C^{1/2}$, the singular values shared evenly between the factors.

    Args:
        sources (`Tensor`): b, shape `(N, p)`. gram (`Tensor`): `h_j^T C^-1 h_l`, shape `(N, N)`.
        solved (`Tensor`): rows `C^-1 h_j`, shape `(N, m)`. basis (`Tensor`, *optional*): shape `(d, p)`.
    """
    active = (sources != 0).any(1)
    width = sources.shape[1] if basis is None else len(basis)
    empty = torch.zeros(0, solved.shape[1], dtype=torch.float64), torch.zeros(width, 0, dtype=torch.float64)
    if not bool(active.any()):
        return empty
    values, vectors = torch.linalg.eigh(gram[active][:, active])
    kept = values > 1e-14 * values[-1]
    root, vectors = values[kept].sqrt(), vectors[:, kept]
    left, sizes, right = torch.linalg.svd((sources[active].T @ vectors) * root, full_matrices=False)
    rank = int((sizes > _RELATIVE * sizes[0]).sum()) if float(sizes[0]) > 0 else 0
    if rank == 0:
        return empty
    share = sizes[:rank].sqrt()
    b = left[:, :rank] * share
    a = ((share[:, None] * right[:rank]) / root) @ vectors.T @ solved[active]
    return a, (b if basis is None else basis @ b)
