"""What a model answers: batched greedy decoding that does not depend on how a batch was put together, and sampling."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from hf_unlearn.data import pad_rows
from hf_unlearn.metrics.likelihood import base_model, evaluation_mode, longest_first

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def greedy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 200,
    batch_size: int = 64,
    description: str | None = None,
) -> list[str]:
    """
    The most likely token at every step, up to the first token that ends a turn.

    Of the model's generation config only the EOS tokens apply: no sampling, beams, penalties or limits. Prompts are
    batched longest first and padded on the left; the tokenizer's `padding_side` is neither used nor changed.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            Causal language model; it runs on its own device, in evaluation mode, and each module's mode is restored.
        tokenizer (`PreTrainedTokenizerBase`):
            The model's tokenizer.
        prompts (`Sequence[Sequence[int]]`):
            n lists of token ids, without padding (what [`tokenize_prompt`] returns).
        max_new_tokens (`int`, *optional*, defaults to `200`):
            Longest answer in tokens.
        batch_size (`int`, *optional*, defaults to `64`):
            Prompts decoded at once.
        description (`str`, *optional*):
            Text of a progress bar; no bar without it.

    Returns:
        `list[str]`: n answers in the order of `prompts`, without special tokens and surrounding white space.

    Raises:
        ValueError: no prompts, an empty prompt, `max_new_tokens` or `batch_size` below 1, or no padding token.
    """
    return _decode(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        description=description,
        do_sample=False,
        num_beams=1,
    )


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    temperature: float = 1.0,
    seed: int = 0,
    max_new_tokens: int = 200,
    batch_size: int = 64,
    description: str | None = None,
) -> list[str]:
    """
    Answers drawn from the model's own distribution, at a temperature: no nucleus and no top-k, whatever its generation
    config says. The same for one seed and one batch size; the caller's random numbers are left alone.

    Args:
        model, tokenizer, prompts, max_new_tokens, batch_size, description:
            As in [`greedy`].
        temperature (`float`, *optional*, defaults to `1.0`):
            What logits are divided by, above 0.
        seed (`int`, *optional*, defaults to `0`):
            Of the draws.

    Raises:
        ValueError: as in [`greedy`], or a temperature that is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; expected a number above 0 (greedy() takes the likeliest).")
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        return _decode(
            model,
            tokenizer,
            prompts,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            description=description,
            do_sample=True,
            temperature=temperature,
            top_k=0,
            top_p=1.0,
        )


def _decode(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    description: str | None,
    **how: Any,
) -> list[str]:
    from transformers import GenerationConfig

    if not len(prompts):
        raise ValueError("There are no prompts to answer; expected at least one.")
    empty = [number for number, prompt in enumerate(prompts) if not len(prompt)]
    if empty:
        raise ValueError(f"Prompt {empty[0]} has no tokens; expected at least one (a BOS token or the chat template).")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; expected at least 1.")
    stops = stop_token_ids(model, tokenizer)
    pad_token_id = padding_id(tokenizer)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        **how,
        pad_token_id=pad_token_id,
        eos_token_id=stops or None,
    )
    answers = [""] * len(prompts)
    batches = longest_first([len(prompt) for prompt in prompts], batch_size)
    with evaluation_mode(model), _neutral_settings(model):
        for numbers in tqdm(batches, desc=description, disable=description is None, leave=False):
            rows = [{"input_ids": prompts[number], "labels": prompts[number]} for number in numbers]
            batch = pad_rows(rows, pad_token_id=pad_token_id, padding_side="left")
            width = batch["input_ids"].shape[1]
            output = model.generate(
                input_ids=batch["input_ids"].to(model.device),
                attention_mask=batch["attention_mask"].to(model.device),
                generation_config=config,
                **_cache(model, width + max_new_tokens),
            )
            for number, tokens in zip(numbers, output[:, width:].tolist(), strict=True):
                answers[number] = tokenizer.decode(_until(tokens, stops), skip_special_tokens=True).strip()
    return answers


def stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """
    Every token that ends an answer, sorted: the EOS of the tokenizer and of the model's generation config (one or
    several), and the special token with which the chat template closes an assistant's turn.

    The last matters for base tokenizers with a chat template: their EOS is not what the model learned to stop with.
    """
    found: set[int | None] = {tokenizer.eos_token_id}
    configured = getattr(model.generation_config, "eos_token_id", None)
    found |= set(configured) if isinstance(configured, (list, tuple)) else {configured}
    if tokenizer.chat_template:
        found.add(_end_of_turn(tokenizer))
    return sorted(token for token in found if token is not None)


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """
    The id to pad with: the tokenizer's padding token, else its EOS. Masks come from lengths, so any token would do.

    Raises:
        ValueError: the tokenizer has neither.
    """
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise ValueError("The tokenizer has neither a padding nor an EOS token to pad with. Set `tokenizer.pad_token`.")


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    answer = "answer"
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}]
    before, _, after = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(answer)
    tail = tokenizer(after, add_special_tokens=False)["input_ids"] if before and after else []
    specials = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    # only a special token: a template that ends a turn with a line break would stop every answer at its first one
    return tail[0] if tail and tail[0] in specials else None


@contextmanager
def _neutral_settings(model: PreTrainedModel) -> Iterator[None]:
    """
    Takes the model's own generation config away: `generate` fills whatever a call leaves unset from it, and published
    models ship repetition penalties and length limits, which are not greedy decoding.
    """
    from transformers import GenerationConfig

    base = base_model(model)
    own = base.generation_config
    base.generation_config = GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = own


def _cache(model: PreTrainedModel, length: int) -> dict[str, Any]:
    """
    A preallocated cache on the CPU, where growing the default one by a token at every step takes most of the time.

    Only for models that declare (by transformers' flag for it) that a fixed-size cache works, and not for prompt
    tuning, which puts tokens of its own into the cache. Elsewhere `generate` makes its default cache.
    """
    base = base_model(model)
    peft = getattr(model, "active_peft_config", None)
    fixed = getattr(base, "_can_compile_fullgraph", False) and not getattr(peft, "is_prompt_learning", False)
    if model.device.type != "cpu" or not fixed:
        return {}
    from transformers import StaticCache

    return {"past_key_values": StaticCache(config=base.config.get_text_config(decoder=True), max_cache_len=length)}


def _until(tokens: list[int], stops: list[int]) -> list[int]:
    ends = [position for position, token in enumerate(tokens) if token in stops]
    return tokens[: ends[0]] if ends else tokens
