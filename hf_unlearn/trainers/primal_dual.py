"""PrimalDualTrainer: forget subject to a hard limit on what may be lost (arXiv 2506.05314)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers.utils import logging

from ..duals import DualVariables, RetainConstraint
from .accounting import retain_key
from .base import UnlearningTrainer
from .config import UnlearningConfig
from .datasets import wrong_answers
from .objective import ForgetTarget
from .primal_dual_config import PrimalDualConfig
from .state import load_method_state

logger = logging.get_logger(__name__)

# Added to the selection score of a checkpoint that violates a constraint: every feasible one is better.
_INFEASIBLE = 1e6


class PrimalDualTrainer(UnlearningTrainer):
    r"""
    Minimises the forget loss subject to `L_r^k <= eps_k` for every retain set k; the weights of the retain losses are
    dual variables and are learned (arXiv 2506.05314).

        warm start:   theta steps with lambda = lambda_0
        every step:   theta  <- optimizer step on  L_f(theta) + sum_k lambda_k (L_r^k(theta) - eps_k)
                      lambda <- clip(lambda + eta (L_r(theta) - eps), 0, lambda_max)

    Losses and multipliers are those of the whole optimizer step: summed over its micro-batches and over all ranks.
    With `load_best_model_at_end` (the default) `train()` leaves behind the best *feasible* checkpoint.

    Arguments are those of [`UnlearningTrainer`], with [`PrimalDualConfig`] as `args` and a required `retain_dataset`.
    """

    method = "primal-dual"
    config_class = PrimalDualConfig
    _tag_names = ("hf_unlearn", "unlearning", "primal-dual")

    duals: DualVariables | None = None
    feasibility: list[dict[str, Any]] | None = None

    def _check_arguments(self, args: UnlearningConfig) -> None:
        assert isinstance(args, PrimalDualConfig)
        super()._check_arguments(args)
        if not self.data.retain:
            raise ValueError("retain_dataset is missing. The primal-dual constraint is a limit on its loss.")
        for name in ("retain_eps", "retain_tolerance", "retain_margin"):
            value = getattr(args, name)
            if isinstance(value, dict) and set(value) != set(self.data.retain):
                raise ValueError(f"{name} names {sorted(value)}, but the retain sets are {sorted(self.data.retain)}.")
        if args.forget_target is not None and not self.objective.accepts_target:
            raise ValueError(
                f"forget_target={args.forget_target!r} gates a loss that has a value for each token; "
                f'forget_loss="{args.forget_loss}" has none. Set forget_target to "none", or choose "lmf".'
            )
        if args.retain_weight != 1.0:
            raise ValueError("retain_weight is learned by the primal-dual method; set dual_init instead.")
        if args.retain_loss == "kl" and args.retain_eps is None:
            raise ValueError(
                'With retain_loss="kl" the loss before step 0 is 0, so relative limits mean nothing: give retain_eps, '
                "the divergence in nats per token that is allowed."
            )
        streams = any(isinstance(rows, IterableDataset) for rows in (self.data.forget, *self.data.retain.values()))
        if streams and args.dual_warmup_steps is None and args.dual_warmup_epochs > 0:
            raise ValueError("A stream has no epochs to count the warm start in: set dual_warmup_steps.")
        if args.forget_target == "holdout" and self.data.holdout is None:
            self._wrong_answers = wrong_answers(self._largest_retain_set(), args.seed)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As [`UnlearningTrainer.train`]; then measures the returned model and says whether it is feasible."""
        output = super().train(resume_from_checkpoint, **kwargs)
        self._adopt_best_multipliers()
        metrics = self.evaluate(metric_key_prefix="final")
        assert self.feasibility is not None
        output.metrics.update({key: value for key, value in metrics.items() if key.startswith("final_")})
        for row in self.feasibility:
            if not row["feasible"]:
                logger.warning(
                    f"Infeasible: the loss on retain set {row['name']!r} is {row['loss']:.4g}, above its limit eps = "
                    f"{row['eps']:.4g}. The returned model is the one that violates the constraints least. Raise the "
                    "limit, lower the learning rate, or train longer."
                )
        return output

    def _adopt_best_multipliers(self) -> None:
        """The multipliers that are reported and saved are those of the checkpoint that is returned."""
        best = self.state.best_model_checkpoint
        if self.args.load_best_model_at_end and best is not None and self.duals is not None:
            state, _ = load_method_state(best, self.method)
            if state["duals"] is not None:
                self.duals.load_state_dict(state["duals"])

    # ---- before step 0 ---------------------------------------------------------------------------------------------

    def calibrate(self, model: Any) -> None:
        """Measures the limits, the scale of the forget loss and the forget level with the model as it came."""
        super().calibrate(model)
        constraints = []
        for name in self.data.retain:
            reference = self.measure_retain(model, self._calibration_rows(name), name)
            constraint = self._constraint(name, reference)
            if constraint.eps is not None and constraint.eps < 0.5 * reference:
                logger.warning(
                    f"retain set {name!r}: eps = {constraint.eps:.4g} is below half of the loss before step 0 "
                    f"({reference:.4g}). The model would have to become better at it than it is, which forgetting "
                    "does not do: expect an infeasible run. Use retain_margin or retain_tolerance to calibrate eps."
                )
            constraints.append(constraint)
        self.duals = self._new_duals(constraints)
        if self.args.forget_target is not None:
            self.target = self._forget_target(self._level(model))
        log = {f"eps/{name}": eps for name, eps in self.duals.eps.items()}
        log["dual_warmup_steps"] = self.duals.warmup_updates
        if self.target is not None:
            log["forget_level"] = self.target.level
        self.log(log)

    def _largest_retain_set(self) -> Dataset:
        tables = [rows for rows in self.data.retain.values() if isinstance(rows, Dataset)]
        return max(tables or list(self.data.retain_eval.values()), key=len)

    def _calibration_rows(self, name: str) -> Dataset:
        return self.data.retain_eval[name]

    def _constraint(self, name: str, reference: float) -> RetainConstraint:
        def value(option: Any) -> float | None:
            return option[name] if isinstance(option, dict) else option

        eps, tolerance, margin = map(
            value, (self.args.retain_eps, self.args.retain_tolerance, self.args.retain_margin)
        )
        if eps is None and margin is not None:
            eps = reference + margin
        elif eps is None:
            assert tolerance is not None, "the config sets a margin where no limit is given"
            eps = (1.0 + tolerance) * reference
        return RetainConstraint(name=name, eps=eps)

    def _new_duals(self, constraints: list[RetainConstraint]) -> DualVariables:
        return DualVariables(
            constraints,
            multiplier=self.args.dual_init,
            step_size=self.args.dual_lr,
            max_multiplier=self.args.dual_max,
            warmup_updates=self._warmup_updates(),
            smoothing=self.args.dual_smoothing,
            device=self.accelerator.device,
        )

    def _warmup_updates(self) -> int:
        per_epoch = self.state.max_steps
        if self.callback_handler.train_dataloader is not None and not isinstance(self.data.forget, IterableDataset):
            batches = len(self.callback_handler.train_dataloader)
            per_epoch = max(1, math.ceil(batches / self.args.gradient_accumulation_steps))
        if self.args.dual_update == "epoch":
            steps = self.args.dual_warmup_steps
            return math.ceil(self.args.dual_warmup_epochs if steps is None else steps / per_epoch)
        if self.args.dual_warmup_steps is not None:
            return self.args.dual_warmup_steps
        return round(self.args.dual_warmup_epochs * per_epoch)

    def _level(self, model: Any) -> float:
        if self.args.forget_target != "holdout":
            return float(self.args.forget_target)
        rows = self.data.holdout if self.data.holdout is not None else self._wrong_answers
        return self.measure_nll(model, rows, "unseen text")["example"]

    def _forget_target(self, level: float) -> ForgetTarget:
        return ForgetTarget(
            level=level,
            by=self.args.forget_target_by,
            mode=self.args.forget_target_mode,
            band=self.args.forget_target_band,
            pull=self.args.forget_target_pull,
        )

    # ---- the step --------------------------------------------------------------------------------------------------

    def retain_weights(self) -> dict[str, Tensor | float]:
        """The multipliers, constant within a step."""
        if self.duals is None:  # evaluate() before train()
            return dict.fromkeys(self.data.retain, self.args.dual_init)
        return dict(self.duals.weights())

    def after_step(self, means: dict[str, Tensor]) -> dict[str, Tensor]:
        """Projected ascent on the multipliers; nothing here waits for the device."""
        assert self.duals is not None
        names = self.duals.names
        losses = {name: means[retain_key(name)] for name in names}
        counts = {name: self.ledger.counts[retain_key(name)] for name in names}
        logs = {f"dual/{name}": self.duals.multiplier(name).clone() for name in names}
        logs |= {f"violation/{name}": violation for name, violation in self.duals.violations(losses).items()}
        if self.args.dual_update == "step":
            self.duals.ascend(losses, counts)
        return logs

    # ---- feasibility -----------------------------------------------------------------------------------------------

    def evaluation_metrics(self, forget: Mapping[str, float], retain: Mapping[str, float]) -> dict[str, float]:
        """Violations on held-out rows, feasibility, and the score that chooses the best feasible checkpoint."""
        if self.duals is None:
            return {}
        finished_epochs = math.floor((self.state.epoch or 0.0) + 1e-6)
        if self.args.dual_update == "epoch" and self.is_in_train and self.duals.updates < finished_epochs:
            self.duals.ascend(retain)  # once an epoch, however often is evaluated
        self.feasibility = self.duals.summary(retain)
        slack = self.args.feasibility_slack
        for row in self.feasibility:
            row["feasible"] = bool(row["loss"] <= row["eps"] + slack)
        feasible = all(row["feasible"] for row in self.feasibility)
        worst = max((row["loss"] - row["eps"] - slack) / max(row["eps"], 1e-8) for row in self.feasibility)
        score = self._selection_value(forget) if feasible else _INFEASIBLE * (1.0 + worst)
        metrics = {f"violation/{row['name']}": row["loss"] - row["eps"] for row in self.feasibility}
        metrics |= {f"dual/{row['name']}": row["multiplier"] for row in self.feasibility}
        return {**metrics, "feasible": float(feasible), "selection_score": score}

    def _selection_value(self, forget: Mapping[str, float]) -> float:
        # A gated loss is no measure of what is left: where it is negative (gradient ascent) it rises as rows drop out.
        if self.target is not None:
            return forget["distance"] / self.target.level
        return forget["loss"] / self.normalizer

    # ---- state -----------------------------------------------------------------------------------------------------

    def method_state(self) -> dict[str, Any]:
        """Multipliers, limits and level, so that a resumed run continues bit for bit."""
        return {
            **super().method_state(),
            "duals": None if self.duals is None else self.duals.state_dict(),
            "warmup_updates": None if self.duals is None else self.duals.warmup_updates,
            "forget_level": None if self.target is None else self.target.level,
            "feasibility": self.feasibility,
        }

    def load_method_state(self, state: Mapping[str, Any]) -> None:
        """Restores [`method_state`]; calibration is not repeated."""
        super().load_method_state(state)
        saved = state["duals"]
        if saved is None:
            raise ValueError("The checkpoint has no multipliers: it was saved before training began. Start a new run.")
        if set(saved["names"]) != set(self.data.retain):
            raise ValueError(
                f"The checkpoint constrains {saved['names']}, this run has {list(self.data.retain)}. Resume with the "
                "same retain sets, or start a new run."
            )
        limits = dict(zip(saved["names"], saved["eps"], strict=True))
        self.duals = self._new_duals([RetainConstraint(name=name, eps=limits[name]) for name in self.data.retain])
        self.duals.warmup_updates = int(state["warmup_updates"])
        self.duals.load_state_dict(saved)
        self.target = None if state["forget_level"] is None else self._forget_target(float(state["forget_level"]))
        self.feasibility = state["feasibility"]
