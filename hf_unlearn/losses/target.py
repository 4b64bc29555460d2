"""The forget target: stop when a text is as unlikely as text that the model has never seen.

Shapes: B batch, T tokens. The *level* is a mean negative log-likelihood in nats per token, for example the model's own
on unseen answers. Forgetting beyond it destroys more than needed and marks the example as unlearned.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from hf_unlearn.losses.tokens import LossOutput, reduce_tokens, token_log_probs

Unit = Literal["example", "token", "both"]


def example_nll(logp: Tensor, mask: Tensor) -> Tensor:
    """Mean negative log-likelihood of each example.

    Args:
        logp (`Tensor`): shape `(B, T-1)`, log-probabilities of the tokens, as from [`token_log_probs`].
        mask (`Tensor`): shape `(B, T-1)`, boolean, true at response positions.

    Returns:
        `Tensor`: shape `(B,)`, nats per token; zero for an example without response. Differentiable.
    """
    return -torch.where(mask, logp, 0.0).sum(dim=-1) / mask.sum(dim=-1).clamp(min=1)


def target_gate(token_nll: Tensor, mask: Tensor, level: float | Tensor, *, by: Unit = "example") -> Tensor:
    """Weights that switch a forget loss off where the level is reached: 1 while the NLL is below it, else 0.

    Args:
        token_nll (`Tensor`): shape `(B, T-1)`, negative log-likelihoods of the tokens.
        mask (`Tensor`): shape `(B, T-1)`, boolean, true at response positions.
        level (`float` or `Tensor`): nats per token.
        by (`str`, *optional*, defaults to `"example"`): compare the mean over each `"example"`, every `"token"`, or
            `"both"`: the tokens below the level in the examples below the level.

    Returns:
        `Tensor`: shape `(B, T-1)`, zeros and ones without gradient, zero outside the mask: the `weights` of a token
        loss.

    Raises:
        ValueError: if `by` is unknown or a number given as level is not positive.
    """
    _check(level, by)
    token_nll = token_nll.detach()
    below = mask if by == "example" else mask & (token_nll < level)
    if by != "token":
        below = below & (example_nll(-token_nll, mask) < level).unsqueeze(-1)
    return below.to(token_nll.dtype)


def level_loss(logits: Tensor, labels: Tensor, level: float | Tensor, *, by: Unit = "example") -> LossOutput:
    """A two-sided pull to the level, `((NLL - level) / level)^2` per example or per token.

    It lands on the level where a gate only stops below it: too likely and too unlikely both cost. Counted in response
    tokens in both cases (each carries the value of its example), so that it adds to the other token losses.

    Args:
        logits (`Tensor`): shape `(B, T, V)`.
        labels (`Tensor`): shape `(B, T)`, -100 outside the response.
        level (`float` or `Tensor`): nats per token. Detached.
        by (`str`, *optional*, defaults to `"example"`): the unit whose NLL is pulled, `"example"` or `"token"`.

    Returns:
        [`LossOutput`]: without unit, 1 for text of probability one; metrics `nll` (nats per token) and `distance`
        (mean of `|NLL - level| / level`).

    Raises:
        ValueError: if `by` is unknown or a number given as level is not positive.
    """
    _check(level, by)
    if by == "both":
        raise ValueError("by='both' joins two gates; a pull is towards one level: by must be 'example' or 'token'")
    if isinstance(level, Tensor):
        level = level.detach()
    logp, mask = token_log_probs(logits, labels)
    nll = example_nll(logp, mask).unsqueeze(-1).expand_as(mask) if by == "example" else -logp
    distance = (nll[mask] - level) / level
    return reduce_tokens(distance.square(), mask, metrics={"nll": nll[mask], "distance": distance.abs()})


def _check(level: float | Tensor, by: str) -> None:
    if by not in ("example", "token", "both"):
        raise ValueError(f"by must be 'example', 'token' or 'both', got {by!r}")
    # A tensor is not inspected: reading it would wait for the device.
    if not isinstance(level, Tensor) and not level > 0:
        raise ValueError(f"the level is a mean negative log-likelihood and must be positive, got {level}")
