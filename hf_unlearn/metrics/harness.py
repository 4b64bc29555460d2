"""Multiple choice through lm-evaluation-harness, where it is installed: its tasks, prompts and data."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hf_unlearn.metrics.multiple_choice import Accuracy

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def evaluate_with_harness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str | Mapping[str, Any]],
    *,
    num_fewshot: int | None = 0,
    batch_size: int = 8,
    limit: int | None = None,
    chat_template: bool = False,
) -> dict[str, Accuracy]:
    """
    Accuracies of lm-evaluation-harness on its own tasks (`"wmdp"`, `"mmlu"`), if it is installed.

    The harness reads its data from the hub or the local cache. Other libraries' defaults apply beyond the arguments
    below; the tokenizer is copied, since the harness sets its padding.

    Args:
        model, tokenizer:
            As in [`evaluate_multiple_choice`].
        tasks (`Sequence[str | Mapping]`):
            Names of tasks or groups, or task configurations as the harness takes them.
        num_fewshot (`int`, *optional*, defaults to `0`):
            Solved examples in front of each question; `None` leaves it to the task.
        batch_size (`int`, *optional*, defaults to `8`):
            Requests (a prompt with one letter) in a forward pass.
        limit (`int`, *optional*):
            The first so many rows of each task only.
        chat_template (`bool`, *optional*, defaults to `False`):
            Ask through the tokenizer's chat template.

    Returns:
        `dict[str, Accuracy]`: for every task, subtask and group that has an accuracy, groups averaged as the
        harness does; empty on all processes but the first.

    Raises:
        ImportError: lm-evaluation-harness is not installed, with the command that installs it.
        ValueError: no tasks, or none of them reports an accuracy.
    """
    if isinstance(tasks, str) or not len(tasks):
        raise ValueError(f"tasks is {tasks!r}; expected a list of at least one task, such as ['wmdp_bio'].")
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ImportError(
            f'lm-evaluation-harness cannot be imported ({error}). Install it with `pip install "lm_eval[hf]"`, or '
            "score a local file with `evaluate_multiple_choice`."
        ) from error
    from hf_unlearn.metrics.likelihood import evaluation_mode

    with evaluation_mode(model):
        wrapped = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
        report = simple_evaluate(
            model=wrapped,
            tasks=list(tasks),
            num_fewshot=num_fewshot,
            limit=limit,
            apply_chat_template=chat_template,
            log_samples=False,
        )
    if report is None:
        return {}
    found = {name: values for name, values in report["results"].items() if "acc,none" in values}
    if not found:
        raise ValueError(
            f"None of the tasks reports an accuracy (`acc`); they report {sorted(report['results'])}. Choose multiple "
            "choice tasks, or call lm_eval yourself for other metrics."
        )
    scores = {}
    for name, values in found.items():
        spread = values.get("acc_stderr,none")  # "N/A" where the harness computed none
        known = float(spread) if isinstance(spread, (int, float)) and math.isfinite(spread) else None
        scores[name] = Accuracy(value=float(values["acc,none"]), n=_harness_rows(report, name), standard_error=known)
    return scores


def _harness_rows(report: Mapping[str, Any], name: str) -> int:
    """Rows of a task; of a group, those of its tasks."""
    counted = report["n-samples"].get(name)
    if counted is not None:
        return int(counted["effective"])
    return sum(_harness_rows(report, child) for child in report.get("group_subtasks", {}).get(name, ()))
