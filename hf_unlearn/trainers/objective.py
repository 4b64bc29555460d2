"""From a batch's logits to its loss terms: which forget loss, with which parameters, towards which level."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from .. import losses
from ..losses import LossOutput
from ..losses.target import Unit

ForgetLossName = Literal[
    "lmf", "kl_uniform", "entropy", "grad_ascent", "wga", "satimp", "undial", "npo", "simnpo", "dpo", "idk_nll"
]
RetainLossName = Literal["nll", "kl"]
TargetMode = Literal["gate", "anneal", "two_sided"]

# Weight of overshoot against shortfall when a checkpoint is chosen; measured in docs/benchmarks.md.
OVERSHOOT_WEIGHT = 0.25

_TOKEN_LOSSES: dict[str, Callable[..., LossOutput]] = {
    "lmf": losses.lmf_loss,
    "kl_uniform": losses.kl_to_uniform_loss,
    "entropy": losses.entropy_loss,
    "grad_ascent": losses.grad_ascent_loss,
    "wga": losses.wga_loss,
    "satimp": losses.satimp_loss,
}
_LOSS_FUNCTIONS: dict[str, Callable[..., LossOutput]] = {
    **_TOKEN_LOSSES,
    "undial": losses.undial_loss,
    "npo": losses.npo_loss,
    "simnpo": losses.simnpo_loss,
    "dpo": losses.dpo_loss,
    "idk_nll": losses.nll_loss,
}
# Parameters a user may set by name; the rest of a signature is data.
_DATA_ARGUMENTS = frozenset(
    {
        *("logits", "labels", "weights", "ref_logits"),
        *("logps", "ref_logps", "num_tokens"),
        *("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps"),
        *("num_chosen_tokens", "num_rejected_tokens"),
    }
)


@dataclass(frozen=True, kw_only=True)
class ForgetTarget:
    """
    A level at which forgetting stops, in nats per token, and how it is approached.

    Args:
        level (`float`):
            Mean NLL per response token of text the model has never seen.
        by (`str`, *optional*, defaults to `"example"`):
            Whether the mean over an `"example"` or each `"token"` is compared with the level.
        mode (`str`, *optional*, defaults to `"gate"`):
            `"gate"` switches the forget loss off above the level, `"anneal"` fades it out over the last `band` of the
            way, `"two_sided"` is the gate plus a pull back for what lies above the level.
        band (`float`, *optional*, defaults to `0.5`):
            Width of the fading, as a share of the level.
        pull (`float`, *optional*, defaults to `1.0`):
            Weight of the pull back `((NLL - level) / level)^2`, relative to the forget loss's value at step 0.
    """

    level: float
    by: Unit = "example"
    mode: TargetMode = "gate"
    band: float = 0.5
    pull: float = 1.0


@dataclass(frozen=True, kw_only=True)
class ForgetBatch:
    """What a forget loss may look at: logits `(B, T, V)`, labels `(B, T)`, and the reference's numbers."""

    logits: Tensor
    labels: Tensor
    ref_logits: Tensor | None = None  # (B, T, V)
    ref_logps: Tensor | None = None  # (B,)
    alternative_logits: Tensor | None = None  # (B, T', V), the refusal in place of the answer
    alternative_labels: Tensor | None = None  # (B, T')
    ref_alternative_logps: Tensor | None = None  # (B,)


@dataclass(frozen=True, kw_only=True)
class ForgetObjective:
    """
    A forget loss with its parameters.

    Args:
        name (`str`):
            One of [`ForgetLossName`].
        kwargs (`Mapping[str, Any]`, *optional*):
            Parameters of the loss function, e.g. `beta`.

    Raises:
        ValueError: a parameter the loss does not have.
    """

    name: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        allowed = set(inspect.signature(_LOSS_FUNCTIONS[self.name]).parameters) - _DATA_ARGUMENTS
        unknown = sorted(set(self.kwargs) - allowed)
        if unknown:
            raise ValueError(
                f"forget_loss_kwargs has {unknown}, which forget_loss={self.name!r} does not take; "
                f"it takes: {', '.join(sorted(allowed)) or 'no parameters'}."
            )

    @property
    def needs_reference_logits(self) -> bool:
        """Whether the reference model's logits are read at every step."""
        return self.name == "undial"

    @property
    def needs_reference_logps(self) -> bool:
        """Whether one reference log-probability an example is enough (and is cached)."""
        return self.name in ("npo", "dpo")

    @property
    def needs_alternative(self) -> bool:
        """Whether each forget row needs a refusal beside its answer."""
        return self.name in ("dpo", "idk_nll")

    @property
    def counts_sequences(self) -> bool:
        """Whether the loss is a mean over sequences (else over response tokens)."""
        return self.name in ("npo", "simnpo", "dpo")

    @property
    def accepts_target(self) -> bool:
        """Whether the loss has a value for each token that a forget target can gate."""
        return self.name in _TOKEN_LOSSES

    def __call__(self, batch: ForgetBatch, *, weights: Tensor | None = None) -> LossOutput:
        """The loss of one batch; `weights` `(B,)` or `(B, T-1)` only where [`accepts_target`] is true."""
        function, kwargs = _LOSS_FUNCTIONS[self.name], dict(self.kwargs)
        if self.name in _TOKEN_LOSSES:
            return function(batch.logits, batch.labels, weights=weights, **kwargs)
        assert weights is None, f"{self.name} has no value per token to weight"
        if self.name == "undial":
            return function(batch.logits, batch.ref_logits, batch.labels, **kwargs)
        if self.name == "idk_nll":
            return function(batch.alternative_logits, batch.alternative_labels, **kwargs)
        logps, num_tokens = losses.sequence_log_probs(batch.logits, batch.labels)
        if self.name == "npo":
            return function(logps, batch.ref_logps, num_tokens=num_tokens, **kwargs)
        if self.name == "simnpo":
            return function(logps, num_tokens, **kwargs)
        assert batch.alternative_logits is not None
        assert batch.alternative_labels is not None
        chosen, num_chosen = losses.sequence_log_probs(batch.alternative_logits, batch.alternative_labels)
        return function(
            chosen,
            logps,
            batch.ref_alternative_logps,
            batch.ref_logps,
            num_chosen_tokens=num_chosen,
            num_rejected_tokens=num_tokens,
            **kwargs,
        )


def targeted_forget_loss(
    objective: ForgetObjective, batch: ForgetBatch, target: ForgetTarget, normalizer: float = 1.0
) -> LossOutput:
    """
    The forget loss towards a level: what is already as unlikely as unseen text is left alone (or pulled back).

    Args:
        objective ([`ForgetObjective`]):
            A loss with a value for each token.
        batch ([`ForgetBatch`]):
            Logits `(B, T, V)` and labels `(B, T)`.
        target ([`ForgetTarget`]):
            The level and the way to it.
        normalizer (`float`, *optional*, defaults to `1.0`):
            The forget loss's value at step 0: the scale of the pull back.
    """
    if target.mode == "two_sided":
        logp, mask = losses.token_log_probs(batch.logits, batch.labels)
    else:
        with torch.no_grad():
            logp, mask = losses.token_log_probs(batch.logits, batch.labels)
    nll = -logp
    unit_nll = nll if target.by == "token" else losses.example_nll(logp, mask).unsqueeze(-1).expand_as(mask)
    if target.mode == "anneal":
        weights = ((target.level - unit_nll) / (target.band * target.level)).clamp(0.0, 1.0) * mask
        if target.by == "both":
            weights = weights * (nll < target.level)
        return objective(batch, weights=weights)
    # The level is a mean over examples, so examples are pulled back; single tokens of unseen text lie far above it.
    unit_nll = losses.example_nll(logp, mask).unsqueeze(-1).expand_as(mask)
    gated = objective(batch, weights=losses.target_gate(nll, mask, target.level, by=target.by))
    if target.mode == "gate":
        return gated
    excess = torch.where(mask, (unit_nll - target.level).clamp(min=0.0) / target.level, 0.0)
    total = gated.total + target.pull * normalizer * excess.square().sum()
    return LossOutput(loss=total / gated.count.clamp(min=1.0), total=total, count=gated.count, metrics=gated.metrics)


def level_distance(nll: Tensor, level: float) -> Tensor:
    """
    How far rows are from the level, by the pinball loss: what is still known weighs four times what is overshot.

    A known row is a secret that is out; an overshot one could be noticed by an adversary with a reference model.

    Args:
        nll (`Tensor`):
            Mean NLL of each row `(B,)`, nats per token.
        level (`float`):
            Nats per token.

    Returns:
        `Tensor`: `max(level - NLL, 0) + 0.25 max(NLL - level, 0)`, `(B,)`.
    """
    return (level - nll).clamp(min=0.0) + OVERSHOOT_WEIGHT * (nll - level).clamp(min=0.0)


def retain_loss(name: str, logits: Tensor, labels: Tensor, ref_logits: Tensor | None) -> LossOutput:
    """The retain loss of one batch: `"nll"`, or `"kl"` from the reference's logits `(B, T, V)`."""
    if name == "kl":
        assert ref_logits is not None
        return losses.kl_to_reference_loss(logits, ref_logits, labels)
    return losses.nll_loss(logits, labels)
