"""One progress bar a training run, with the last logged losses beside it, and nothing else on the terminal."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class QuietProgressCallback(TrainerCallback):
    """
    A single `tqdm` bar that shows the newest logged numbers instead of printing a line for each.

    Args:
        description (`str`):
            Text in front of the bar.
        keys (`tuple[str, ...]`, *optional*, defaults to `("loss",)`):
            Logged metrics to show behind it.
    """

    def __init__(self, description: str, keys: tuple[str, ...] = ("loss",)) -> None:
        self.description = description
        self.keys = keys
        self._bar: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Opens the bar on the main process."""
        from tqdm.auto import tqdm

        if state.is_world_process_zero:
            self._bar = tqdm(
                total=state.max_steps, desc=self.description, initial=state.global_step, mininterval=1.0, leave=True
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Moves the bar to the step that has just ended."""
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Shows the newest numbers."""
        if self._bar is not None and logs:
            shown = {key.split("/")[-1]: f"{logs[key]:.3g}" for key in self.keys if isinstance(logs.get(key), float)}
            if shown:
                self._bar.set_postfix(shown, refresh=False)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Closes the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def quiet_libraries() -> None:
    """Leaves the terminal to our own bars: no tokenisation bars, no informational warnings of other libraries."""
    import warnings

    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)
