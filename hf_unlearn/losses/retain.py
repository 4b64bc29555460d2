"""Retain losses, means over response tokens: what the model must keep.

Shapes: B batch, T tokens, V vocabulary. `logits (B, T, V)` and `labels (B, T)` are unshifted, -100 outside the
response.
"""

from __future__ import annotations

from torch import Tensor

from hf_unlearn.losses.rows import row_kl_to_reference, target_log_probs
from hf_unlearn.losses.tokens import LossOutput, reduce_tokens, reference_positions, response_positions


def nll_loss(logits: Tensor, labels: Tensor, *, weights: Tensor | None = None) -> LossOutput:
    """Cross-entropy, `-log p_y`. On refusals as labels it is the forget loss IdkNLL (TOFU, arXiv 2401.06121).

    Args:
        logits (`Tensor`): shape `(B, T, V)`.
        labels (`Tensor`): shape `(B, T)`, -100 outside the response.
        weights (`Tensor`, *optional*): shape `(B,)` or `(B, T-1)`, multiplies the per-token values without gradient.

    Returns:
        [`LossOutput`]: in nats.
    """
    rows, targets, mask = response_positions(logits, labels)
    return reduce_tokens(-target_log_probs(rows, targets), mask, weights=weights)


def kl_to_reference_loss(
    logits: Tensor, ref_logits: Tensor, labels: Tensor, *, weights: Tensor | None = None
) -> LossOutput:
    """KL divergence from a frozen model, `KL(p_ref || p) = sum_k p_ref,k (log p_ref,k - log p_k)`.

    Zero at the reference model, so a limit on it needs no calibration. It is the KL regulariser of TOFU (arXiv
    2401.06121) at response positions.

    Args:
        logits (`Tensor`): shape `(B, T, V)`.
        ref_logits (`Tensor`): shape `(B, T, V)`, of the frozen model. Detached.
        labels (`Tensor`): shape `(B, T)`, -100 outside the response. They only say where to compare.
        weights (`Tensor`, *optional*): shape `(B,)` or `(B, T-1)`, multiplies the per-token values without gradient.

    Returns:
        [`LossOutput`]: in nats.
    """
    rows, targets, mask = response_positions(logits, labels)
    ref_rows = reference_positions(ref_logits, logits, labels)
    return reduce_tokens(row_kl_to_reference(rows, ref_rows, targets), mask, weights=weights)
