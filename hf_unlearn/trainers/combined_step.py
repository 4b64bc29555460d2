"""One optimizer step from several gradients: SAM's ascent on the forget loss, its decoupling from the retain loss."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ..geometry import (
    Fsdp2Space,
    LocalSpace,
    ParameterSpace,
    Projection,
    Vector,
    ZeroSpace,
    ascended,
    check_felt,
    combine,
    fsdp2_units,
)
from .accounting import ASCENDED, FORGET, retain_key

if TYPE_CHECKING:
    from .base import UnlearningTrainer


class CombinedStep:
    r"""
    What replaces the Trainer's backward pass where `sam_rho` or `gradient_projection` is set.

        g   = grad L_f(theta);             theta' = theta + rho g / ||g||      (sam_rho > 0)
        g_f = grad L_f(theta')             and theta is put back exactly
        g_r = grad L_r(theta)
        step on  lambda_f (g_f - c g_r) + lambda_r g_r,  c = <g_f, g_r> / ||g_r||^2   (gradient_projection)

    The gradients are those of the whole optimizer step, so micro-batches wait for the last one of their step. Beside
    what plain training needs, one copy of the trained weights or one of their gradients exists at a time.

    Args:
        trainer ([`UnlearningTrainer`]):
            Whose losses, data and engine these are.
    """

    def __init__(self, trainer: UnlearningTrainer) -> None:
        self.trainer = trainer
        self._space: ParameterSpace | None = None
        self._batches: list[Mapping[str, Any]] = []
        self._is_verified = False

    def reset(self) -> None:
        """Forgets an unfinished step; the engine may have wrapped the model anew."""
        self._space, self._batches, self._is_verified = None, [], False

    def __call__(self, model: Any, inputs: Mapping[str, Any]) -> Tensor:
        """Takes a micro-batch; with the last one of a step, does the step's work. Returns the loss to report."""
        trainer = self.trainer
        model.train()
        if callable(getattr(trainer.optimizer, "train", None)):
            trainer.optimizer.train()
        self._batches.append(trainer._prepare_inputs(inputs))
        if not trainer.accelerator.sync_gradients:
            return torch.zeros((), device=trainer.args.device)
        batches, self._batches = self._batches, []
        if self._space is None:
            self._space = make_space(model, trainer.accelerator)
        return self._take(self._space, model, batches)

    def _take(self, space: ParameterSpace, model: Any, batches: list[Mapping[str, Any]]) -> Tensor:
        trainer, args = self.trainer, self.trainer.args
        reported: list[Tensor] = []

        def forget(batch: Mapping[str, Any], *, ascent: bool = False) -> Tensor:
            with trainer.compute_loss_context_manager():
                term, _ = trainer._loss_terms(model, {"forget": batch["forget"], "retain": {}})
                loss = trainer.forget_objective(term)
            if ascent:
                trainer.ledger.add({ASCENDED: term.total})
            else:
                trainer.ledger.add(trainer.forget_sums(term))
                reported.append(loss.detach() * args.forget_weight)
            return loss

        gradient: Vector | None = space.gradient([partial(forget, batch) for batch in batches])
        norm: Tensor | None = None
        if args.sam_rho > 0:
            assert gradient is not None
            with ascended(space, gradient, args.sam_rho, check=not self._is_verified) as ascent:
                norm, gradient = ascent.norm, None  # nothing holds the direction while the next one is computed
                gradient = space.gradient([partial(forget, batch, ascent=True) for batch in batches])
        assert gradient is not None
        shares, total = retain_shares(trainer.retain_weights())

        def retain(batch: Mapping[str, Any]) -> Tensor:
            with trainer.compute_loss_context_manager():
                terms = trainer._retain_terms(model, batch["retain"])
                loss = sum((trainer.retain_objective(name, term) * shares[name] for name, term in terms.items()))
            assert isinstance(loss, Tensor)
            trainer.ledger.add({retain_key(name): term.total for name, term in terms.items()})
            reported.append(loss.detach() * total)
            return loss

        if shares:
            kept = space.gradient([partial(retain, batch) for batch in batches])
            combined = combine(
                space,
                gradient,
                kept,
                forget_weight=args.forget_weight,
                retain_weight=total,
                projection=cast(Projection, args.gradient_projection),
            )
            del kept
            gradient = combined.gradient
            self._check_retain(combined.retain_norm)
            trainer.observe({"conflict_cosine": combined.cosine})
        else:
            gradient = space.scale_(gradient, args.forget_weight)
        space.assign(gradient)
        del gradient
        means = trainer._close_step()
        if norm is not None and not self._is_verified:
            check_felt(space, float(means[FORGET]), float(means[ASCENDED]), float(norm), args.sam_rho)
        self._is_verified = True
        space.step()
        return torch.stack([value.detach().float() for value in reported]).sum()

    def _check_retain(self, norm: Tensor) -> None:
        """At the first step only: afterwards a zero gradient is what a perfect fit has, and projects on nothing."""
        args = self.trainer.args
        if self._is_verified or args.gradient_projection == "none" or args.retain_loss != "nll":
            return  # a distance from the reference begins with a gradient of zero
        if float(norm) > 0:
            return
        raise ValueError(
            f"The retain gradient is exactly zero at step {self.trainer.state.global_step + 1}, so "
            f"gradient_projection={args.gradient_projection!r} has nothing to decouple from. Are all "
            "retain labels masked, or are the trained weights no part of the forward pass?"
        )


def retain_shares(weights: Mapping[str, Tensor | float]) -> tuple[dict[str, Tensor | float], Tensor | float]:
    """
    Weights of the retain losses as shares that add up to 1, and their sum: the direction of the retain gradient stays
    defined where all multipliers are zero (equal shares then).
    """
    if not weights:
        return {}, 0.0
    total: Tensor | float = sum(weights.values())
    if isinstance(total, Tensor):
        safe = torch.where(total > 0, total, 1.0)
        return {
            name: torch.where(total > 0, weight / safe, 1.0 / len(weights)) for name, weight in weights.items()
        }, total
    equal = 1.0 / len(weights)
    return {name: weight / total if total > 0 else equal for name, weight in weights.items()}, total


def make_space(model: Any, accelerator: Any) -> ParameterSpace:
    """
    The back end for the model as the engine wrapped it.

    Raises:
        ValueError: an engine whose pieces cannot be moved (FSDP1), or one in a configuration that does not allow it.
    """
    from torch.distributed.fsdp import FullyShardedDataParallel

    if accelerator.distributed_type.value == "DEEPSPEED":
        return ZeroSpace(model)
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ValueError(
            "sam_rho and gradient_projection need FSDP2, DDP, ZeRO or a single process, and this model is wrapped by "
            "FSDP1. Set fsdp_version: 2 (accelerate) or use --accelerate_config fsdp2."
        )
    if fsdp2_units(model):
        return Fsdp2Space(model)
    return LocalSpace(model)
