"""One row to token ids and labels, by the rules of TRL's supervised fine-tuning."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from .formats import DatasetFormat, detect_format, to_chatml

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100
PROMPT_FORMATS: tuple[DatasetFormat, ...] = (
    "prompt_completion",
    "question_answer",
    "conversational_prompt_completion",
)


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """
    A row as tokens.

    Args:
        input_ids (`list[int]`):
            T token ids, not yet truncated.
        labels (`list[int]`):
            T labels, -100 where no loss is taken.
        lost_prompt (`list[int]`, *optional*, defaults to `()`):
            Tokens at the end of the prompt alone that are not in the whole sequence (see [`encode_pair`]).
    """

    input_ids: list[int]
    labels: list[int]
    lost_prompt: tuple[int, ...] = ()

    @property
    def supervised(self) -> int:
        """Labels that a model is asked to predict: the first token of a sequence has nothing before it."""
        return sum(label != IGNORE_INDEX for label in self.labels[1:])


def tokenize_example(
    example: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    completion_only_loss: bool | None = None,
    assistant_only_loss: bool = False,
    truncation: Literal["right", "error"] = "right",
) -> dict[str, list[int]]:
    r"""
    Tokenises one row of any accepted format.

    * Text and text completions get the tokenizer's EOS, unless they end with it. Conversations get none: their
      chat template closes the turn.
    * `question` and `answer` become a conversation of one turn if the tokenizer has a chat template, and otherwise the
      prompt `"Question: {question}\nAnswer:"` with the completion `" {answer}"`.
    * The tokens are those of prompt and completion *together*; the completion starts where they leave the tokens of
      the prompt alone.
    * A tokenised row keeps its `labels`; without them its masks apply (`assistant_masks` always, `completion_mask`
      unless `completion_only_loss=False`), and without masks every token is a label. Positions that its
      `attention_mask` hides (padding) are dropped.

    Args:
        example (`Mapping`):
            One row.
        tokenizer (`PreTrainedTokenizerBase`):
            The model's tokenizer.
        max_length (`int`, *optional*):
            Longest row in tokens.
        completion_only_loss (`bool`, *optional*):
            Whether the prompt is left out of the loss. By default it is, where there is one; a `text` or `messages`
            row has none, all of it counts.
        assistant_only_loss (`bool`, *optional*, defaults to `False`):
            Take the loss on the assistant's turns only; the chat template must mark them (`{% generation %}`).
        truncation (`Literal["right", "error"]`, *optional*, defaults to `"right"`):
            What becomes of a row longer than `max_length`.

    Returns:
        `dict`: `input_ids` and `labels`, lists of one length T, labels -100 where no loss is taken.

    Raises:
        ValueError: an unknown format, a missing EOS token or chat template, or a row longer than `max_length` with
            `truncation="error"`.
    """
    if truncation not in ("right", "error"):
        raise ValueError(f"truncation is {truncation!r}; expected 'right' or 'error'.")
    encoded = encode_example(
        example, tokenizer, completion_only_loss=completion_only_loss, assistant_only_loss=assistant_only_loss
    )
    if encoded.lost_prompt:
        warnings.warn(prefix_warning(tokenizer.decode(list(encoded.lost_prompt))), stacklevel=2)
    if truncation == "error" and max_length is not None and len(encoded.input_ids) > max_length:
        raise ValueError(
            f"The row has {len(encoded.input_ids)} tokens, more than max_length={max_length}. Raise max_length, "
            "shorten the row, or pass truncation='right'."
        )
    return {"input_ids": encoded.input_ids[:max_length], "labels": encoded.labels[:max_length]}


def tokenize_prompt(example: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """
    Token ids of the prompt of a row as a model sees it when it generates, the generation prompt included.

    Raises:
        ValueError: the row's format has no prompt.
    """
    example = to_chatml(example)
    fmt = detect_format(example)
    if fmt not in PROMPT_FORMATS:
        raise ValueError(
            f"A row in {fmt} format has no prompt. Use `prompt` and `completion`, or `question`, `answer`."
        )
    prompt, _ = split_prompt(example, fmt, tokenizer)
    return _prompt_ids(prompt, tokenizer, template_options(example))


def encode_example(
    example: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    completion_only_loss: bool | None = None,
    assistant_only_loss: bool = False,
) -> Encoded:
    """[`tokenize_example`] without truncation."""
    example = to_chatml(example)
    fmt = detect_format(example)
    if fmt == "tokenized":
        return _keep_tokens(example, completion_only_loss)
    if fmt in PROMPT_FORMATS:
        prompt, completion = split_prompt(example, fmt, tokenizer)
        return encode_pair(
            prompt,
            completion,
            tokenizer,
            options=template_options(example),
            completion_only_loss=completion_only_loss is not False,
            assistant_only_loss=assistant_only_loss,
        )
    if completion_only_loss:
        raise ValueError(
            f"completion_only_loss=True needs a prompt, but the rows are in {fmt} format. Give `prompt` and "
            "`completion` columns (`trl.extract_prompt` and `dataset.map` can build them), or leave "
            "completion_only_loss=None."
        )
    if fmt == "conversational":
        ids, mask = _chat_ids(example["messages"], tokenizer, template_options(example), assistant_only_loss)
        return Encoded(input_ids=ids, labels=_masked(ids, mask))
    ids = list(tokenizer(text=_with_eos(example["text"], tokenizer))["input_ids"])
    return Encoded(input_ids=ids, labels=list(ids))


def split_prompt(
    example: Mapping[str, Any], fmt: DatasetFormat, tokenizer: PreTrainedTokenizerBase
) -> tuple[Any, Any]:
    """Prompt and completion of a row: two strings, or two lists of messages."""
    if fmt != "question_answer":
        return example["prompt"], example["completion"]
    question, answer = example["question"], example["answer"]
    if tokenizer.chat_template:
        return [{"role": "user", "content": question}], [{"role": "assistant", "content": answer}]
    return f"Question: {question}\nAnswer:", f" {answer}"


def encode_pair(
    prompt: Any,
    completion: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    options: Mapping[str, Any] | None = None,
    completion_only_loss: bool = True,
    assistant_only_loss: bool = False,
) -> Encoded:
    """
    Tokenises prompt and completion as one sequence and finds where the completion begins.

    The prompt's ids should be a prefix of the sequence's. They are not where tokens merge across the boundary, or
    where a template renders the prompt differently in front of an answer. Then the completion begins where the two
    differ, so that every token of it is a label, and `lost_prompt` names the rest of the prompt.

    Args:
        prompt (`str` or `list[dict]`):
            Text or messages.
        completion (`str` or `list[dict]`):
            The same kind as `prompt`.
        tokenizer (`PreTrainedTokenizerBase`):
            The model's tokenizer.
        options (`Mapping`, *optional*):
            Further arguments of the chat template.
        completion_only_loss (`bool`, *optional*, defaults to `True`):
            Whether labels on the prompt are -100.
        assistant_only_loss (`bool`, *optional*, defaults to `False`):
            Whether labels outside the turns that the template marks are -100.
    """
    options = options or {}
    mask: list[int] | None = None
    prompt_ids = _prompt_ids(prompt, tokenizer, options)
    if isinstance(prompt, str):
        ids = list(tokenizer(text=prompt + _with_eos(completion, tokenizer))["input_ids"])
    else:
        ids, mask = _chat_ids([*prompt, *completion], tokenizer, options, assistant_only_loss)
    start = _common_prefix(prompt_ids, ids)
    if completion_only_loss:
        mask = [int(position >= start and (mask is None or bool(mask[position]))) for position in range(len(ids))]
    return Encoded(input_ids=ids, labels=_masked(ids, mask), lost_prompt=tuple(prompt_ids[start:]))


def template_options(example: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the chat template that a row brings along: `tools` (also as JSON) and `chat_template_kwargs`."""
    tools = example.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    return {"tools": tools or None, **(example.get("chat_template_kwargs") or {})}


def prefix_warning(lost: str) -> str:
    """What to say when a prompt is not a prefix of its sequence; `lost` is the end of the prompt that is missing."""
    return (
        f"The tokens of a prompt are not a prefix of those of prompt and completion: {lost!r} at its end is left out. "
        "The completion is taken to start where they differ, so the model is trained on a context other than the one "
        "it generates from. Use a chat template that renders a prompt the same way with and without an answer, or put "
        "the space between the two at the start of the completion."
    )


def _keep_tokens(example: Mapping[str, Any], completion_only_loss: bool | None) -> Encoded:
    ids = [int(token) for token in example["input_ids"]]
    columns = {}
    for column in ("labels", "completion_mask", "assistant_masks", "attention_mask"):
        if example.get(column) is not None:
            columns[column] = [int(value) for value in example[column]]
            if len(columns[column]) != len(ids):
                raise ValueError(
                    f"`{column}` has {len(columns[column])} entries and `input_ids` {len(ids)}; expected as many."
                )
    labels = columns.get("labels")
    if labels is None:
        wanted = ["assistant_masks"] if completion_only_loss is False else ["assistant_masks", "completion_mask"]
        masks = [columns[column] for column in wanted if column in columns]
        labels = [token if all(mask[at] for mask in masks) else IGNORE_INDEX for at, token in enumerate(ids)]
    visible = columns.get("attention_mask", [1] * len(ids))
    kept = [at for at, seen in enumerate(visible) if seen]
    return Encoded(input_ids=[ids[at] for at in kept], labels=[labels[at] for at in kept])


def _prompt_ids(prompt: Any, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> list[int]:
    if isinstance(prompt, str):
        return list(tokenizer(text=prompt)["input_ids"])
    return _chat_ids(prompt, tokenizer, {**options, "add_generation_prompt": True}, False)[0]


def _chat_ids(
    messages: list[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    options: Mapping[str, Any],
    assistant_only_loss: bool,
) -> tuple[list[int], list[int] | None]:
    if not tokenizer.chat_template:
        raise ValueError(
            "The rows are conversations, but the tokenizer has no chat template. Set `tokenizer.chat_template`, use "
            "the instruct model's tokenizer, or give `prompt` and `completion` as strings."
        )
    result = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=assistant_only_loss, **options
    )
    if not assistant_only_loss:
        return list(result["input_ids"]), None
    mask = list(result["assistant_masks"])
    if not any(mask):
        raise ValueError(
            "assistant_only_loss=True, but the chat template marks no token as the assistant's. It needs "
            "{% generation %} ... {% endgeneration %} around the assistant's turns; "
            "`trl.chat_template_utils.get_training_chat_template` has such templates."
        )
    return list(result["input_ids"]), mask


def _with_eos(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    if tokenizer.eos_token is None:
        raise ValueError(
            "The tokenizer has no EOS token, so text rows would not end. Set `tokenizer.eos_token`, or give tokenised "
            "rows."
        )
    return text if text.endswith(tokenizer.eos_token) else text + tokenizer.eos_token


def _masked(ids: list[int], mask: list[int] | None) -> list[int]:
    if mask is None:
        return list(ids)
    return [token if keep else IGNORE_INDEX for token, keep in zip(ids, mask, strict=True)]


def _common_prefix(ids: list[int], others: list[int]) -> int:
    for position, (left, right) in enumerate(zip(ids, others, strict=False)):
        if left != right:
            return position
    return min(len(ids), len(others))
