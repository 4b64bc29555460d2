"""Multi-turn: conversations that lead up to a question; only the last answer is judged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from hf_unlearn.attacks.judges import Judge, TargetJudge
from hf_unlearn.attacks.prompts import JudgedAnswers, Perplexity, judged, usual_judges
from hf_unlearn.attacks.static import any_prompt
from hf_unlearn.attacks.summary import judged_parts
from hf_unlearn.attacks.transcripts import Transcript
from hf_unlearn.data import tokenize_prompt
from hf_unlearn.metrics.generate import greedy
from hf_unlearn.reports.outcomes import AttackOutcome, Subject

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class MultiTurnConfig:
    """
    How conversations are held.

    Args:
        assistant (`"given"` or `"generated"`, *optional*, defaults to `"given"`):
            Whether the assistant's turns are those of the file where it has them, or all the model's own. Given turns
            put words into the model's mouth: closer to a prefill than to a chat.
        max_new_tokens (`int`, *optional*, defaults to `256`):
            Longest answer in tokens, at every turn.
        batch_size (`int`, *optional*, defaults to `64`):
            Conversations at once.
    """

    assistant: Literal["given", "generated"] = "given"
    max_new_tokens: int = 256
    batch_size: int = 64

    def __post_init__(self) -> None:
        if self.assistant not in ("given", "generated"):
            raise ValueError(f"assistant is {self.assistant!r}; expected 'given' or 'generated'.")
        if self.max_new_tokens < 1 or self.batch_size < 1:
            raise ValueError(
                f"max_new_tokens is {self.max_new_tokens}, batch_size {self.batch_size}; both must be at least 1."
            )


def multi_turn(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Transcript],
    config: MultiTurnConfig | None = None,
    *,
    judges: Mapping[str, Judge] | None = None,
    perplexity: Perplexity | None = None,
    description: str | None = None,
) -> JudgedAnswers:
    """
    Holds each conversation, greedily, and has the last answer judged.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The unlearned model, or the control; it is not changed.
        tokenizer (`PreTrainedTokenizerBase`):
            Its tokenizer, with a chat template.
        rows (`Sequence[Transcript]`):
            What [`load_transcripts`] reads.
        config ([`MultiTurnConfig`], *optional*):
            How they are held.
        judges (`Mapping[str, Judge]`, *optional*):
            By name; by default [`transcript_judges`].
        perplexity (`Callable`, *optional*):
            Perplexities of the answers under a reference model, which shows word salad; see [`answer_perplexities`].
        description (`str`, *optional*):
            Text of the progress bars.

    Raises:
        ValueError: no conversations, or a tokenizer without a chat template.
    """
    config = config or MultiTurnConfig()
    if not len(rows):
        raise ValueError("There are no conversations; expected at least one.")
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("The tokenizer has no chat template, so it cannot hold a conversation; set one.")
    held: list[list[dict[str, str]]] = [[] for _ in rows]
    for turn in range(max(len(row.messages) for row in rows)):
        missing = []
        for number, row in enumerate(rows):
            if turn >= len(row.messages):
                continue
            message = row.messages[turn]
            wanted = message["role"] == "assistant" and (config.assistant == "generated" or message["content"] is None)
            if wanted:
                missing.append(number)
            else:
                held[number].append({"role": str(message["role"]), "content": message["content"] or ""})
        label = None if description is None else f"{description}: turn {turn + 1}"
        for number, answer in zip(missing, _answers(model, tokenizer, held, missing, config, label), strict=True):
            held[number].append({"role": "assistant", "content": answer})
    everyone = list(range(len(rows)))
    label = None if description is None else f"{description}: last answer"
    answers = _answers(model, tokenizer, held, everyone, config, label)
    asked = [row.behavior for row in rows]
    return judged(
        asked, answers, judges if judges is not None else transcript_judges(rows), groups=asked, perplexity=perplexity
    )


run = multi_turn
"""The attack in the form that all attacks have: `run(model, tokenizer, rows, config)`."""


def transcript_judges(rows: Sequence[Transcript]) -> dict[str, Judge]:
    """
    [`usual_judges`], and one of the conversations' own targets where they have some. Where only some have, it cannot
    judge the others, and says so.
    """
    judges = usual_judges([row.behavior for row in rows])
    targets: dict[str, list[str]] = {}
    for row in rows:
        if row.targets:
            targets.setdefault(row.behavior, []).extend(row.targets)
    if targets:
        judges["targets"] = TargetJudge(targets=targets)
    return judges


def outcome(
    result: JudgedAnswers,
    subject: Subject = "unlearned",
    *,
    settings: Mapping[str, Any] | None = None,
    seconds: float = math.nan,
) -> AttackOutcome:
    """The result in the form of attacks.json; arguments as in [`prefill.outcome`]."""
    return AttackOutcome(
        attack="multi_turn",
        settings=settings or {},
        measures=any_prompt(result, subject),
        examples=result.examples(subject),
        seconds=seconds,
        **judged_parts(result.judgement, subject),
    )


def _answers(
    model: Any,
    tokenizer: Any,
    held: Sequence[Sequence[Mapping[str, str]]],
    numbers: Sequence[int],
    config: MultiTurnConfig,
    description: str | None,
) -> list[str]:
    """What the model says next in the conversations of these numbers."""
    if not numbers:
        return []
    reply = [{"role": "assistant", "content": ""}]
    return greedy(
        model,
        tokenizer,
        [tokenize_prompt({"prompt": list(held[number]), "completion": reply}, tokenizer) for number in numbers],
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
        description=description,
    )
