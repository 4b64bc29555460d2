"""The loss of a region: how improbable a set of next tokens, or a response, is after each prompt.

Shapes: B rows, N response positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...losses.rows import RowFunction, negative, upcast
from ...losses.scores import Scores


def set_nll(token_ids: Sequence[int], cap: float = math.inf) -> RowFunction:
    """
    `min(-log sum_{k in K} p_k, cap)` in nats as a function of rows of logits `(n, V)` to values `(n,)`
    (arXiv 2510.03567). Its gradient is zero above the cap.

    Args:
        token_ids (`Sequence[int]`):
            K, each id once.
        cap (`float`, *optional*, defaults to `inf`):
            Largest value.
    """
    chosen = list(token_ids)

    def values(rows: Tensor) -> Tensor:
        rows = upcast(rows)
        inside = rows[:, torch.tensor(chosen, device=rows.device)].logsumexp(dim=-1)
        return (rows.logsumexp(dim=-1) - inside).clamp(max=cap)

    return values


def region_loss(scores: Scores, token_ids: Sequence[int], cap: float = math.inf) -> tuple[Tensor, Tensor]:
    """
    Sum over the rows of a batch of `min(loss of the row, cap)`.

    Args:
        scores ([`Scores`]):
            Of the batch; with `token_ids` at most one position a row, whose label is not looked at.
        token_ids (`Sequence[int]`):
            K, or none for the mean negative log-likelihood of the row's labels.
        cap (`float`, *optional*, defaults to `inf`):
            Nats above which a row has no gradient.

    Returns:
        `tuple[Tensor, Tensor]`: the sum, differentiable, and the losses `(B,)`, detached and capped; 0 for a row
        without response positions.
    """
    if token_ids:
        total, values = scores.of_rows(set_nll(token_ids, cap))
        return total, scores.row_sums(values.detach())
    share = 1.0 / scores.lengths.clamp(min=1)
    losses = scores.row_sums(-scores.log_probs()) * share
    weights = scores.gather(share * ~(losses >= cap))
    total, _ = scores.of_logp(negative, weights)
    capped = losses.clamp(max=cap)
    # the value of the capped sum, the gradient of the rows below the cap
    return total + (capped.sum() - total).detach(), capped
