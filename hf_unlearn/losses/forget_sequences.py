"""Forget losses that are means over sequences.

Shapes: B batch. `s = sum_t log p(y_t | y_<t)` is the log-probability of a response, from
[`sequence_log_probs`]. Sequences without a response token neither count nor contribute, whatever their
log-probabilities hold. Lower is more forgotten.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_unlearn.losses.rows import upcast
from hf_unlearn.losses.tokens import LossOutput, reduce_sequences


def npo_loss(logps: Tensor, ref_logps: Tensor, *, num_tokens: Tensor, beta: float = 0.1) -> LossOutput:
    """Negative preference optimization, `-(2/beta) log sigmoid(-beta (s - s_ref))` (NPO, arXiv 2404.05868).

    Its gradient is that of gradient ascent on `s`, times `2 sigmoid(beta (s - s_ref))`: 1 at the start, 0 once the
    response is unlikely relative to the reference. As `beta` goes to 0 it becomes gradient ascent.

    Args:
        logps (`Tensor`): shape `(B,)`, log-probabilities of the responses.
        ref_logps (`Tensor`): shape `(B,)`, the same under the model before unlearning. Detached.
        num_tokens (`Tensor`): shape `(B,)`, response tokens; a sequence with 0 does not count.
        beta (`float`, *optional*, defaults to 0.1): inverse temperature.

    Returns:
        [`LossOutput`]: counted in sequences; metric `log_ratio`, the mean of `s - s_ref` in nats.

    Raises:
        ValueError: if `beta` is not positive or the shapes differ.
    """
    _check(beta, logps=logps, ref_logps=ref_logps, num_tokens=num_tokens)
    active = num_tokens > 0
    log_ratio = _select(logps, active) - _select(ref_logps, active).detach()
    values = -(2.0 / beta) * F.logsigmoid(-beta * log_ratio)
    return reduce_sequences(values, active, metrics={"log_ratio": log_ratio})


def simnpo_loss(logps: Tensor, num_tokens: Tensor, *, beta: float = 4.5, gamma: float = 0.0) -> LossOutput:
    """SimNPO, `-(2/beta) log sigmoid(-beta s / n - gamma)`: no reference model, length-normalised (arXiv 2410.07163).

    Args:
        logps (`Tensor`): shape `(B,)`, log-probabilities of the responses.
        num_tokens (`Tensor`): shape `(B,)`, response tokens `n`; a sequence with 0 does not count.
        beta (`float`, *optional*, defaults to 4.5): inverse temperature.
        gamma (`float`, *optional*, defaults to 0.0): reward margin.

    Returns:
        [`LossOutput`]: counted in sequences; metric `nll`, the mean of `-s / n` in nats.

    Raises:
        ValueError: if `beta` is not positive or the shapes differ.
    """
    _check(beta, logps=logps, num_tokens=num_tokens)
    active = num_tokens > 0
    mean_logp = _select(logps, active) / num_tokens.clamp(min=1)
    values = -(2.0 / beta) * F.logsigmoid(-beta * mean_logp - gamma)
    return reduce_sequences(values, active, metrics={"nll": -mean_logp})


def dpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    num_chosen_tokens: Tensor,
    num_rejected_tokens: Tensor,
    beta: float = 0.1,
) -> LossOutput:
    """Preference for a refusal over the forget answer (DPO, arXiv 2305.18290; as IdkDPO in TOFU, arXiv 2401.06121).

    `-(2/beta) log sigmoid(beta ((s_c - s_c_ref) - (s_r - s_r_ref)))`. The factor `2/beta` is NPO's, so that the two
    are on one scale: with a constant chosen side this is [`npo_loss`].

    Args:
        chosen_logps (`Tensor`): shape `(B,)`, log-probabilities of the refusals.
        rejected_logps (`Tensor`): shape `(B,)`, log-probabilities of the forget answers.
        ref_chosen_logps (`Tensor`): shape `(B,)`, refusals under the model before unlearning. Detached.
        ref_rejected_logps (`Tensor`): shape `(B,)`, forget answers under the model before unlearning. Detached.
        num_chosen_tokens (`Tensor`): shape `(B,)`, response tokens of the refusals.
        num_rejected_tokens (`Tensor`): shape `(B,)`, response tokens of the forget answers. A pair counts if both
            sides have tokens.
        beta (`float`, *optional*, defaults to 0.1): inverse temperature.

    Returns:
        [`LossOutput`]: counted in pairs; metrics `reward_margin` (`beta` times the difference of the log-ratios) and
        `accuracy` (fraction of pairs with a positive margin).

    Raises:
        ValueError: if `beta` is not positive or the shapes differ.
    """
    _check(
        beta,
        chosen_logps=chosen_logps,
        rejected_logps=rejected_logps,
        ref_chosen_logps=ref_chosen_logps,
        ref_rejected_logps=ref_rejected_logps,
        num_chosen_tokens=num_chosen_tokens,
        num_rejected_tokens=num_rejected_tokens,
    )
    active = (num_chosen_tokens > 0) & (num_rejected_tokens > 0)
    chosen = _select(chosen_logps, active) - _select(ref_chosen_logps, active).detach()
    rejected = _select(rejected_logps, active) - _select(ref_rejected_logps, active).detach()
    margin = beta * (chosen - rejected)
    values = -(2.0 / beta) * F.logsigmoid(margin)
    return reduce_sequences(
        values, active, metrics={"reward_margin": margin, "accuracy": (margin > 0).to(margin.dtype)}
    )


def _select(logps: Tensor, active: Tensor) -> Tensor:
    """Zero before the arithmetic: the gradient of a nan that is masked afterwards would still be nan."""
    return torch.where(active, upcast(logps), 0.0)


def _check(beta: float, **per_sequence: Tensor) -> None:
    if beta <= 0:
        raise ValueError(
            f"beta must be positive, got {beta}; it divides the loss (for its limit 0 use gradient ascent)"
        )
    shapes = {name: tuple(values.shape) for name, values in per_sequence.items()}
    # Broadcasting (B,) against (B, 1) would silently compare every sequence with every other.
    if len(set(shapes.values())) != 1 or any(len(shape) != 1 for shape in shapes.values()):
        raise ValueError(f"expected tensors of one shape (B,), got {shapes}; pass sums over each response")
