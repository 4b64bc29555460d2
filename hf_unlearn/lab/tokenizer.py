"""A byte-level BPE tokenizer with a chat template, trained on the lab's own text in about a second."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, USER, ASSISTANT, SYSTEM, END = "<|pad|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"

# One token a role, one for the end of a turn. The generation tags let TRL's assistant_only_loss work as well.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "<|assistant|>{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}"
    "{% else %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int = 4096) -> PreTrainedTokenizerFast:
    """
    Trains a byte-level BPE tokenizer; the end-of-turn token is EOS and the padding token is a token of its own.

    Args:
        texts (`Iterable[str]`):
            The corpus; its order does not matter beyond ties.
        vocab_size (`int`, *optional*, defaults to `4096`):
            Size of the vocabulary with the 256 bytes and the 5 special tokens.

    Raises:
        ValueError: `vocab_size` leaves no room for merges.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    specials = [PAD, END, USER, ASSISTANT, SYSTEM]
    if vocab_size <= 256 + len(specials):
        raise ValueError(f"vocab_size is {vocab_size}; expected more than {256 + len(specials)} (bytes and specials).")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    # sorted: the alphabet comes as a set, and token ids must not depend on the process's hash seed
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=specials, initial_alphabet=sorted(alphabet), show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT, SYSTEM],
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
