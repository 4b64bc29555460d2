"""The callback through which a trainer learns that the engine has wrapped the model and training is about to start."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    from .base import UnlearningTrainer


class SetupCallback(TrainerCallback):
    """Runs the trainer's calibration once everything is prepared and before step 0."""

    def __init__(self, trainer: UnlearningTrainer) -> None:
        self._trainer = trainer
        self._is_done = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Calibrates a new run, restores a resumed one."""
        self._trainer.set_up()

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A run that is resumed from the checkpoint of its last step has nothing left to train."""
        self._is_done = state.global_step >= state.max_steps
        if self._is_done:
            control.should_training_stop = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Its last step was evaluated and saved by the process that trained it."""
        if self._is_done:
            control.should_evaluate = control.should_save = False
