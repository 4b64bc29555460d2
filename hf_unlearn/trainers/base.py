"""UnlearningTrainer: forget one dataset and keep others, as a weighted sum of losses (GradDiff, NPO, SimNPO, ...)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from datasets import IterableDataset
from torch import Tensor
from transformers import TrainerCallback

from ..data import EpochSampler, PairedDataset, PairedIterableDataset, Pairing, UnlearningCollator
from ..losses import LossOutput
from .accounting import (
    FORGET,
    FORGET_NLL,
    TOKENS,
    StepLedger,
    all_reduce_sums,
    count_units,
    retain_key,
    sum_counts,
)
from .checkpoints import RunRecord, describe_model, engine_name
from .combined_step import CombinedStep
from .config import Cycle, UnlearningConfig, as_kwargs
from .datasets import order_seed, prepare
from .engines import check_parallelism, check_reference
from .forward import ModelForward
from .hooks import SetupCallback
from .lifecycle import Lifecycle
from .loss_terms import HiddenLosses, LossTerms
from .model_setup import add_adapter, check_causal_lm, check_lengths, check_row_lengths, load_model, load_tokenizer
from .noise import check_noise
from .objective import HIDDEN_RETAIN, ForgetObjective, ForgetTarget
from .preemption import STOP, Preemption
from .reference import ReferenceModel


class UnlearningTrainer(LossTerms, Lifecycle):
    """
    Makes a causal language model forget `forget_dataset` while it keeps `retain_dataset`.

    Minimises `forget_weight * L_f + sum_k retain_weight_k * L_r^k`. By its losses it is gradient ascent
    (`"grad_ascent"`, no retain set), GradDiff (the same with one), NPO, SimNPO, IdkDPO, UNDIAL, WGA, SatImp, ...; see
    [`UnlearningConfig`].

    Args:
        model (`str` or `PreTrainedModel` or `PeftModel`):
            A model id, a path or an instance.
        args ([`UnlearningConfig`], *optional*):
            Configuration.
        data_collator (`Callable`, *optional*):
            Makes `{"forget": {...}, "retain": {name: {...}}}` of a list of items; default [`UnlearningCollator`].
        forget_dataset (`Dataset` or `IterableDataset`):
            Rows to forget, in any of TRL's formats or with `question` and `answer`.
        retain_dataset (`Dataset`, `IterableDataset` or `dict`, *optional*):
            Rows to keep: one dataset, or several by name, each with its own loss in the logs.
        holdout_dataset (`Dataset`, *optional*):
            Rows of the kind to forget that the model has never seen; calibrates a forget target.
        eval_dataset (`Dataset` or `dict`, *optional*):
            Further rows whose NLL `evaluate()` reports.
        processing_class (`PreTrainedTokenizerBase`, *optional*):
            Tokenizer; default: the one the model was saved with.
        compute_metrics, callbacks, optimizers, preprocess_logits_for_metrics:
            As in [`~transformers.Trainer`]; `compute_metrics` is called with the metrics of `evaluate()` and returns
            more of them.
        peft_config (`PeftConfig`, *optional*):
            Trains an adapter instead of the whole model.
        quantization_config (`BitsAndBytesConfig`, *optional*):
            Quantises a model given by name (QLoRA together with `peft_config`).

    Raises:
        ValueError, TypeError: bad input, before any compute is spent.
    """

    method = "unlearning"
    config_class: type[UnlearningConfig] = UnlearningConfig
    _tag_names: tuple[str, ...] = ("hf_unlearn", "unlearning")

    def __init__(
        self,
        model: Any,
        args: UnlearningConfig | None = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        forget_dataset: Any = None,
        retain_dataset: Any = None,
        holdout_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Callable[[dict[str, float]], dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: Any = None,
        quantization_config: Any = None,
    ) -> None:
        if args is None:
            args = self.config_class(output_dir="unlearning-output")
        if not isinstance(args, self.config_class):
            raise TypeError(f"args must be a {self.config_class.__name__}, got {type(args).__name__}.")
        self.objective = ForgetObjective(name=args.forget_loss, kwargs=as_kwargs(args.forget_loss_kwargs))
        model = load_model(model, args, quantization_config)
        check_causal_lm(model)
        check_parallelism(args, model)
        tokenizer = load_tokenizer(processing_class, model, args)
        check_lengths(model, args)
        self.data = prepare(
            forget=forget_dataset,
            retain=retain_dataset,
            holdout=holdout_dataset,
            evaluation=eval_dataset,
            tokenizer=tokenizer,
            args=args,
            with_refusals=self.objective.needs_alternative,
        )
        if args.max_length is None:
            check_row_lengths(model, {"forget": self.data.forget, **self.data.retain, **self.data.retain_eval})
        self._check_arguments(args)
        self._fresh_adapter = peft_config is not None
        model = add_adapter(model, peft_config, args)
        check_noise(args, model)
        self.reference: ReferenceModel | None = None
        needs_reference = args.retain_loss in ("kl", *HIDDEN_RETAIN) and self.data.retain
        if self.objective.needs_reference_model or needs_reference:
            check_reference(args, model, fresh_adapter=self._fresh_adapter)
            self.reference = ReferenceModel(model, args.reference_policy, fresh_adapter=self._fresh_adapter)
        self.hidden = HiddenLosses.of(self.objective, args.retain_loss, model)
        self.forward = ModelForward(model, fused=args.fused_head, chunk_size=args.head_chunk_size)
        if self.reference is not None:
            self.reference.use(self.forward, fused=args.fused_head, chunk_size=args.head_chunk_size)
        collator = UnlearningCollator(pad_token_id=tokenizer.pad_token_id, pad_to_multiple_of=args.pad_to_multiple_of)
        # The filter hides a NaN behind the running mean; here it stops the run, naming step and term.
        args.logging_nan_inf_filter = False
        self.preemption = Preemption(args.save_on_sigterm)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator or collator,
            train_dataset=self._paired(args),
            eval_dataset=self.data.forget_eval,
            processing_class=tokenizer,
            compute_metrics=None,
            callbacks=[SetupCallback(self), *(callbacks or []), self.preemption],
            optimizers=optimizers,
        )
        self._collate = collator
        self._extra_metrics = compute_metrics
        # Losses are divided by the step's global token counts, so nothing is left for the Trainer to scale.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self.ledger = StepLedger()
        self.combined_step = CombinedStep(self) if args.combines_gradients else None
        self._window: dict[str, Tensor] = {}
        self._window_steps = 0
        self.normalizer = 1.0
        self.target: ForgetTarget | None = None
        self.tokens_seen = 0.0
        self.reference_logps: dict[str, Tensor] = {}
        self._resume_from: str | None = None
        self._is_set_up = False
        self._model_record = describe_model(self.model)
        if hasattr(self.model, "add_model_tags"):
            self.model.add_model_tags(list(self._tag_names))

    # ---- what a method overrides -------------------------------------------------------------------------------

    def _check_arguments(self, args: UnlearningConfig) -> None:
        """Refuses settings that do not fit the datasets."""
        weight = args.retain_weight
        if isinstance(weight, dict) and set(weight) != set(self.data.retain):
            raise ValueError(
                f"retain_weight names {sorted(weight)}, but the retain sets are {sorted(self.data.retain)}."
            )
        if args.gradient_projection != "none" and not self.data.retain:
            raise ValueError(
                f"gradient_projection={args.gradient_projection!r} decouples the forget from the retain gradient, "
                'and there is no retain_dataset. Pass one, or set gradient_projection="none".'
            )
        if args.retain_loss == "kl" and not self.data.retain:
            raise ValueError('retain_loss="kl" needs a retain_dataset.')

    def retain_weights(self) -> dict[str, Tensor | float]:
        """Weight of every retain loss in the current step."""
        weight = self.args.retain_weight
        return {name: weight[name] if isinstance(weight, dict) else weight for name in self.data.retain}

    def calibrate(self, model: Any) -> None:
        """Measures what must be known before step 0; skipped when a run is resumed."""
        if self.args.normalize_forget_loss:
            self.normalizer = self._positive_forget_loss(model)

    def after_step(self, means: dict[str, Tensor]) -> dict[str, Tensor]:
        """Hook after the last backward pass of a step, with its global means; returns more values to log."""
        return {}

    def method_state(self) -> dict[str, Any]:
        """JSON-able state of the method, saved beside each checkpoint."""
        return {"normalizer": self.normalizer, "tokens_seen": self.tokens_seen}

    def load_method_state(self, state: Mapping[str, Any]) -> None:
        """Restores [`method_state`]."""
        self.normalizer = float(state["normalizer"])
        self.tokens_seen = float(state["tokens_seen"])

    def run_record(self) -> RunRecord:
        """What a run that resumes a checkpoint of this one must have in common with it."""
        args, sets = self.args, {"forget": self.data.forget, **{retain_key(k): v for k, v in self.data.retain.items()}}
        rows = {name: len(rows) for name, rows in sets.items() if not isinstance(rows, IterableDataset)}
        return RunRecord(
            engine=engine_name(self),
            processes=args.world_size,
            rows_per_step=args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            data={**rows, "seed": order_seed(args)},
            model=self._model_record,
        )

    # ---- data ----------------------------------------------------------------------------------------------------

    def _paired(self, args: UnlearningConfig) -> PairedDataset | PairedIterableDataset:
        forget, retain = self.data.forget, self.data.retain
        if any(isinstance(rows, IterableDataset) for rows in (forget, *retain.values())):
            if args.max_steps <= 0:
                raise ValueError("A stream has no length: set max_steps to the number of optimizer steps.")
            # Every process reads the stream and keeps its share; dispatching from rank 0 cannot split nested batches.
            args.accelerator_config.dispatch_batches = False
            block = args.per_device_train_batch_size * args.world_size
            return PairedIterableDataset(forget, retain, seed=order_seed(args), block_size=block)
        sizes = {"forget": len(forget), **{name: len(rows) for name, rows in retain.items()}}
        return PairedDataset(
            forget, retain, Pairing(sizes=sizes, cycle=cast(Cycle, args.cycle), seed=order_seed(args))
        )

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = train_dataset if train_dataset is not None else self.train_dataset
        seed = order_seed(self.args)
        if self.args.train_sampling_strategy == "sequential":
            return EpochSampler(dataset, seed, shuffle=False)
        if self.args.train_sampling_strategy == "group_by_length":
            step = self.args.train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps
            return EpochSampler(dataset, seed, group=50 * step)
        return EpochSampler(dataset, seed)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["forget", "retain", "input_ids", "attention_mask", "labels", "index"]

    def num_tokens(self, train_dl: Any, max_steps: int | None = None) -> int:
        """Unknown before training: batches are nested, so the Trainer's estimate does not apply."""
        return 0

    # ---- the step ------------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """Fetches the micro-batches of a step and counts their units over all ranks before the first forward pass."""
        if self.state.global_step >= self.state.max_steps:  # resumed from the checkpoint of the last step
            return [], None
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        labels = "alternative" if self.objective.name == "idk_nll" else "forget"
        counts = sum_counts(count_units(batch, forget_labels=labels) for batch in batches)
        counts = all_reduce_sums(counts, self.accelerator)
        self.ledger.begin(counts)
        return batches, counts[FORGET]

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The objective on one micro-batch, scaled so that micro-batches and ranks add up to the global means."""
        forget, retains = self._loss_terms(model, inputs)
        loss = self.forget_objective(forget) * self.args.forget_weight
        weights = self.retain_weights()
        for name, term in retains.items():
            weight = weights[name]
            weight = weight.to(term.total) if isinstance(weight, Tensor) else weight
            loss = loss + self.retain_objective(name, term) * weight
        self.ledger.add(
            {**self.forget_sums(forget), **{retain_key(name): term.total for name, term in retains.items()}}
        )
        return (loss, None) if return_outputs else loss

    def forget_objective(self, term: LossOutput) -> Tensor:
        """A micro-batch's part of the normalised forget loss of the step."""
        return self._share(FORGET, term.total) / self.normalizer

    def retain_objective(self, name: str, term: LossOutput) -> Tensor:
        """A micro-batch's part of the step's loss on a retain set."""
        return self._share(retain_key(name), term.total)

    def _share(self, key: str, total: Tensor) -> Tensor:
        assert self.ledger.counts, "get_batch_samples runs before the first micro-batch of a step"
        count = self.ledger.counts[self._unit(key)].clamp(min=1.0).to(total.device, total.dtype)
        return total * (self.accelerator.num_processes / count)  # engines average over ranks; the counts are global

    def forget_sums(self, term: LossOutput) -> dict[str, Tensor]:
        """What a forget term adds to the step's ledger."""
        return {FORGET: term.total, FORGET_NLL: term.metrics["nll_total"]}

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """One micro-batch; the last one of a step also closes the ledger: means, checks, multipliers."""
        if self.combined_step is not None:
            return self.combined_step(model, inputs)
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self._close_step()
        return loss

    def _close_step(self) -> dict[str, Tensor]:
        self.ledger.add({STOP: self.preemption.flag(self.accelerator.device)})
        sums = self.ledger.close(self.accelerator)
        stop = sums.pop(STOP) > 0
        means = {key: total / self.ledger.counts[self._unit(key)].clamp(min=1.0) for key, total in sums.items()}
        finite = torch.stack([value.isfinite() for value in means.values()]).all()
        # the one wait for the device in a step; it replaces the Trainer's NaN filter
        agreed, is_finite, tokens = torch.stack([stop, finite, self.ledger.counts[TOKENS]]).tolist()
        self.preemption.agreed = bool(agreed)
        if not is_finite:
            raise FloatingPointError(self._nonfinite_message(means))
        self.tokens_seen += tokens
        self.observe({**means, **self.after_step(means)})
        self._window_steps += 1
        return means

    def observe(self, values: Mapping[str, Tensor]) -> None:
        """Adds one step's values to what the next log averages."""
        for key, value in values.items():
            self._window[key] = self._window[key] + value if key in self._window else value
