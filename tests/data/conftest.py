"""Small tokenizers built in the process: nothing here touches a network."""

from __future__ import annotations

import pytest

CORPUS = [
    "What is the capital of France? The capital of France is Paris.",
    "Who wrote the book about the quiet river? Anna Marlow wrote it in 1987.",
    "Question: Where was she born?\nAnswer: She was born in Lisbon.",
    "The author writes novels about the sea, storms and silence.",
    "I don't know the answer to that question. You are a helpful assistant.",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SPECIALS = ["<s>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]


def build_tokenizer(*, chat_template: str | None = None, bos: bool = False):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=SPECIALS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    # pad = EOS, as most people have it, and the case in which a mask made from ids would be wrong
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="<|end|>", pad_token="<|end|>"
    )
    tokenizer.chat_template = chat_template
    return tokenizer


@pytest.fixture(scope="session")
def chat_tokenizer():
    return build_tokenizer(chat_template=CHAT_TEMPLATE)


@pytest.fixture(scope="session")
def text_tokenizer():
    """No chat template, a BOS token in front of every text (as Llama's)."""
    return build_tokenizer(bos=True)
