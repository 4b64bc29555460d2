"""Stages that all processes of a run go through together: every one of them ends a stage alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from accelerate.utils import broadcast_object_list, gather_object, reduce
from torch import nn
from transformers import TrainingArguments

Result = TypeVar("Result")


class EditError(RuntimeError):
    """A constrained edit failed, and the model is as it was before; the message names the stage and the process."""


class Processes:
    """
    What planning asks of an `Accelerator`, from the arguments of a Trainer.

    Args:
        args (`TrainingArguments`):
            The arguments of the run.
    """

    def __init__(self, args: TrainingArguments) -> None:
        self.num_processes = args.world_size
        self.process_index = args.process_index
        self.is_main_process = args.process_index == 0
        self.device = args.device
        self.reduce = reduce


@dataclass(frozen=True)
class _Outcome:
    """How a stage ended on one process."""

    error: str | None


class Agreement:
    """
    Makes stages of an edit succeed on all processes, or fail on all of them.

    Args:
        args (`TrainingArguments`):
            The arguments of the run.
        step (`int`):
            Optimizer steps so far, for messages.
        model (`nn.Module`, *optional*):
            The model, to know whether its forward pass gathers weights.
    """

    def __init__(self, args: TrainingArguments, step: int, model: nn.Module | None = None) -> None:
        self._world = args.world_size
        self._step = step
        parameters = () if model is None else model.parameters()
        self._gathers = any(hasattr(parameter, marker) for parameter in parameters for marker in _SHARDED)

    def stage(self, what: str, function: Callable[[], Result], *, runs_model: bool = False) -> Result:
        """
        The result of a stage.

        Args:
            what (`str`):
                Its name for messages, as in "failed while planning".
            function (`Callable`):
                The stage on this process.
            runs_model (`bool`, *optional*, defaults to `False`):
                Whether it has forward passes. Where those gather weights, processes that wait for the weights cannot
                be told of a failure: the one that failed ends, like in training, and the launcher ends the others.

        Raises:
            EditError: it failed on this process or, the same on all of them, on another one.
        """
        results: list[Result] = []
        failure: Exception | None = None
        try:
            results.append(function())
        except Exception as error:
            failure = error
        mine = _Outcome(None if failure is None else f"{type(failure).__name__}: {failure}")
        found: list[Any] = [mine]
        if self._world > 1 and not (runs_model and self._gathers and failure is not None):
            found = gather_object([mine])
            while not all(isinstance(one, _Outcome) for one in found):  # others were gathering activations, and fail
                found = gather_object([mine])
        failed = [(process, one.error) for process, one in enumerate(found) if one.error is not None]
        if failed:
            texts = [f" on process {process} of {self._world}: {text}" for process, text in failed]
            if len(found) == 1 or (len(failed) == len(found) and len({text for _, text in failed}) == 1):
                texts = [f": {failed[0][1]}"]  # the same everywhere
            raise EditError(
                f"The constrained edit after step {self._step} failed while {what}{';'.join(texts)} The model is "
                "as it was before the edit."
            ) from failure
        return results[0]

    def from_main(self, value: Result) -> Result:
        """The main process's value, on every process."""
        if self._world == 1:
            return value
        values = [value]
        broadcast_object_list(values)
        return values[0]


_SHARDED = ("ds_id", "device_mesh")  # ZeRO-3; DTensors of FSDP2
