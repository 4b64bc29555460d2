"""One activation, one concept: the smallest change of the matrix, in closed form."""

from __future__ import annotations

import torch
from torch import Tensor


def unit(vector: Tensor) -> Tensor:
    """`vector / ||vector||`, shape `(d,)`; for the zero vector the first axis, as every direction is as good."""
    norm = torch.linalg.vector_norm(vector)
    if norm > 0:
        return vector / norm
    axis = torch.zeros_like(vector)
    axis[0] = 1.0
    return axis


def closed_form(
    activation: Tensor, output: Tensor, concept: Tensor, eps: float, *, solved: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    r"""
    The global optimum of `min 1/2 tr(Delta C Delta^T)` subject to `||(W + Delta) h - c|| >= eps` (PCR):

    $$\Delta^* = \frac{[\varepsilon - \lVert r \rVert]_+}{h^\top C^{-1} h}\,
      \frac{r}{\lVert r \rVert}\, (C^{-1} h)^\top, \qquad r = W h - c$$

    With r = 0 any direction is optimal and the first axis is taken.

    Args:
        activation (`Tensor`): h, shape `(m,)`.
        output (`Tensor`): W h, shape `(d,)`.
        concept (`Tensor`): c, shape `(d,)`.
        eps (`float`): the wanted distance, in the units of the output.
        solved (`Tensor`, *optional*): `C^-1 h`, shape `(m,)`; h itself, so C = I, when left out.

    Returns:
        `tuple[Tensor, Tensor]`: column `(d,)` and row `(m,)` in float64 with `Delta = outer(column, row)`.

    Raises:
        ValueError: the activation is zero and the constraint is violated, so that no Delta helps.
    """
    h, r = activation.double(), output.double() - concept.double()
    row = h if solved is None else solved.double()
    lack = max(eps - float(torch.linalg.vector_norm(r)), 0.0)
    square = float(h @ row)
    if lack > 0 and square <= 0:
        raise ValueError(
            f"expected an activation other than zero, got the zero vector with a violated constraint (short of eps by "
            f"{lack:.3g}); its output is 0 whatever the matrix, so leave this position out."
        )
    return (lack / square if lack > 0 else 0.0) * unit(r), row
