"""Constraints on the retain losses and their multipliers (dual variables).

The constrained problem of arXiv 2506.05314:

    min_theta  L_f(theta)   subject to   L_k(theta) <= eps_k,   k = 1..K

has the Lagrangian `L_f + sum_k lambda_k (L_k - eps_k)` with `lambda_k >= 0`. A trainer descends on theta and
[`DualVariables`] ascends on lambda:

    lambda_k <- clip(lambda_k + eta_k * v_k, 0, lambda_max),   v_k = L_k - eps_k

**Units.** With `normalize=True` every constraint is written `L_k / eps_k - 1 <= 0`, so that the violation is
`v_k = (L_k - eps_k) / eps_k` both in the Lagrangian and in the ascent. If the trainer also divides the forget loss by
its value `F` at step 0, then multiplying any of the losses (and its eps) by a constant changes nothing: lambda_0 and
eta carry over between losses and models. The two forms are the same algorithm in other units:

    lambda_normalized = lambda * eps / F        eta_normalized = eta * eps^2 / F

so a published (lambda_0, eta) can be converted; the weight of the retain loss is lambda_normalized / eps.

Shapes: K constraints.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hf_unlearn.constraint import RetainConstraint, check_number

__all__ = ["DualVariables", "RetainConstraint"]

STATE_VERSION = 1


class DualVariables:
    r"""The multipliers of several named constraints, and the only owner of their state.

    The state lives in 64-bit tensors on `device`; [`~DualVariables.ascend`] and [`~DualVariables.lagrangian`] never
    wait for the device. Pass losses that are already reduced over ranks and micro-batches: the multipliers are then
    identical on every rank.

    Args:
        constraints (`Sequence[RetainConstraint]`):
            Constraints with an absolute limit (see [`RetainConstraint.calibrated`]) and distinct names.
        multiplier (`float`, *optional*, defaults to `1.0`):
            Initial value lambda_0 of every multiplier.
        step_size (`float`, *optional*, defaults to `0.5`):
            Step eta of the projected ascent.
        max_multiplier (`float`, *optional*):
            Cap lambda_max. Without one, the multipliers of constraints that cannot be met grow for ever.
        warmup_updates (`int`, *optional*, defaults to `0`):
            Number of calls of [`~DualVariables.ascend`] that leave the multipliers at lambda_0 (the warm start).
        smoothing (`float`, *optional*, defaults to `0.0`):
            Coefficient s in [0, 1) of the moving average `s * old + (1 - s) * new` of the measured losses. It starts
            at the first measured value and also follows the warm start. 0 uses each loss as it is.
        normalize (`bool`, *optional*, defaults to `False`):
            Measure violations relative to eps, see the top of this module.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`):
            Where the state lives.

    Raises:
        `ValueError`: on a repeated name, a relative limit that was not calibrated, a multiplier above the cap, or
            `normalize` with `eps = 0`.
    """

    def __init__(
        self,
        constraints: Sequence[RetainConstraint],
        *,
        multiplier: float = 1.0,
        step_size: float = 0.5,
        max_multiplier: float | None = None,
        warmup_updates: int = 0,
        smoothing: float = 0.0,
        normalize: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        check_number("DualVariables", "multiplier", multiplier)
        check_number("DualVariables", "step_size", step_size, positive=True)
        check_number("DualVariables", "max_multiplier", max_multiplier, positive=True)
        check_number("DualVariables", "smoothing", smoothing)
        if smoothing >= 1:
            raise ValueError(f"DualVariables: smoothing must be in [0, 1), got {smoothing!r}: 1 never moves.")
        if isinstance(warmup_updates, bool) or not isinstance(warmup_updates, int) or warmup_updates < 0:
            raise ValueError(f"DualVariables: warmup_updates must be an integer >= 0, got {warmup_updates!r}.")
        self.names = tuple(constraint.name for constraint in constraints)
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"DualVariables: constraint names must differ, got {list(self.names)}.")
        self.normalize = normalize
        self.max_multiplier = max_multiplier
        self.warmup_updates = warmup_updates
        self.smoothing = smoothing
        self.updates = 0
        self.device = torch.device(device)
        # 64 bits so that thousands of small steps add up exactly as in the checkpoint; MPS has no 64-bit floats
        self.dtype = torch.float32 if self.device.type == "mps" else torch.float64

        initial = [multiplier if c.multiplier is None else c.multiplier for c in constraints]
        for name, value in zip(self.names, initial, strict=True):
            if max_multiplier is not None and value > max_multiplier:
                raise ValueError(
                    f"DualVariables: the initial multiplier {value!r} of {name!r} is above "
                    f"max_multiplier={max_multiplier!r}."
                )
        self._set_limits(constraints)
        self._step_sizes = self._vector([step_size if c.step_size is None else c.step_size for c in constraints])
        self._multipliers = self._vector(initial)
        self._losses = self._vector([0.0] * len(self.names))  # last finite measured value
        self._smoothed = self._losses.clone()
        self._measured = torch.zeros(len(self.names), dtype=torch.bool, device=self.device)
        self._nonfinite = torch.zeros(len(self.names), dtype=torch.int64, device=self.device)

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(names={list(self.names)}, updates={self.updates})"

    @property
    def eps(self) -> dict[str, float]:
        """Absolute limit of every constraint."""
        return {c.name: float(c.eps) for c in self.constraints if c.eps is not None}

    @property
    def multipliers(self) -> Tensor:
        """Multipliers lambda `(K,)`, in the order of `names`, detached."""
        return self._multipliers

    @property
    def warming_up(self) -> bool:
        """Whether the next call of `ascend` still belongs to the warm start."""
        return self.updates < self.warmup_updates

    def multiplier(self, name: str) -> Tensor:
        """Multiplier lambda `()` of one constraint."""
        return self._multipliers[self._index(name)]

    def weights(self) -> dict[str, Tensor]:
        """Factor `()` of each retain loss in the Lagrangian: lambda, or lambda / eps with `normalize`."""
        return dict(zip(self.names, (self._multipliers / self._scale).unbind(), strict=True))

    def lagrangian(self, losses: Mapping[str, Tensor | None]) -> Tensor:
        """Sum of lambda_k v_k over the given losses, differentiable in the losses and constant in lambda.

        Args:
            losses (`Mapping[str, Tensor | None]`):
                Loss `()` by constraint; a constraint that is absent or None contributes nothing.

        Returns:
            `Tensor`: scalar `()` of the losses' dtype (32 bits at least); zero, without gradient, when none is given.
        """
        self._check_names(losses)
        eps, total = self.eps, torch.zeros((), device=self.device)
        for name, weight in self.weights().items():
            loss = losses.get(name)
            if loss is not None:
                weight = weight.to(loss.device, torch.promote_types(loss.dtype, torch.float32))
                total = total.to(loss.device) + weight * (loss - eps[name])
        return total

    def violations(self, losses: Mapping[str, Tensor | float | None]) -> dict[str, Tensor]:
        """Violation v_k `()` of each given loss, detached: L - eps, or (L - eps) / eps with `normalize`."""
        values, _ = self._gather(losses, None)
        by_name = zip(self.names, ((values - self._eps) / self._scale).unbind(), strict=True)
        return {name: violation for name, violation in by_name if losses.get(name) is not None}

    @torch.no_grad()
    def ascend(
        self,
        losses: Mapping[str, Tensor | float | None],
        counts: Mapping[str, Tensor | float] | None = None,
    ) -> None:
        """Take one projected ascent step: lambda <- clip(lambda + eta v, 0, lambda_max).

        Call it once per optimizer step, or once per epoch with losses measured on a calibration set. Every call counts
        as one update. A constraint whose loss is absent or None, or whose count is 0, keeps its multiplier. So does
        one whose loss is NaN or infinite: this is recorded, and `check_finite` raises on it.

        Args:
            losses (`Mapping[str, Tensor | float | None]`):
                Measured loss `()` by constraint, in the units of eps, reduced over ranks and micro-batches.
            counts (`Mapping[str, Tensor | float]`, *optional*):
                Number of tokens (or sequences) behind each loss; lets a batch without labels be skipped on the device.

        Raises:
            `ValueError`: on a name that is no constraint.
        """
        values, given = self._gather(losses, counts)
        finite = values.isfinite()
        self._nonfinite += given & ~finite
        given &= finite
        averaged = torch.where(self._measured, torch.lerp(values, self._smoothed, self.smoothing), values)
        self._losses = torch.where(given, values, self._losses)
        self._smoothed = torch.where(given, averaged, self._smoothed)
        self._measured = self._measured | given
        if not self.warming_up:
            violation = (self._smoothed - self._eps) / self._scale
            moved = (self._multipliers + self._step_sizes * violation).clamp(min=0.0, max=self.max_multiplier)
            self._multipliers = torch.where(given, moved, self._multipliers)
        self.updates += 1

    def check_finite(self) -> None:
        """Raise if any measured loss was NaN or infinite. Waits for the device: call it where metrics are logged.

        Raises:
            `ValueError`: naming the constraints.
        """
        bad = {name: n for name, n in zip(self.names, self._nonfinite.tolist(), strict=True) if n}
        if bad:
            raise ValueError(
                f"The losses of these constraints were NaN or infinite (number of updates): {bad}, after "
                f"{self.updates} updates in all. Their multipliers were left as they were. Lower the learning rate, "
                "clip gradients, or check the rows of these retain sets."
            )

    def feasible(self, losses: Mapping[str, Tensor | float | None], slack: float = 0.0) -> bool:
        """Whether every constraint holds: loss <= eps + slack. NaN never does.

        Args:
            losses (`Mapping[str, Tensor | float | None]`):
                A measured loss for each of the constraints.
            slack (`float`, *optional*, defaults to `0.0`):
                Absolute slack, in the units of the loss.

        Raises:
            `ValueError`: if a constraint was not measured, because nothing can then be claimed.
        """
        self._check_names(losses)
        measured = {name: loss for name, loss in losses.items() if loss is not None}
        missing = [name for name in self.names if name not in measured]
        if missing:
            raise ValueError(f"Cannot tell whether all constraints hold: no loss was given for {missing}.")
        return all(float(measured[name]) <= eps + slack for name, eps in self.eps.items())

    def summary(self, losses: Mapping[str, Tensor | float | None] | None = None) -> list[dict[str, Any]]:
        """Report one row a constraint: name, eps, loss, multiplier, feasible.

        Args:
            losses (`Mapping[str, Tensor | float | None]`, *optional*):
                Losses to report; by default the last measured ones. Without one, `loss` and `feasible` are None.
        """
        if losses is None:
            seen = zip(self.names, self._losses.tolist(), self._measured.tolist(), strict=True)
            losses = {name: loss if measured else None for name, loss, measured in seen}
        self._check_names(losses)
        rows: list[dict[str, Any]] = []
        for (name, eps), multiplier in zip(self.eps.items(), self._multipliers.tolist(), strict=True):
            given = losses.get(name)
            loss = None if given is None else float(given)
            feasible = None if loss is None else loss <= eps
            rows.append({"name": name, "eps": eps, "loss": loss, "multiplier": multiplier, "feasible": feasible})
        return rows

    def state_dict(self) -> dict[str, Any]:
        """Plain state, exact through JSON (a 64-bit float prints and parses back to itself). Waits for the device."""
        measured = self._measured.tolist()
        return {
            "version": STATE_VERSION,
            "names": list(self.names),
            "updates": self.updates,
            "eps": list(self.eps.values()),
            "multipliers": self._multipliers.tolist(),
            "losses": [x if m else None for x, m in zip(self._losses.tolist(), measured, strict=True)],
            "smoothed": [x if m else None for x, m in zip(self._smoothed.tolist(), measured, strict=True)],
            "nonfinite": self._nonfinite.tolist(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state, bit for bit.

        The saved limits win over the ones given to the constructor, because they were calibrated before step 0 of the
        run that continues; a difference is warned about.

        Raises:
            `ValueError`: if the state belongs to other constraints or to another version of the format.
        """
        if state.get("version") != STATE_VERSION:
            raise ValueError(
                f"DualVariables: expected a state of version {STATE_VERSION}, got {state.get('version')!r}. "
                "Resume with the release that wrote the checkpoint."
            )
        saved = list(state["names"])
        if saved != list(self.names):
            raise ValueError(
                f"DualVariables: the saved state is for the constraints {saved}, this run has {list(self.names)} "
                f"(missing: {sorted(set(self.names) - set(saved))}, unexpected: "
                f"{sorted(set(saved) - set(self.names))}). Resume with the same retain sets in the same order, "
                "or start a new run."
            )
        if list(state["eps"]) != list(self.eps.values()):
            warnings.warn(
                f"The limits of the saved run {dict(zip(saved, state['eps'], strict=True))} replace {self.eps}: a "
                "resumed run keeps its limits. Start a new run to change them.",
                stacklevel=2,
            )
        self._set_limits(
            [replace(c, eps=x, tolerance=None) for c, x in zip(self.constraints, state["eps"], strict=True)]
        )
        self.updates = int(state["updates"])
        self._multipliers = self._vector(state["multipliers"])
        self._losses = self._vector([x or 0.0 for x in state["losses"]])
        self._smoothed = self._vector([x or 0.0 for x in state["smoothed"]])
        self._measured = torch.tensor([x is not None for x in state["losses"]], dtype=torch.bool, device=self.device)
        self._nonfinite = torch.tensor(state["nonfinite"], dtype=torch.int64, device=self.device)

    def _set_limits(self, constraints: Sequence[RetainConstraint]) -> None:
        for constraint in constraints:
            if constraint.eps is None:
                raise ValueError(
                    f"DualVariables: {constraint.name!r} has a relative limit (tolerance={constraint.tolerance!r}). "
                    "Measure its reference loss and pass constraint.calibrated(reference_loss)."
                )
            if self.normalize and constraint.eps == 0:
                raise ValueError(
                    f"DualVariables: normalize=True divides by eps, which is 0 for {constraint.name!r}. "
                    "Give eps > 0, or normalize=False."
                )
        self.constraints = tuple(constraints)
        self._eps = self._vector([c.eps for c in constraints if c.eps is not None])
        self._scale = self._eps.clone() if self.normalize else torch.ones_like(self._eps)

    def _vector(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(list(values), dtype=self.dtype, device=self.device)

    def _index(self, name: str) -> int:
        self._check_names({name: None})
        return self.names.index(name)

    def _check_names(self, given: Mapping[str, Any]) -> None:
        unknown = [name for name in given if name not in self.names]
        if unknown:
            raise ValueError(f"No constraint is named {unknown}; the constraints are {list(self.names)}.")

    def _gather(
        self, losses: Mapping[str, Tensor | float | None], counts: Mapping[str, Tensor | float] | None
    ) -> tuple[Tensor, Tensor]:
        """Losses `(K,)`, 0 where there is none, and whether there is one `(K,)` bool; copies nothing to the host."""
        self._check_names(losses)
        self._check_names(counts or {})

        def scalar(value: Tensor | float) -> Tensor:
            if isinstance(value, Tensor):
                return value.detach().reshape(()).to(self.device, self.dtype)
            return torch.full((), float(value), dtype=self.dtype, device=self.device)

        values, given = [], []
        for name in self.names:
            loss = losses.get(name)
            values.append(scalar(0.0 if loss is None else loss))
            count = 1.0 if counts is None else counts.get(name, 1.0)
            given.append(scalar(0.0 if loss is None else count) > 0)
        if not values:
            return self._vector([]), torch.zeros(0, dtype=torch.bool, device=self.device)
        return torch.stack(values), torch.stack(given)
