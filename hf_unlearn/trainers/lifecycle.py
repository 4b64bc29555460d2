"""What surrounds the step: set-up before step 0, resume, evaluation, logs, model card."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from torch import Tensor
from transformers import TrainerControl

from ..geometry import fsdp2_units
from ..losses import IGNORE_INDEX
from .accounting import ASCENDED, FORGET, FORGET_NLL, FORGET_SEQUENCES, count_units, response_tokens, retain_key
from .checkpoints import check_same_run, resolve_checkpoint
from .lost_ranks import explain_lost_processes
from .measure import measure_sums, rank_batches, row_log_probs
from .model_card import write_model_card
from .noise import add_weight_noise
from .objective import ForgetTarget, level_distance
from .saving import Saving
from .state import load_method_state

if TYPE_CHECKING:
    from .base import UnlearningTrainer


class Lifecycle(Saving):
    """The parts of [`UnlearningTrainer`] that are not its algorithm."""

    control: TrainerControl
    target: ForgetTarget | None
    _window: dict[str, Tensor]
    _window_steps: int

    # ---- before step 0 and after a stop --------------------------------------------------------------------------

    def train(self: UnlearningTrainer, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """
        As [`~transformers.Trainer.train`]; a resumed run continues with its multipliers, limits and cached values.

        Raises:
            ValueError: the checkpoint is missing, incomplete, another method's, another model's or another run's.
            OSError: a checkpoint could not be written; what it left is deleted, earlier ones are untouched.
            FloatingPointError: a loss became NaN or infinite; the message names the step and the term.
            Preempted: SIGTERM stopped the run and its checkpoint is complete; ends the process with exit code 0.
            LostProcessError: another process of the run is gone.
        """
        self._resume_from = self._same_on_all(resolve_checkpoint, resume_from_checkpoint, self.args.output_dir)
        if self._resume_from is not None:  # refuse before anything is loaded or wrapped
            state, _ = load_method_state(self._resume_from, self.method)
            record = self.run_record()
            check_same_run(state.get("run"), record, self._resume_from, ignore_data_skip=self.args.ignore_data_skip)
        self._is_set_up = False
        if self.combined_step is not None:
            self.combined_step.reset()
        with self.preemption.listening(), explain_lost_processes(self):
            return super().train(resume_from_checkpoint=self._resume_from, **kwargs)

    def _same_on_all(self: UnlearningTrainer, function: Callable[..., Any], *args: Any) -> Any:
        """The main process's result, or its ValueError, on every process: folders may look different to each."""
        if self.args.world_size == 1:
            return function(*args)
        answer: list[Any] = [None, None]
        if self.is_world_process_zero():
            try:
                answer[0] = function(*args)
            except ValueError as error:
                answer[1] = str(error)
        broadcast_object_list(answer)
        if answer[1] is not None:
            raise ValueError(answer[1])
        return answer[0]

    def set_up(self: UnlearningTrainer) -> None:
        """Calibrates before step 0, or restores; called once the engine has wrapped the model."""
        if self.reference is not None:
            self.reference.prepare(self.accelerator)
        self._check_head(self.model_wrapped)
        self._window, self._window_steps = {}, 0
        if self._resume_from is not None:
            state, logps = load_method_state(self._resume_from, self.method)
            self.load_method_state(state)
            self.reference_logps = logps
        else:
            if self.objective.needs_reference_logps:
                self.reference_logps = self._cache_reference(self.model_wrapped)
            self.calibrate(self.model_wrapped)
            if self.args.weight_noise > 0:  # a resumed run has been through it
                add_weight_noise(self.model, self.args.weight_noise, seed=self.args.seed)
        self._is_set_up = True

    def _check_head(self: UnlearningTrainer, model: Any) -> None:
        """The fused head against the model's own logits, on the first row."""
        rows = next(rank_batches(self.data.forget_eval.select(range(1)), 1, self.accelerator, self._collate, None))
        with self.compute_loss_context_manager():
            self.forward.check(model, rows, self.accelerator)
        if self.reference is not None and self.forward.head is None:
            self.reference.forward.head = None  # both sides round alike

    def _cache_reference(self: UnlearningTrainer, model: Any) -> dict[str, Tensor]:
        rows = self.data.forget
        if not isinstance(rows, Dataset):
            raise ValueError(
                f'forget_loss="{self.objective.name}" caches one reference log-probability for each row, and a stream '
                "has no row numbers. Pass the forget_dataset as a map-style Dataset, or choose another loss."
            )
        kinds = ["answer", *(["alternative"] if self.objective.needs_alternative else [])]
        return {
            kind: row_log_probs(
                model,
                self.forward,
                rows,
                batch_size=self.args.eval_batch_size,
                accelerator=self.accelerator,
                collate=self._collate,
                autocast=self.compute_loss_context_manager,
                alternative=kind == "alternative",
                description=self._bar("reference log-probs"),
            )
            for kind in kinds
        }

    def _positive_forget_loss(self: UnlearningTrainer, model: Any) -> float:
        """The forget loss on the forget set, as the scale to divide by."""
        target, self.target = self.target, None
        try:
            value = abs(self.measure_forget(model)["loss"])
        finally:
            self.target = target
        if value == 0 or value != value:
            raise ValueError(
                f"normalize_forget_loss divides by the forget loss before step 0, which is {value}. "
                "Set normalize_forget_loss=False, or check the forget rows."
            )
        return value

    # ---- measuring -------------------------------------------------------------------------------------------------

    def measure_forget(self: UnlearningTrainer, model: Any, rows: Dataset | None = None) -> dict[str, float]:
        """
        Means over forget rows: `loss` (as trained on, not normalised), `nll` (mean of the rows' mean NLL) and, with a
        forget target, `distance` (mean [`level_distance`] of the rows), in nats per token.
        """
        labels = "alternative" if self.objective.name == "idk_nll" else "forget"

        def function(batch: dict[str, Any]) -> dict[str, Tensor]:
            nested = {"forget": batch, "retain": {}}
            term, _ = self._loss_terms(model, nested)
            counts = count_units(nested, forget_labels=labels)
            units = counts[FORGET_SEQUENCES if self.objective.counts_sequences else FORGET]
            nll = term.metrics["nll_rows"]
            has_response = (batch["labels"][:, 1:] != IGNORE_INDEX).any(dim=-1)
            sums = {"loss": term.total, "units": units, "nll": nll.sum(), "rows": counts[FORGET_SEQUENCES]}
            if self.target is not None:
                sums["distance"] = torch.where(has_response, level_distance(nll, self.target.level), 0.0).sum()
            return sums

        sums = self._sums(model, self.data.forget_eval if rows is None else rows, function, "forget")
        rows_measured = max(sums["rows"], 1.0)
        means: dict[str, float] = {key: sums[key] / rows_measured for key in ("nll", "distance") if key in sums}
        return {"loss": sums["loss"] / max(sums["units"], 1.0), **means}

    def measure_retain(self: UnlearningTrainer, model: Any, rows: Dataset, name: str) -> float:
        """The retain loss over a dataset: global token mean."""

        def function(batch: dict[str, Any]) -> dict[str, Tensor]:
            loss = self._retain_terms(model, {name: batch})[name]
            return {"loss": loss.total, "tokens": response_tokens(batch["labels"])}

        sums = self._sums(model, rows, function, name)
        return sums["loss"] / max(sums["tokens"], 1.0)

    def measure_nll(self: UnlearningTrainer, model: Any, rows: Dataset, name: str) -> dict[str, float]:
        """Mean NLL of a dataset in nats: `token` (over tokens) and `example` (over the rows' means)."""

        def function(batch: dict[str, Any]) -> dict[str, Tensor]:
            (scores,) = self.forward(model, [batch])
            nll = -scores.log_probs()
            return {
                "total": nll.sum(),
                "tokens": scores.lengths.sum(),
                "rows_total": (scores.row_sums(nll) / scores.lengths.clamp(min=1)).sum(),
                "rows": (scores.lengths > 0).sum(),
            }

        sums = self._sums(model, rows, function, name)
        return {
            "token": sums["total"] / max(sums["tokens"], 1.0),
            "example": sums["rows_total"] / max(sums["rows"], 1.0),
        }

    def _sums(
        self: UnlearningTrainer, model: Any, rows: Dataset, function: Callable[[dict[str, Any]], Any], name: str
    ) -> dict[str, float]:
        return measure_sums(
            model,
            rows,
            function,
            batch_size=self.args.eval_batch_size,
            accelerator=self.accelerator,
            collate=self._collate,
            autocast=self.compute_loss_context_manager,
            description=self._bar(f"measuring {name}"),
        )

    def _bar(self, text: str) -> str | None:
        return None if self.args.disable_tqdm else text

    def _model_for_evaluation(self) -> Any:
        if self.is_in_train:
            return self.model_wrapped
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            # FSDP2 shards in place: the wrapped model is then the model itself
            if self.model_wrapped is self.model and not fsdp2_units(self.model):
                raise ValueError("evaluate() on a sharded engine needs train() first, which shards the model.")
            return self.model_wrapped
        if self.args.place_model_on_device:
            self._move_model_to_device(self.model, self.args.device)
        return self.model

    def evaluate(
        self: UnlearningTrainer, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """
        Losses on the forget rows and on the held-out part of every retain set, the same on every rank.

        Returns:
            `dict[str, float]`: `eval_loss/forget`, `eval_forget_nll`, `eval_loss/retain/<name>`, `eval_loss` (their
            weighted sum), `eval_loss/<name>` for the datasets of `eval_dataset`, and what a method adds.
        """
        from ..data import prepare_dataset
        from .datasets import first_rows, named_datasets

        model = self._model_for_evaluation()
        if not self._is_set_up:  # evaluate() before train(): the model as it came is its own reference
            self._check_head(model)
            if self.reference is not None:
                self.reference.prepare(self.accelerator)
            if self.objective.needs_reference_logps and not self.reference_logps:
                self.reference_logps = self._cache_reference(model)
        forget = self.measure_forget(model)
        retain = {name: self.measure_retain(model, rows, name) for name, rows in self.data.retain_eval.items()}
        self._check_measured({FORGET: forget["loss"], **{retain_key(name): loss for name, loss in retain.items()}})
        weights = {name: float(weight) for name, weight in self.retain_weights().items()}
        metrics = {
            "loss": self.args.forget_weight * forget["loss"] / self.normalizer
            + sum(weights[name] * loss for name, loss in retain.items()),
            "loss/forget": forget["loss"] / self.normalizer,
            FORGET_NLL: forget["nll"],
            **{f"loss/{retain_key(name)}": loss for name, loss in retain.items()},
            **self.evaluation_metrics(forget, retain),
        }
        further = dict(self.data.evaluation)
        if eval_dataset is not None and eval_dataset is not self.eval_dataset:
            further = {
                name: first_rows(
                    prepare_dataset(
                        rows,
                        self.processing_class,
                        name=f"eval_dataset[{name!r}]",
                        max_length=self.args.max_length,
                        completion_only_loss=self.args.completion_only_loss,
                    ),
                    10**9,
                    self.args.seed,
                )
                for name, rows in named_datasets("eval_dataset", eval_dataset, "eval").items()
            }
        for name, rows in further.items():
            metrics[f"loss/{name}" if name else "loss/eval"] = self.measure_nll(model, rows, name or "eval")["token"]
        if self._extra_metrics is not None:
            metrics.update(self._extra_metrics(dict(metrics)))
        metrics = {f"{metric_key_prefix}_{key}": value for key, value in metrics.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _check_measured(self: UnlearningTrainer, losses: Mapping[str, float]) -> None:
        """Stops training before a checkpoint of broken weights is written (or chosen)."""
        bad = [f"{name} = {value}" for name, value in losses.items() if not math.isfinite(value)]
        if bad and self.is_in_train:
            raise FloatingPointError(
                f"Evaluation after step {self.state.global_step}: {', '.join(bad)} is not finite, so the last steps "
                "broke the weights. No checkpoint was written. Resume from an earlier one with a lower learning rate."
            )

    def evaluation_metrics(self, forget: Mapping[str, float], retain: Mapping[str, float]) -> dict[str, float]:
        """More metrics of a method for `evaluate()`, from measured global means."""
        return {}

    # ---- logs and model card --------------------------------------------------------------------------------------

    def log(self: UnlearningTrainer, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means of the terms since the last log to what the Trainer reports."""
        if self._window_steps and "learning_rate" in logs:
            stacked = torch.stack([value.double() for value in self._window.values()]) / self._window_steps
            means = dict(zip(self._window, stacked.tolist(), strict=True))
            logs = {**logs, **self._log_names(means), "num_tokens": self.tokens_seen}
            self._window, self._window_steps = {}, 0
        super().log(logs, start_time)

    def _log_names(self: UnlearningTrainer, means: dict[str, float]) -> dict[str, float]:
        named = {}
        for key, value in means.items():
            if key == FORGET:
                named["loss/forget"] = value / self.normalizer
            elif key == ASCENDED:
                named["sharpness"] = (value - means[FORGET]) / self.normalizer
            elif key.startswith("retain/"):
                named[f"loss/{key}"] = value
            else:
                named[key] = value
        return named

    def _nonfinite_message(self: UnlearningTrainer, means: Mapping[str, Tensor]) -> str:
        values = {key: float(value) for key, value in means.items()}
        bad = [key for key, value in values.items() if not torch.isfinite(torch.tensor(value))]
        terms = ", ".join(f"{key} = {value:.4g}" for key, value in values.items())
        weights = (
            "DeepSpeed steps within backward, so the weights in memory are broken; no checkpoint was written."
            if self.is_deepspeed_enabled and self.combined_step is None
            else "Training has stopped before the optimizer step, so the weights are those of the step before."
        )
        return (
            f"Step {self.state.global_step + 1}: the loss term {', '.join(bad)} is not finite ({terms}). {weights} "
            "Lower the learning rate, set max_grad_norm, or use bf16 instead of fp16."
        )

    def create_model_card(
        self: UnlearningTrainer,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Writes `README.md` to the output folder: method, losses, limits, multipliers, feasibility, citation."""
        if self.is_world_process_zero():
            extra = [tags] if isinstance(tags, str) else list(tags or [])
            write_model_card(self, model_name=model_name, dataset_name=dataset_name, tags=[*self._tag_names, *extra])
