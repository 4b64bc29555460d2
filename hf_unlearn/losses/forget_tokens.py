"""Forget losses that are means over response tokens.

Shapes: B batch, T tokens, V vocabulary. `z` are the logits (V,) of one response position, `p = softmax(z)`, `y` its
label. All functions take unshifted `logits (B, T, V)` and `labels (B, T)` with -100 outside the response; lower is
more forgotten. `weights (B,)` or `(B, T-1)` multiply the per-token values without gradient; the count stays the number
of response tokens.
"""

from __future__ import annotations

import math

from torch import Tensor

from hf_unlearn.losses.rows import (
    row_kl_to_uniform,
    row_margin,
    row_missing_entropy,
    row_undial,
    saturation_importance,
    target_log_probs,
    weighted_ascent,
)
from hf_unlearn.losses.tokens import LossOutput, reduce_tokens, reference_positions, response_positions


def lmf_loss(logits: Tensor, labels: Tensor, *, weights: Tensor | None = None) -> LossOutput:
    """Logit-margin flattening (LMF), `(max_k z_k - mean_k z_k)^2` (arXiv 2506.05314).

    No softmax, convex in the logits, and with the gradient `2 m (e_argmax - 1/V)` of norm `~2 m` for a margin `m`: it
    is large exactly where the model is certain, and where the gradients of entropy and of cross-entropy have vanished.
    It does not switch off by itself (see [`target_gate`]). It is the hard-max, squared relative of
    [`kl_to_uniform_loss`]: `m - log V <= KL(U || p) <= m`.

    Args:
        logits (`Tensor`): shape `(B, T, V)`.
        labels (`Tensor`): shape `(B, T)`, -100 outside the response.
        weights (`Tensor`, *optional*): shape `(B,)` or `(B, T-1)`.

    Returns:
        [`LossOutput`]: in squared logits; metric `margin`, the mean margin in logits.
    """
    rows, _, mask = response_positions(logits, labels)
    margin = row_margin(rows)
    return reduce_tokens(margin.square(), mask, weights=weights, metrics={"margin": margin})


def kl_to_uniform_loss(logits: Tensor, labels: Tensor, *, weights: Tensor | None = None) -> LossOutput:
    """KL divergence from the uniform distribution to the model, `KL(U || p) = logsumexp(z) - mean(z) - log V`.

    The soft counterpart of [`lmf_loss`] (arXiv 2506.05314). Zero for uniform predictions, linear in large margins.

    Args:
        logits (`Tensor`): shape `(B, T, V)`.
        labels (`Tensor`): shape `(B, T)`, -100 outside the response.
        weights (`Tensor`, *optional*): shape `(B,)` or `(B, T-1)`.

    Returns:
        [`LossOutput`]: in nats.
    """
    rows, _, mask = response_positions(logits, labels)
    return reduce_tokens(row_kl_to_uniform(rows), mask, weights=weights)


def entropy_loss(logits: Tensor, labels: Tensor, *, weights: Tensor | None = None) -> LossOutput:
    """Missing entropy, `log V - H(p) = KL(p || U)` (maximising entropy, arXiv 2410.08109).

    Minimising it maximises the entropy; the shift by `log V` makes it non-negative and zero at the uniform
    distribution. Its gradient vanishes where the model is certain.

    Args:
        logits (`Tensor`): shape `(B, T, V)`.
        labels (`Tensor`): shape `(B, T)`, -100 outside the response.
        weights (`Tensor`, *optional*): shape `(B,)` or `(B, T-1)`.

    Returns:
        [`LossOutput`]: in nats; metric `entropy`.
    """
    rows, _, mask = response_positions(logits, labels)
    missing = row_missing_entropy(rows)
    entropy = math.log(logits.shape[-1]) - missing
    return reduce_tokens(missing, mask, weights=weights, metrics={"entropy": entropy})


def grad_ascent_loss(logits: Tensor, labels: Tensor, *, weights: Tensor | None = None) -> LossOutput:
    """Gradient ascent on the cross-entropy, `log p_y` (arXiv 2210.01504; the forget term of GradDiff in 2401.06121).

    Unbounded below: it goes on pushing long after a token is forgotten.

    Args:
        logits (`Tensor`): shape `(B, T, V)`.
        labels (`Tensor`): shape `(B, T)`, -100 outside the response.
        weights (`Tensor`, *optional*): shape `(B,)` or `(B, T-1)`.

    Returns:
        [`LossOutput`]: in nats, never positive; metric `nll`.
    """
    rows, targets, mask = response_positions(logits, labels)
    logp = target_log_probs(rows, targets)
    return reduce_tokens(logp, mask, weights=weights, metrics={"nll": -logp})


def wga_loss(logits: Tensor, labels: Tensor, *, beta: float = 1.0, weights: Tensor | None = None) -> LossOutput:
    """Weighted gradient ascent (WGA), `p_y^beta log p_y` with the weight `p_y^beta` detached (arXiv 2502.19301).

    The weight fades out tokens that are already unlikely; `beta=0` is [`grad_ascent_loss`].

    Args:
        logits (`Tensor`): shape `(B, T, V)`.
        labels (`Tensor`): shape `(B, T)`, -100 outside the response.
        beta (`float`, *optional*, defaults to 1.0): exponent of the probability.
        weights (`Tensor`, *optional*): shape `(B,)` or `(B, T-1)`, on top of the loss's own weight.

    Returns:
        [`LossOutput`]: in nats; metric `nll`, unweighted.
    """
    rows, targets, mask = response_positions(logits, labels)
    logp = target_log_probs(rows, targets)
    return reduce_tokens(weighted_ascent(logp, beta=beta), mask, weights=weights, metrics={"nll": -logp})


def satimp_loss(
    logits: Tensor, labels: Tensor, *, beta1: float = 5.0, beta2: float = 1.0, weights: Tensor | None = None
) -> LossOutput:
    """SatImp, `p_y^beta1 (1 - p_y)^beta2 log p_y` with both weights detached (arXiv 2505.11953).

    Saturation (`beta1`) fades out tokens that are already unlikely, importance (`beta2`) those that are certain.

    Args:
        logits (`Tensor`): shape `(B, T, V)`.
        labels (`Tensor`): shape `(B, T)`, -100 outside the response.
        beta1 (`float`, *optional*, defaults to 5.0): exponent of `p_y`.
        beta2 (`float`, *optional*, defaults to 1.0): exponent of `1 - p_y`.
        weights (`Tensor`, *optional*): shape `(B,)` or `(B, T-1)`, on top of the loss's own weight.

    Returns:
        [`LossOutput`]: in nats; metric `nll`, unweighted.
    """
    rows, targets, mask = response_positions(logits, labels)
    logp = target_log_probs(rows, targets)
    values = saturation_importance(logp, beta1=beta1, beta2=beta2)
    return reduce_tokens(values, mask, weights=weights, metrics={"nll": -logp})


def undial_loss(
    logits: Tensor, ref_logits: Tensor, labels: Tensor, *, beta: float = 10.0, weights: Tensor | None = None
) -> LossOutput:
    """UNDIAL, cross-entropy to the reference distribution with the label's logit lowered (arXiv 2402.10052).

    `-sum_k q_k log p_k` with `q = softmax(z_ref - beta onehot(y))`, at response positions only.

    Args:
        logits (`Tensor`): shape `(B, T, V)`.
        ref_logits (`Tensor`): shape `(B, T, V)`, of the model before unlearning. Detached.
        labels (`Tensor`): shape `(B, T)`, -100 outside the response.
        beta (`float`, *optional*, defaults to 10.0): how far the label's logit is lowered, in logits.
        weights (`Tensor`, *optional*): shape `(B,)` or `(B, T-1)`.

    Returns:
        [`LossOutput`]: in nats; its minimum is the entropy of `q`, not zero.
    """
    rows, targets, mask = response_positions(logits, labels)
    values = row_undial(rows, reference_positions(ref_logits, logits, labels), targets, beta=beta)
    return reduce_tokens(values, mask, weights=weights)
