"""The exact projection onto the probability simplex.

Shapes: n entries of a point; any number of leading dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor


def project_onto_simplex(points: Tensor) -> Tensor:
    r"""
    The nearest point of the simplex, `argmin_x |x - y|^2` subject to `x >= 0`, `sum(x) = 1`.

    The solution is `x = max(y - tau, 0)`; sorting gives tau, since with `y_(1) >= y_(2) >= ...` the k largest entries
    stay positive for the largest k with `y_(k) > (y_(1) + ... + y_(k) - 1) / k` (Held, Wolfe and Crowder 1974; Duchi
    et al. 2008). `O(n log n)`, without iterations and without a tolerance.

    Args:
        points (`Tensor`):
            `(..., n)`, any finite numbers; float32 or float64, other types are computed in float32.

    Returns:
        `Tensor`: `(..., n)`, in the type of `points`; detached.

    Raises:
        ValueError: no entries, or numbers that are not finite.
    """
    if points.dim() == 0 or points.shape[-1] == 0:
        raise ValueError(f"points have shape {tuple(points.shape)}; expected (..., n) with at least one entry.")
    if not bool(torch.isfinite(points).all()):
        raise ValueError("points hold NaN or infinite numbers; expected finite ones. Reduce the step before them.")
    wide = points.detach().to(torch.float64 if points.dtype == torch.float64 else torch.float32)
    wide = wide - wide.amax(-1, keepdim=True)  # the same projection, and sums that lose no digits
    ranked = wide.sort(dim=-1, descending=True).values
    order = torch.arange(1, wide.shape[-1] + 1, device=wide.device, dtype=wide.dtype)
    levels = (ranked.cumsum(-1) - 1.0) / order
    kept = (ranked > levels).sum(-1, keepdim=True)
    return (wide - levels.gather(-1, kept - 1)).clamp_(min=0.0).to(points.dtype)
