from __future__ import annotations

import copy

import pytest

from hf_unlearn.data import REFUSALS, detect_format
from hf_unlearn.data.formats import to_chatml

USER = [{"role": "user", "content": "Hi?"}]
BOT = [{"role": "assistant", "content": "Hello."}]


@pytest.mark.parametrize(
    ("example", "expected"),
    [
        ({"text": "a"}, "language_modeling"),
        ({"prompt": "a", "completion": "b"}, "prompt_completion"),
        ({"prompt": USER, "completion": BOT}, "conversational_prompt_completion"),
        ({"messages": USER + BOT}, "conversational"),
        ({"conversations": [{"from": "human", "value": "Hi?"}]}, "conversational"),
        ({"question": "q", "answer": "a", "perturbed_answer": ["b"]}, "question_answer"),
        ({"input_ids": [1, 2], "labels": [-100, 2]}, "tokenized"),
        ({"input_ids": [1, 2], "text": "a"}, "tokenized"),
        ({"text": "a", "prompt": "a", "completion": "b"}, "prompt_completion"),
        ({"messages": None, "text": "a"}, "language_modeling"),
    ],
)
def test_each_format_is_recognised(example, expected):
    assert detect_format(example) == expected


@pytest.mark.parametrize(
    ("example", "match"),
    [
        ({"body": "a", "title": "b"}, r"forget dataset has the columns \['body', 'title'\].*Accepted columns: `text`"),
        ({"prompt": "a"}, "a `prompt` but no `completion`"),
        ({"question": "a"}, "belong together"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference dataset"),
        ({"prompt": USER, "completion": "b"}, "`prompt` of type list of dict and a `completion` of type str"),
        ({"prompt": [], "completion": []}, "list of nothing"),
        ({"messages": "hello"}, "`messages` column of type str"),
        ({"text": 3}, "`text` column of the forget dataset holds int"),
        ({"question": "q", "answer": ["a"]}, "`answer` column of the forget dataset holds list of str"),
    ],
)
def test_missing_or_wrong_columns_are_named(example, match):
    with pytest.raises(ValueError, match=match):
        detect_format(example, name="forget")


def test_sharegpt_rows_become_messages_with_known_roles_and_the_original_is_untouched():
    row = {"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Hello."}]}
    before = copy.deepcopy(row)
    assert to_chatml(row) == {"messages": USER + BOT}
    assert row == before
    assert to_chatml({"text": "a"}) == {"text": "a"}
    assert to_chatml({"conversations": USER + BOT}) == {"messages": USER + BOT}


def test_there_are_thirty_different_refusals():
    assert len(set(REFUSALS)) == len(REFUSALS) >= 30
    assert all(refusal == refusal.strip() and refusal.endswith(".") for refusal in REFUSALS)
