"""Losses of single response positions: from rows of logits, or from the log-probability of the label alone.

Shapes: n rows, V vocabulary. Nothing here knows of batches, masks or means, so that the same function serves whole
logits ([`FullScores`]) and a chunk of them ([`FusedScores`]).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

LogpFunction = Callable[[Tensor], Tensor]
"""`log p_y (n,) -> values (n,)`, elementwise."""
RowFunction = Callable[[Tensor], Tensor]
"""`rows (n, V) -> values (n,)`, row by row."""
PairedRowFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`rows (n, V), reference rows (n, V), targets (n,) -> values (n,)`, row by row."""


def upcast(values: Tensor) -> Tensor:
    """Return `values` in float32 if they are in a half type, unchanged otherwise."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def target_log_probs(rows: Tensor, targets: Tensor) -> Tensor:
    """Return `log softmax(rows)[targets]`, shape `(n,)`, from rows `(n, V)` and targets `(n,)`; never in half."""
    return -F.cross_entropy(upcast(rows), targets, reduction="none")


def row_margin(rows: Tensor) -> Tensor:
    """`max_k z_k - mean_k z_k` `(n,)` of rows `(n, V)`, in logits."""
    # The maximum of half logits is exact and the mean accumulates in float32, so the rows need no float32 copy.
    # `max(dim)` sends the gradient of a tie to one index, `amax` would spread it.
    top = upcast(rows.max(dim=-1).values)
    return top - rows.mean(dim=-1, dtype=top.dtype)


def row_margin_squared(rows: Tensor) -> Tensor:
    """Logit-margin flattening, `(max_k z_k - mean_k z_k)^2` `(n,)`."""
    return row_margin(rows).square()


def row_kl_to_uniform(rows: Tensor) -> Tensor:
    """`KL(U || p) = logsumexp(z) - mean(z) - log V` `(n,)`, in nats."""
    rows = upcast(rows)
    return rows.logsumexp(dim=-1) - rows.mean(dim=-1) - math.log(rows.shape[-1])


def row_missing_entropy(rows: Tensor) -> Tensor:
    """`log V - H(p)` `(n,)`, in nats."""
    logp = F.log_softmax(upcast(rows), dim=-1)
    return math.log(rows.shape[-1]) + (logp.exp() * logp).sum(dim=-1)


def row_kl_to_reference(rows: Tensor, ref_rows: Tensor, targets: Tensor) -> Tensor:
    """`KL(p_ref || p)` `(n,)`, in nats; the targets are not looked at."""
    logp = F.log_softmax(upcast(rows), dim=-1)
    logq = F.log_softmax(upcast(ref_rows), dim=-1)
    return F.kl_div(logp, logq, reduction="none", log_target=True).sum(dim=-1)


def row_undial(rows: Tensor, ref_rows: Tensor, targets: Tensor, *, beta: float = 10.0) -> Tensor:
    """`-sum_k q_k log p_k` `(n,)` with `q = softmax(z_ref - beta onehot(y))`, in nats."""
    shift = torch.zeros_like(upcast(ref_rows)).scatter_(-1, targets.unsqueeze(-1), beta)
    return F.cross_entropy(upcast(rows), (upcast(ref_rows) - shift).softmax(dim=-1), reduction="none")


def identity(logp: Tensor) -> Tensor:
    """`log p_y`: gradient ascent on the cross-entropy."""
    return logp


def negative(logp: Tensor) -> Tensor:
    """`-log p_y`: the cross-entropy."""
    return -logp


def weighted_ascent(logp: Tensor, *, beta: float = 1.0) -> Tensor:
    """`p_y^beta log p_y`, the weight detached (WGA)."""
    return logp.detach().exp().pow(beta) * logp


def saturation_importance(logp: Tensor, *, beta1: float = 5.0, beta2: float = 1.0) -> Tensor:
    """`p_y^beta1 (1 - p_y)^beta2 log p_y`, the weights detached (SatImp)."""
    p = logp.detach().exp()
    return p.pow(beta1) * (1 - p).pow(beta2) * logp
