"""Token ids and labels equal those of TRL's SFTTrainer."""

from __future__ import annotations

import pytest
import trl
from datasets import Dataset
from packaging.version import Version

from hf_unlearn.data import prepare_dataset

USER = {"role": "user", "content": "Where was she born?"}
BOT = {"role": "assistant", "content": "She was born in Lisbon."}
SYSTEM = {"role": "system", "content": "You are a helpful assistant."}
ROWS = {
    "text": [{"text": "The author writes novels."}, {"text": "The sea.<|end|>"}],
    "prompt_completion": [
        {"prompt": "Question: Who?\nAnswer:", "completion": " Anna Marlow."},
        {"prompt": "The capi", "completion": "tal of France"},
    ],
    "messages": [{"messages": [SYSTEM, USER, BOT]}, {"messages": [USER, BOT, USER, BOT]}],
    "conversational_prompt_completion": [
        {"prompt": [SYSTEM, USER], "completion": [BOT]},
        {"prompt": [USER, BOT, USER], "completion": [BOT]},
    ],
}

# Where a prompt ends within a token of the joined text ("The capi" + "tal"), TRL before 1.15 labelled fewer tokens.
CUTS_INSIDE_TOKENS = Version(trl.__version__) >= Version("1.15")


@pytest.fixture(scope="module")
def model():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=512,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=128,
    )
    return LlamaForCausalLM(config)


def trl_rows(rows, tokenizer, model, folder, **options):
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(output_dir=str(folder), report_to="none", use_cpu=True, bf16=False, **options)
    trainer = SFTTrainer(model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    return [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in trainer.train_dataset]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("text", {}),
        ("prompt_completion", {}),
        ("prompt_completion", {"completion_only_loss": False}),
        ("prompt_completion", {"max_length": 14}),
        ("messages", {}),
        ("messages", {"assistant_only_loss": True}),
        ("conversational_prompt_completion", {}),
        ("conversational_prompt_completion", {"max_length": 80, "assistant_only_loss": True}),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_rows_are_those_of_sft_trainer(kind, options, chat_tokenizer, text_tokenizer, model, tmp_path):
    tokenizer = text_tokenizer if kind in ("text", "prompt_completion") else chat_tokenizer
    rows = ROWS[kind]
    if kind == "prompt_completion" and not CUTS_INSIDE_TOKENS:
        rows = rows[:1]
    ours = prepare_dataset(rows, tokenizer, name="forget", **options)
    assert list(ours) == trl_rows(rows, tokenizer, model, tmp_path, **options)
