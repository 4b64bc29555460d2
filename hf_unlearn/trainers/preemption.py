"""SIGTERM: every process finishes its step, one checkpoint is saved, and the run ends with exit code 0."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Key under which "this process was asked to stop" travels with the sums of a step: no collective of its own.
STOP = "stop"


class Preempted(SystemExit):
    """Raised by `train()` once the checkpoint of a run that SIGTERM stopped is complete; exit code 0."""

    def __init__(self, step: int) -> None:
        super().__init__(0)
        self.step = step


class Preemption(TrainerCallback):
    """
    Turns SIGTERM into a checkpoint at the end of the step, on every process at the same one.

    transformers' own `enable_jit_checkpoint` does not fit: it may save between the multipliers' step and the
    optimizer's, and each process acts on its own timer, so that the collectives of a sharded save do not meet.

    Args:
        enabled (`bool`):
            Whether to listen at all.
    """

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled
        self._requested = False  # this process got the signal
        self.agreed = False  # some process got it, and all of them know

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handles SIGTERM within the block. One that came too late for a checkpoint is delivered at its end."""
        self._requested = self.agreed = False
        # only the main thread may set handlers (a notebook or a server may train in another)
        if not self._enabled or threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._receive)
        finished = False
        try:
            yield
            finished = True
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
            if finished and self._requested:  # after an error the error is what must be seen
                os.kill(os.getpid(), signal.SIGTERM)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._requested = True  # launchers repeat the signal; nothing else is safe to do in here

    def flag(self, device: torch.device) -> Tensor:
        """1 on a process that got the signal, else 0; to be summed over all of them."""
        return torch.full((), float(self._requested), device=device)

    # ---- the callback -------------------------------------------------------------------------------------------

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Stops; saves now, or after the evaluation that the end of an epoch or of training brings."""
        if self.agreed:
            control.should_training_stop = True
            control.should_save = not _ends_epoch(state)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Saves here what was not saved at the end of the step; an interrupted epoch is not evaluated."""
        if self.agreed:
            control.should_save = True
            control.should_evaluate = control.should_evaluate and _ends_epoch(state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Ends the run; the checkpoint is complete."""
        if self.agreed:
            how = (
                "It holds weights only (save_only_model=True), so the run cannot be continued."
                if args.save_only_model
                else "Continue it with train(resume_from_checkpoint=True), or --resume_from_checkpoint True."
            )
            logger.warning(
                f"SIGTERM: the checkpoint of step {state.global_step} in {args.output_dir} is complete, and the run "
                f"ends. {how}"
            )
            raise Preempted(state.global_step)


def _ends_epoch(state: TrainerState) -> bool:
    return state.global_step >= state.max_steps or float(state.epoch or 0.0).is_integer()
