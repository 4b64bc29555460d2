"""Where a causal model predicts what: the shift, the mask, log-probabilities and reductions.

Shapes: B batch, T tokens, V vocabulary, N response positions of the whole batch.

Every loss of this package gets `logits (B, T, V)` and `labels (B, T)` as transformers hands them out: the label of
token `t` sits at `t`, and [`IGNORE_INDEX`] marks the prompt and the padding. A *response position* is the position
whose logits predict a label, one to the left of it. The shift happens here and nowhere else, so that no loss can be
off by one token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_unlearn.losses.rows import target_log_probs

IGNORE_INDEX = -100


@dataclass(frozen=True, kw_only=True, eq=False)
class LossOutput:
    """A loss as a sum and a count, so that accumulation steps and ranks can be added exactly.

    Args:
        loss (`Tensor`): shape `()`, `total / count`; a differentiable zero when `count` is 0.
        total (`Tensor`): shape `()`, the differentiable sum over units.
        count (`Tensor`): shape `()`, the number of units (response tokens, or sequences with at least one response
            token) as a float without gradient. It depends on the labels only, never on weights or gates.
        metrics (`dict[str, Tensor]`, *optional*, defaults to `{}`): detached tensors of shape `()`, each a mean over
            the same `count` units.
    """

    loss: Tensor
    total: Tensor
    count: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


def shift(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Align logits with the labels they predict.

    Args:
        logits (`Tensor`): shape `(B, T, V)`.
        labels (`Tensor`): shape `(B, T)`, integer, [`IGNORE_INDEX`] outside the response.

    Returns:
        `tuple[Tensor, Tensor, Tensor]`: the logits of all positions but the last `(B, T-1, V)` (a view), the targets
        `(B, T-1)` with 0 where there is nothing to predict (so that they are safe to gather with), and the mask
        `(B, T-1)`, boolean, true at response positions.

    Raises:
        ValueError: if the shapes do not fit.
    """
    if logits.dim() != 3 or logits.shape[:2] != labels.shape:
        raise ValueError(
            f"expected logits of shape (B, T, V) and labels of shape (B, T), got {tuple(logits.shape)} and "
            f"{tuple(labels.shape)}; pass both as the model and the collator return them, without shifting"
        )
    # A model spread over several devices returns its logits on the last one.
    following = labels[:, 1:].to(logits.device)
    mask = following != IGNORE_INDEX
    return logits[:, :-1], following.masked_fill(~mask, 0), mask


def response_positions(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gather the logits of the response positions of the whole batch.

    Prompts and padding are usually most of the batch: all work on the vocabulary axis is done on these rows only. What
    the other positions hold (even inf or nan) reaches neither the loss nor a gradient.

    Args:
        logits (`Tensor`): shape `(B, T, V)`.
        labels (`Tensor`): shape `(B, T)`, [`IGNORE_INDEX`] outside the response.

    Returns:
        `tuple[Tensor, Tensor, Tensor]`: rows `(N, V)` in the type of the logits (a copy), their targets `(N,)`, and
        the mask `(B, T-1)` with N true entries in the order of the rows.

    Raises:
        ValueError: if the shapes do not fit.
    """
    _, targets, mask = shift(logits, labels)
    # The flat index selects from the unshifted logits: one gradient of shape (B, T, V) instead of two, and the
    # backward pass of index_select is several times faster than that of a boolean mask.
    index = F.pad(mask, (0, 1)).flatten().nonzero().squeeze(-1)
    rows = logits.flatten(0, 1).index_select(0, index)
    return rows, targets[mask], mask


def reference_positions(ref_logits: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Gather the rows `(N, V)` of a frozen model's logits `(B, T, V)` that belong to [`response_positions`], detached.

    Raises:
        ValueError: if the two models disagree in shape.
    """
    if ref_logits.shape != logits.shape:
        raise ValueError(
            f"the reference logits have shape {tuple(ref_logits.shape)}, the logits {tuple(logits.shape)}; both must "
            "come from the same batch and vocabulary"
        )
    return response_positions(ref_logits.detach(), labels)[0]


def token_log_probs(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of every response token.

    Args:
        logits (`Tensor`): shape `(B, T, V)`.
        labels (`Tensor`): shape `(B, T)`, [`IGNORE_INDEX`] outside the response.

    Returns:
        `tuple[Tensor, Tensor]`: natural log-probabilities `(B, T-1)`, zero outside the mask, float32 for half logits;
        and the mask `(B, T-1)`.
    """
    rows, targets, mask = response_positions(logits, labels)
    values = target_log_probs(rows, targets)
    return values.new_zeros(mask.shape).masked_scatter(mask, values), mask


def sequence_log_probs(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of every response, `sum_t log p(y_t | y_<t)`.

    Args:
        logits (`Tensor`): shape `(B, T, V)`.
        labels (`Tensor`): shape `(B, T)`, [`IGNORE_INDEX`] outside the response.

    Returns:
        `tuple[Tensor, Tensor]`: sums `(B,)`, zero for a row without response, and the number of response tokens
        `(B,)`, int64.
    """
    logp, mask = token_log_probs(logits, labels)
    return logp.sum(-1), mask.sum(-1)


def reduce_tokens(
    values: Tensor, mask: Tensor, *, weights: Tensor | None = None, metrics: Mapping[str, Tensor] | None = None
) -> LossOutput:
    """Turn one value per response token into a [`LossOutput`].

    Args:
        values (`Tensor`): shape `(N,)`, in the order of the true entries of the mask.
        mask (`Tensor`): shape `(B, T-1)`, boolean.
        weights (`Tensor`, *optional*): shape `(B,)` or `(B, T-1)`, multiplies the values. Detached; the count stays
            the number of response tokens.
        metrics (`Mapping[str, Tensor]`, *optional*): values of shape `(N,)` to be averaged, unweighted.

    Raises:
        ValueError: if the weights have another shape.
    """
    if weights is not None:
        if weights.shape != mask.shape and weights.shape != mask.shape[:1]:
            raise ValueError(
                f"weights must have shape (B,) = {tuple(mask.shape[:1])} or (B, T-1) = {tuple(mask.shape)}, got "
                f"{tuple(weights.shape)}; one weight per example or per shifted position"
            )
        per_position = weights.unsqueeze(-1).expand_as(mask) if weights.dim() == 1 else weights
        values = values * per_position.detach()[mask].to(values.dtype)
    return _output(values.sum(), mask.sum(), metrics)


def reduce_sequences(values: Tensor, active: Tensor, *, metrics: Mapping[str, Tensor] | None = None) -> LossOutput:
    """Turn one value per sequence into a [`LossOutput`] over the sequences that have a response.

    Args:
        values (`Tensor`): shape `(B,)`.
        active (`Tensor`): shape `(B,)`, boolean: true for sequences that count.
        metrics (`Mapping[str, Tensor]`, *optional*): values of shape `(B,)` to be averaged over the active sequences.
    """
    means = {name: torch.where(active, value.detach(), 0.0) for name, value in (metrics or {}).items()}
    return _output(torch.where(active, values, 0.0).sum(), active.sum(), means)


def _output(total: Tensor, units: Tensor, metrics: Mapping[str, Tensor] | None) -> LossOutput:
    count = units.to(total.dtype)
    # Dividing an empty sum by one keeps a zero that is still connected to the model: with DDP, a rank whose rows are
    # all masked must take part in the backward pass.
    denominator = count.clamp(min=1.0)
    means = {name: value.detach().sum() / denominator for name, value in (metrics or {}).items()}
    return LossOutput(loss=total / denominator, total=total, count=count, metrics=means)
