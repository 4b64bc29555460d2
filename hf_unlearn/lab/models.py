"""Tiny Llama, Qwen and GPT-2 configurations: real architectures, a few million parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Architecture = Literal["llama", "qwen", "gpt2"]


def tiny_config(
    tokenizer: PreTrainedTokenizerBase,
    architecture: Architecture = "llama",
    *,
    hidden_size: int = 128,
    num_layers: int = 4,
    num_heads: int = 4,
    intermediate_size: int | None = None,
    max_positions: int = 512,
) -> PreTrainedConfig:
    """
    A configuration of a small decoder whose vocabulary and special tokens are the tokenizer's.

    Raises:
        ValueError: the architecture is unknown, or `hidden_size` is no multiple of `num_heads`.
    """
    from transformers import GPT2Config, LlamaConfig, Qwen2Config

    if hidden_size % num_heads:
        raise ValueError(f"hidden_size {hidden_size} is no multiple of num_heads {num_heads}.")
    tokens = {
        "vocab_size": len(tokenizer),
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": True,
    }
    intermediate_size = intermediate_size or (8 * hidden_size) // 3
    if architecture == "gpt2":
        return GPT2Config(
            n_embd=hidden_size,
            n_layer=num_layers,
            n_head=num_heads,
            n_inner=intermediate_size,
            n_positions=max_positions,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **tokens,
        )
    if architecture not in ("llama", "qwen"):
        raise ValueError(f"Unknown architecture {architecture!r}; expected 'llama', 'qwen' or 'gpt2'.")
    shape = {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "max_position_embeddings": max_positions,
    }
    if architecture == "llama":
        return LlamaConfig(num_key_value_heads=num_heads, **shape, **tokens)
    # Qwen is the lab's case of grouped queries (and of biases on q, k and v).
    return Qwen2Config(num_key_value_heads=max(1, num_heads // 2), **shape, **tokens)


def tiny_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A freshly initialised float32 model; the global random state of torch is left as it was."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
