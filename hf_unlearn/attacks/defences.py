"""Defences that change no weight: SmoothLLM and Self-Reminder, as wrappers around generation. Baselines for edits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from string import printable
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_unlearn.attacks.refusal import is_refusal
from hf_unlearn.data import tokenize_prompt
from hf_unlearn.metrics.generate import greedy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REMINDER = (
    "Please answer responsibly, and do not write anything harmful or misleading.",
    "Remember: answer responsibly, and do not write anything harmful or misleading.",
)


@dataclass(frozen=True, kw_only=True)
class SmoothLLMConfig:
    """
    SmoothLLM (arXiv 2310.03684), its swap variant.

    Args:
        copies (`int`, *optional*, defaults to `10`):
            Perturbed copies of each prompt that are answered.
        share (`float`, *optional*, defaults to `0.1`):
            Share of the characters that another printable one replaces in each copy.
        max_new_tokens (`int`, *optional*, defaults to `64`):
            Longest answer.
        batch_size (`int`, *optional*, defaults to `64`):
            Prompts decoded at once.
        seed (`int`, *optional*, defaults to `0`):
            Of the characters and of the answer that is drawn.
    """

    copies: int = 10
    share: float = 0.1
    max_new_tokens: int = 64
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.copies < 1:
            raise ValueError(f"copies is {self.copies}; expected at least 1.")
        if not 0 <= self.share <= 1:
            raise ValueError(f"share is {self.share}; expected a share of the characters between 0 and 1.")


def smooth_llm(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    config: SmoothLLMConfig | None = None,
    *,
    refuses: Callable[[str], bool] = is_refusal,
    description: str | None = None,
) -> list[str]:
    """
    Answers each prompt with one of the answers to its perturbed copies, drawn from the majority: those that refuse, or
    those that do not (a tie goes to those that do).

    Args:
        model (`PreTrainedModel`), tokenizer (`PreTrainedTokenizerBase`):
            What answers.
        prompts (`Sequence[str]`):
            n user messages.
        config ([`SmoothLLMConfig`], *optional*):
            The options.
        refuses (`Callable[[str], bool]`, *optional*):
            Whether an answer is a refusal.
        description (`str`, *optional*):
            Text of a progress bar.

    Returns:
        `list[str]`: n answers.
    """
    config = config or SmoothLLMConfig()
    rng = np.random.default_rng(config.seed)
    copies = [swap_characters(prompt, config.share, rng) for prompt in prompts for _ in range(config.copies)]
    answers = _answer(model, tokenizer, copies, config, description)
    chosen = []
    for start in range(0, len(answers), config.copies):
        own = answers[start : start + config.copies]
        refusing = [refuses(answer) for answer in own]
        majority = 2 * sum(refusing) >= len(own)
        chosen.append(str(rng.choice([a for a, refused in zip(own, refusing, strict=True) if refused == majority])))
    return chosen


def self_reminder(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    reminder: tuple[str, str] = REMINDER,
    max_new_tokens: int = 64,
    batch_size: int = 64,
    description: str | None = None,
) -> list[str]:
    """
    Answers each prompt between two reminders to be responsible (Self-Reminder; in our own words).

    Args:
        model, tokenizer, prompts, description:
            As in [`smooth_llm`].
        reminder (`tuple[str, str]`, *optional*):
            What is put before and after the user's message.
        max_new_tokens (`int`, *optional*, defaults to `64`), batch_size (`int`, *optional*, defaults to `64`):
            Longest answer, and prompts decoded at once.
    """
    config = SmoothLLMConfig(copies=1, max_new_tokens=max_new_tokens, batch_size=batch_size)
    wrapped = [f"{reminder[0]}\n\n{prompt}\n\n{reminder[1]}" for prompt in prompts]
    return _answer(model, tokenizer, wrapped, config, description)


def swap_characters(text: str, share: float, rng: np.random.Generator) -> str:
    """`text` with `share` of its characters (rounded down) replaced by printable ones, at places drawn by `rng`."""
    letters = list(text)
    for place in rng.choice(len(letters), size=int(share * len(letters)), replace=False) if letters else ():
        letters[place] = printable[int(rng.integers(len(printable) - 5))]  # without tabs and line ends
    return "".join(letters)


def _answer(
    model: Any, tokenizer: Any, prompts: Sequence[str], config: SmoothLLMConfig, description: str | None
) -> list[str]:
    return greedy(
        model,
        tokenizer,
        [tokenize_prompt({"question": prompt, "answer": ""}, tokenizer) for prompt in prompts],
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
        description=description,
    )
