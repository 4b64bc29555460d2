from __future__ import annotations

import pytest

from hf_unlearn.data import tokenize_example, tokenize_prompt

PROMPT = [{"role": "user", "content": "Who wrote the book?"}]
ANSWER = [{"role": "assistant", "content": "Anna Marlow wrote it."}]


def supervised(row):
    return [label for label in row["labels"] if label != -100]


def test_question_and_answer_go_through_the_chat_template_and_only_the_answer_is_a_label(chat_tokenizer):
    row = tokenize_example({"question": "Who wrote the book?", "answer": "Anna Marlow wrote it."}, chat_tokenizer)
    assert chat_tokenizer.decode(row["input_ids"]) == (
        "<|user|>\nWho wrote the book?<|end|><|assistant|>\nAnna Marlow wrote it.<|end|>"
    )
    assert chat_tokenizer.decode(supervised(row)) == "Anna Marlow wrote it.<|end|>"


def test_question_and_answer_without_a_chat_template_become_the_documented_text(text_tokenizer):
    row = tokenize_example({"question": "Who?", "answer": "Anna."}, text_tokenizer)
    assert text_tokenizer.decode(row["input_ids"]) == "<s>Question: Who?\nAnswer: Anna.<|end|>"
    assert text_tokenizer.decode(supervised(row)) == " Anna.<|end|>"


@pytest.mark.parametrize("chat", [True, False])
def test_first_response_token_is_a_label_and_everything_before_it_is_not(chat, chat_tokenizer, text_tokenizer):
    # the reference code this library answers flattened positions 3..7 where 2..6 predict the answer
    tokenizer = chat_tokenizer if chat else text_tokenizer
    example = {"question": "Where was she born?", "answer": "She was born in Lisbon."}
    row = tokenize_example(example, tokenizer)
    start = len(tokenize_prompt(example, tokenizer))
    assert row["input_ids"][:start] == tokenize_prompt(example, tokenizer)
    assert row["labels"] == [-100] * start + row["input_ids"][start:]
    assert row["labels"][-1] == tokenizer.eos_token_id


def test_eos_is_appended_once_to_text_and_never_to_conversations(chat_tokenizer, text_tokenizer):
    eos = text_tokenizer.eos_token_id
    for text in ("The sea.", "The sea.<|end|>"):
        row = tokenize_example({"text": text}, text_tokenizer)
        assert row["input_ids"].count(eos) == 1
        assert row["input_ids"][-1] == eos
        assert row["labels"] == row["input_ids"]
    chat = tokenize_example({"messages": PROMPT + ANSWER}, chat_tokenizer)
    assert chat["input_ids"].count(eos) == 2  # one a turn, from the template
    assert chat["labels"] == chat["input_ids"]


def test_completion_only_loss_false_takes_the_prompt_in(text_tokenizer):
    row = tokenize_example({"prompt": "The", "completion": " sea."}, text_tokenizer, completion_only_loss=False)
    assert row["labels"] == row["input_ids"]


def test_assistant_only_loss_passes_the_masks_of_the_template_through(chat_tokenizer):
    messages = PROMPT + ANSWER + PROMPT + ANSWER
    row = tokenize_example({"messages": messages}, chat_tokenizer, assistant_only_loss=True)
    assert chat_tokenizer.decode(supervised(row)) == "Anna Marlow wrote it.<|end|>" * 2
    pair = {"prompt": PROMPT + ANSWER + PROMPT, "completion": ANSWER}
    row = tokenize_example(pair, chat_tokenizer, assistant_only_loss=True)
    assert chat_tokenizer.decode(supervised(row)) == "Anna Marlow wrote it.<|end|>"


def test_tools_and_template_arguments_of_a_row_reach_the_template(chat_tokenizer):
    template = chat_tokenizer.chat_template
    try:
        chat_tokenizer.chat_template = "{{ tools[0]['name'] }}{{ mood }}" + template
        row = {"messages": PROMPT, "tools": '[{"name": "TOOL"}]', "chat_template_kwargs": {"mood": "CALM"}}
        ids = tokenize_example(row, chat_tokenizer)["input_ids"]
    finally:
        chat_tokenizer.chat_template = template
    assert chat_tokenizer.decode(ids).startswith("TOOLCALM<|user|>")


@pytest.mark.parametrize(
    ("columns", "only", "expected"),
    [
        ({"labels": [-100, -100, 7, 8]}, None, [-100, -100, 7, 8]),
        ({"completion_mask": [0, 0, 1, 1]}, None, [-100, -100, 7, 8]),
        ({"completion_mask": [0, 0, 1, 1]}, False, [5, 6, 7, 8]),
        ({"assistant_masks": [0, 1, 1, 0]}, None, [-100, 6, 7, -100]),
        ({"assistant_masks": [0, 1, 1, 0], "completion_mask": [0, 0, 1, 1]}, None, [-100, -100, 7, -100]),
        ({}, None, [5, 6, 7, 8]),
    ],
)
def test_tokenised_rows_keep_their_labels_or_get_them_from_masks(columns, only, expected, chat_tokenizer):
    row = tokenize_example({"input_ids": [5, 6, 7, 8], **columns}, chat_tokenizer, completion_only_loss=only)
    assert row == {"input_ids": [5, 6, 7, 8], "labels": expected}


def test_padding_of_tokenised_rows_is_dropped_by_their_mask_and_real_eos_stays(chat_tokenizer):
    row = {"input_ids": [1, 1, 5, 6, 1], "attention_mask": [0, 0, 1, 1, 1]}
    assert tokenize_example(row, chat_tokenizer) == {"input_ids": [5, 6, 1], "labels": [5, 6, 1]}


def test_a_prompt_that_merges_into_its_completion_warns_and_loses_no_completion_token(text_tokenizer):
    with pytest.warns(UserWarning, match="not a prefix"):
        row = tokenize_example({"prompt": "The capi", "completion": "tal of"}, text_tokenizer)
    whole = text_tokenizer.decode(row["input_ids"])
    assert whole == "<s>The capital of<|end|>"
    assert text_tokenizer.decode(supervised(row)).endswith("tal of<|end|>")


def test_a_template_that_renders_the_prompt_differently_before_an_answer_warns(chat_tokenizer):
    template = chat_tokenizer.chat_template
    try:
        chat_tokenizer.chat_template = template.replace(
            "<|assistant|>\n{% endif %}", "<|assistant|>\n<think>{% endif %}"
        )
        with pytest.warns(UserWarning, match="<think>"):
            row = tokenize_example({"prompt": PROMPT, "completion": ANSWER}, chat_tokenizer)
    finally:
        chat_tokenizer.chat_template = template
    assert chat_tokenizer.decode(supervised(row)) == "Anna Marlow wrote it.<|end|>"


def test_long_rows_are_cut_on_the_right_or_refused(text_tokenizer):
    example = {"text": "The author writes novels about the sea, storms and silence."}
    whole = tokenize_example(example, text_tokenizer)
    cut = tokenize_example(example, text_tokenizer, max_length=5)
    assert cut == {"input_ids": whole["input_ids"][:5], "labels": whole["labels"][:5]}
    with pytest.raises(ValueError, match="more than max_length=5"):
        tokenize_example(example, text_tokenizer, max_length=5, truncation="error")


def test_bad_rows_are_explained(chat_tokenizer, text_tokenizer):
    with pytest.raises(ValueError, match="no chat template"):
        tokenize_example({"messages": PROMPT}, text_tokenizer)
    with pytest.raises(ValueError, match="needs a prompt"):
        tokenize_example({"text": "a"}, text_tokenizer, completion_only_loss=True)
    with pytest.raises(ValueError, match="marks no token as the assistant's"):
        tokenize_example({"messages": PROMPT}, chat_tokenizer, assistant_only_loss=True)
    with pytest.raises(ValueError, match="`labels` has 1 entries and `input_ids` 2"):
        tokenize_example({"input_ids": [1, 2], "labels": [1]}, text_tokenizer)
    with pytest.raises(ValueError, match="has no prompt"):
        tokenize_prompt({"text": "a"}, text_tokenizer)
    with pytest.raises(ValueError, match="truncation is 'left'"):
        tokenize_example({"text": "a"}, text_tokenizer, truncation="left")


def test_a_tokenizer_without_eos_is_an_error_and_not_an_endless_answer(text_tokenizer):
    eos, text_tokenizer.eos_token = text_tokenizer.eos_token, None
    try:
        with pytest.raises(ValueError, match="no EOS token"):
            tokenize_example({"text": "a"}, text_tokenizer)
    finally:
        text_tokenizer.eos_token = eos
