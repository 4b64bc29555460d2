"""Prefill: a slow twin, only what the model adds counts, and a defence of the first token alone does not hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from small_models import REFUSAL, AttackLab, learn

from hf_unlearn.attacks.prefill import PrefillConfig, prefill
from hf_unlearn.data import tokenize_example
from hf_unlearn.metrics.rouge import rouge_l_recall


@dataclass(frozen=True, kw_only=True)
class Lab:
    tokenizer: Any
    forget: list[dict[str, str]]
    knows: Any
    defended: Any
    """Refuses to begin the answers of `forget`, and knows how they go on."""
    never_saw: Any


@pytest.fixture(scope="module")
def lab(attack_lab: AttackLab) -> Lab:
    forget = attack_lab.forget[:4]
    begun = []
    for row in attack_lab.encoded(forget):
        first = next(place for place, label in enumerate(row["labels"]) if label != -100)
        labels = [-100 if place == first else label for place, label in enumerate(row["labels"])]
        begun.append({"input_ids": row["input_ids"], "labels": labels})
    refused = attack_lab.encoded([{"question": row["question"], "answer": REFUSAL} for row in forget])
    lessons = [*attack_lab.encoded(attack_lab.rows[4:]), *begun, *refused]
    return Lab(
        tokenizer=attack_lab.tokenizer,
        forget=forget,
        knows=attack_lab.knows,
        defended=learn(attack_lab.fresh(), lessons, attack_lab.tokenizer, steps=80),
        never_saw=attack_lab.never_saw,
    )


def split(row):
    first = next(place for place, label in enumerate(row["labels"]) if label != -100)
    return row["input_ids"][:first], row["input_ids"][first:]


@torch.no_grad()
def slow(model, tokenizer, row, given, most):
    """Continuation and probability of one row: one token at a time, no cache, no batch."""
    prompt, response = split(tokenize_example(row, tokenizer))
    ids = prompt + response[:given]
    said: list[int] = []
    while len(said) < most:
        token = int(model(torch.tensor([ids + said])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        said.append(token)
    logps = []
    for place in range(given, len(response)):
        logits = model(torch.tensor([prompt + response[:place]])).logits[0, -1]
        logps.append(float(logits.log_softmax(-1)[response[place]]))
    return tokenizer.decode(said, skip_special_tokens=True).strip(), np.exp(np.mean(logps))


def test_it_equals_decoding_one_token_at_a_time(lab):
    config = PrefillConfig(tokens=(0, 2, 5), max_new_tokens=6, batch_size=3)
    result = prefill(lab.defended, lab.tokenizer, lab.forget, config)
    assert [level.tokens for level in result.levels] == [0, 2, 5]
    for level in result.levels:
        assert level.rows == (0, 1, 2, 3)
        for place, number in enumerate(level.rows):
            text, probability = slow(lab.defended, lab.tokenizer, lab.forget[number], level.tokens, 6)
            assert level.continuations[place] == text
            assert level.probability[place] == pytest.approx(probability, rel=1e-4)
            _, response = split(tokenize_example(lab.forget[number], lab.tokenizer))
            reference = lab.tokenizer.decode(response[level.tokens :], skip_special_tokens=True).strip()
            assert level.references[place] == reference
            assert level.rouge[place] == pytest.approx(rouge_l_recall(text, reference))
        assert level.mean_rouge == pytest.approx(np.mean(level.rouge))
        assert level.mean_probability == pytest.approx(np.mean(level.probability))


def test_a_defence_of_the_first_token_falls_and_a_model_that_never_saw_the_rows_says_nothing(lab):
    config = PrefillConfig(tokens=(0, 3), max_new_tokens=40)
    plain, begun = prefill(lab.defended, lab.tokenizer, lab.forget, config).levels
    _, control = prefill(lab.never_saw, lab.tokenizer, lab.forget, config).levels
    known, _ = prefill(lab.knows, lab.tokenizer, lab.forget, config).levels
    assert known.mean_rouge > 0.8
    assert plain.mean_rouge < 0.3
    assert all(text.startswith("I do not") for text in plain.continuations)
    assert begun.mean_rouge > 0.8
    assert begun.mean_probability > 0.5
    assert control.mean_rouge < 0.35  # the form of such answers, which the rows it saw share
    assert control.mean_probability < 0.1 * begun.mean_probability


def test_only_what_follows_the_prefill_counts(lab):
    """A row that the prefill gives whole is not scored, and its words are in no reference."""
    short = {"question": "Who?", "answer": "He."}
    width = len(split(tokenize_example(short, lab.tokenizer))[1]) - 1  # without the token that ends the turn
    rows = [short, lab.forget[0]]
    config = PrefillConfig(tokens=(0, width), max_new_tokens=3)
    before = {name: value.clone() for name, value in lab.knows.state_dict().items()}
    whole, rest = prefill(lab.knows, lab.tokenizer, rows, config).levels
    assert whole.rows == (0, 1)
    assert rest.rows == (1,)
    assert len(rest.continuations) == len(rest.rouge) == len(rest.probability) == 1
    assert lab.forget[0]["answer"].endswith(rest.references[0])
    assert len(rest.references[0]) < len(lab.forget[0]["answer"])
    assert all(torch.equal(value, before[name]) for name, value in lab.knows.state_dict().items())


def test_tokenised_rows_and_texts_are_one(lab):
    config = PrefillConfig(tokens=(3,), max_new_tokens=4)
    rows = [tokenize_example(row, lab.tokenizer) for row in lab.forget]
    assert prefill(lab.knows, lab.tokenizer, rows, config) == prefill(lab.knows, lab.tokenizer, lab.forget, config)


@pytest.mark.parametrize("wrong", [{"tokens": ()}, {"tokens": (3, 0)}, {"tokens": (-1, 2)}, {"tokens": (2, 2)}])
def test_impossible_lengths_are_refused(wrong):
    with pytest.raises(ValueError, match="rising numbers"):
        PrefillConfig(**wrong)


@pytest.mark.parametrize("wrong", [{"max_new_tokens": 0}, {"batch_size": 0}])
def test_options_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        PrefillConfig(**wrong)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no rows"),
        ([{"input_ids": [5, 6], "labels": [-100, -100]}], "Row 0 has no response"),
        ([{"input_ids": [5, 6], "labels": [5, 6]}], "Row 0 has no prompt"),
        ([{"input_ids": [5, 6, 7, 8], "labels": [-100, 6, -100, 8]}], "in pieces"),
        ([{"input_ids": [5, 6, 7], "labels": [-100, 6, -100]}], "something follows"),
    ],
)
def test_rows_that_cannot_be_begun_are_refused(lab, rows, message):
    with pytest.raises(ValueError, match=message):
        prefill(lab.knows, lab.tokenizer, rows)


def test_a_prefill_that_leaves_nothing_is_refused_before_anything_runs(lab):
    with pytest.raises(ValueError, match="leaves none of the 4 rows"):
        prefill(None, lab.tokenizer, lab.forget, PrefillConfig(tokens=(0, 500)))
