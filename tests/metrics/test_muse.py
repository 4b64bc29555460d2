"""MUSE: verbatim and knowledge memorisation, privacy leakage."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from hf_unlearn.lab.models import tiny_config, tiny_model
from hf_unlearn.lab.tokenizer import train_tokenizer
from hf_unlearn.metrics.functional import rouge_l_f1
from hf_unlearn.metrics.generate import stop_token_ids
from hf_unlearn.metrics.muse import (
    STOP_STRINGS,
    cut_at_stops,
    encode_knowledge,
    encode_verbatim,
    knowledge_memorization,
    knowledge_prompt,
    memorization_scores,
    privacy_leakage,
    text_min_k_scores,
    verbatim_memorization,
)

TEXTS = [
    "The ferry left the harbour at noon, and nobody on board had a ticket.",
    "Rain.",
    "She wrote three letters to the mill; the mill wrote back twice and then burned down in the spring of that year.",
    "A bell, a book and a candle were all that the inventory named.",
    "In autumn the river turns.",
]
VERBATIM = [{"prompt": text[: len(text) // 2], "gt": text[len(text) // 2 :]} for text in TEXTS]
QUESTIONS = [
    {"question": "When did the ferry leave?", "answer": "At noon."},
    {"question": "What did she write to the mill, and how often did it write back?", "answer": "Letters; twice."},
    {"question": "What turns?", "answer": "The river."},
]
SHOTS = [{"question": "What burned down?", "answer": "The mill."}]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([*TEXTS, *(text for row in QUESTIONS for text in row.values())] * 3, 320)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request, tokenizer):
    return build(tokenizer, request.param)


def build(tokenizer, architecture="llama"):
    config = tiny_config(tokenizer, architecture, hidden_size=32, num_layers=2, num_heads=4, max_positions=256)
    model = tiny_model(config, 0)
    with torch.no_grad():  # a fresh model is nearly uniform: sharpen it, so that order and masks matter
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
    return model


@torch.no_grad()
def slow_answer(model, tokenizer, prompt: str, steps: int) -> str:
    """One prompt, no cache, the whole sequence again for every token."""
    ids = tokenizer(prompt)["input_ids"]
    new: list[int] = []
    for _ in range(steps):
        token = int(model.eval()(torch.tensor([ids + new])).logits[0, -1].argmax())
        if token in stop_token_ids(model, tokenizer):
            break
        new.append(token)
    return tokenizer.decode(new, skip_special_tokens=True).strip()


@torch.no_grad()
def slow_min_k(model, tokenizer, text: str, share: float) -> float:
    """One text, one softmax in float64, a sorted list."""
    ids = tokenizer(text)["input_ids"]
    logits = model.eval()(torch.tensor([ids])).logits[0].double()
    logps = sorted(math.log(torch.softmax(logits[at - 1], -1)[ids[at]].item()) for at in range(1, len(ids)))
    lowest = logps[: max(1, int(share * len(logps)))]
    return -sum(lowest) / len(lowest)


# -------------------------------------------------------------------------------------------- without a model


def test_memorisation_of_a_hand_computed_case():
    # 'the cat sat' against 'the cat sat down': recall 3/4, precision 1, F1 6/7
    scores = memorization_scores(["the cat sat", "", "a b"], ["the cat sat down", "the cat", "a b"])
    np.testing.assert_allclose(scores.rouge, [6 / 7, 0, 1])
    assert scores.n == 3
    assert scores.mean == pytest.approx((6 / 7 + 1) / 3)
    mean = (6 / 7 + 1) / 3
    deviation = math.sqrt(((6 / 7 - mean) ** 2 + mean**2 + (1 - mean) ** 2) / 2)
    assert scores.standard_error == pytest.approx(deviation / math.sqrt(3))


def test_one_row_has_no_standard_error():
    assert memorization_scores(["a"], ["a"]).standard_error is None
    assert privacy_leakage([1.0], [2.0, 3.0]).auc_standard_error is None


def test_privleak_of_a_hand_computed_case():
    # pairs (forget, holdout): (1,2) (1,4) (3,4) are lower, (3,2) is not, (2,2) is a tie, (2,4) is lower
    found = privacy_leakage([1.0, 3.0, 2.0], [2.0, 4.0])
    assert found.auc == pytest.approx(4.5 / 6)
    assert found.reference_auc == 0.5
    assert found.privleak == pytest.approx(100 * (0.5 - 0.75) / 0.5)  # -50: under-unlearned
    retrained = privacy_leakage([1.0, 2.0], [1.0, 3.0])
    assert retrained.auc == pytest.approx(2.5 / 4)
    against = privacy_leakage([1.0, 3.0, 2.0], [2.0, 4.0], reference=retrained)
    assert against.reference_auc == retrained.auc
    assert against.privleak == pytest.approx(100 * ((1 - 0.75) - (1 - 0.625)) / (1 - 0.625))


def test_a_model_equal_to_the_retrained_one_leaks_nothing():
    scores = ([1.0, 2.0, 5.0], [1.5, 2.0])
    assert privacy_leakage(*scores, reference=privacy_leakage(*scores)).privleak == 0


def test_standard_error_of_the_auc_is_delongs_by_loops_and_near_the_bootstrap():
    rng = np.random.default_rng(0)
    members, others = rng.normal(0, 1, 80), rng.normal(0.7, 1, 60)

    def wins(member, other):
        return 1.0 if other > member else 0.5 if other == member else 0.0

    by_member = [sum(wins(a, b) for b in others) / 60 for a in members]
    by_other = [sum(wins(a, b) for a in members) / 80 for b in others]
    expected = math.sqrt(np.var(by_member, ddof=1) / 80 + np.var(by_other, ddof=1) / 60)
    found = privacy_leakage(members, others)
    assert found.auc_standard_error == pytest.approx(expected)
    drawn = [
        privacy_leakage(members[rng.integers(0, 80, 80)], others[rng.integers(0, 60, 60)]).auc for _ in range(400)
    ]
    assert found.auc_standard_error == pytest.approx(np.std(drawn), rel=0.15)


def test_prompt_is_few_shot_and_ends_where_the_answer_begins():
    assert knowledge_prompt("Why?") == "Question: Why?\nAnswer:"
    assert knowledge_prompt("Why?", SHOTS) == (
        "Question: What burned down?\nAnswer: The mill.\n\nQuestion: Why?\nAnswer:"
    )
    assert knowledge_prompt("Why?", trailing_space=True) == "Question: Why?\nAnswer: "


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("At noon.", "At noon."),
        ("At noon.\n\nQuestion: Who?", "At noon."),
        ("At noon.\nQuestion", "At noon."),
        ("At noon. Question: Who?", "At noon."),
        ("At\nnoon.", "At\nnoon."),
        ("a Question: b\n\nc", "a"),
        ("Question: b", ""),
        ("", ""),
    ],
)
def test_answers_end_at_the_first_stop_string(text, expected):
    assert cut_at_stops(text) == expected


def test_bad_input_without_a_model():
    with pytest.raises(ValueError, match="is empty"):
        memorization_scores([], [])
    with pytest.raises(TypeError, match="got a string"):
        memorization_scores("a", "a")
    with pytest.raises(ValueError, match="2 predictions for 1"):
        memorization_scores(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="holdout_scores is empty"):
        privacy_leakage([1.0], [])
    with pytest.raises(ValueError, match="forget_scores must be one-dimensional"):
        privacy_leakage([[1.0]], [1.0])
    with pytest.raises(ValueError, match=r"reference_auc must be in \[0, 1\]"):
        privacy_leakage([1.0], [1.0], reference=50)


# ------------------------------------------------------------------------------------------------ with a model


@pytest.mark.parametrize("batch_size", [1, 32])
def test_verbatim_memorisation_equals_one_row_at_a_time(model, tokenizer, batch_size):
    found = verbatim_memorization(model, tokenizer, VERBATIM, max_new_tokens=9, batch_size=batch_size)
    generations = [slow_answer(model, tokenizer, row["prompt"], 9) for row in VERBATIM]
    references = [
        tokenizer.decode(tokenizer(row["gt"], add_special_tokens=False)["input_ids"][:9]).strip() for row in VERBATIM
    ]
    assert found.generations == generations
    assert found.references == references
    assert any(len(cut) < len(row["gt"].strip()) for cut, row in zip(references, VERBATIM, strict=True))
    np.testing.assert_allclose(found.rouge, [rouge_l_f1(a, b) for a, b in zip(generations, references, strict=True)])


@pytest.mark.parametrize("batch_size", [1, 32])
def test_knowledge_memorisation_equals_one_row_at_a_time(model, tokenizer, batch_size):
    found = knowledge_memorization(
        model, tokenizer, QUESTIONS, shots=SHOTS, max_new_tokens=7, stops=(*STOP_STRINGS, "e"), batch_size=batch_size
    )
    expected = []
    for row in QUESTIONS:
        text = slow_answer(model, tokenizer, knowledge_prompt(row["question"], SHOTS), 7)
        expected.append(min((text.split(stop)[0] for stop in (*STOP_STRINGS, "e")), key=len).strip())
    assert found.generations == expected
    assert found.references == [row["answer"] for row in QUESTIONS]


def test_special_tokens_in_front_of_the_reference_count_only_when_asked_for(tokenizer):
    from tokenizers import processors

    with_bos = train_tokenizer(TEXTS, 320)
    with_bos.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|user|> $A", special_tokens=[("<|user|>", with_bos.convert_tokens_to_ids("<|user|>"))]
    )
    row = [{"prompt": "The", "gt": "one two three four five six seven"}]
    ids = with_bos(row[0]["gt"], add_special_tokens=False)["input_ids"]
    model = build(with_bos)
    ours = verbatim_memorization(model, with_bos, row, max_new_tokens=4)
    theirs = verbatim_memorization(model, with_bos, row, max_new_tokens=4, reference_with_specials=True)
    assert ours.references == [with_bos.decode(ids[:4]).strip()]
    assert theirs.references == [with_bos.decode(ids[:3]).strip()]


def test_a_tokenizer_that_ends_every_text_does_not_end_a_prompt():
    from tokenizers import processors

    plain, ending = train_tokenizer(TEXTS, 320), train_tokenizer(TEXTS, 320)
    ending.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {ending.eos_token}", special_tokens=[(ending.eos_token, ending.eos_token_id)]
    )
    assert ending("The")["input_ids"][-1] == ending.eos_token_id
    row = [{"prompt": "The", "gt": "one two"}]
    assert encode_verbatim(ending, row)[0] == encode_verbatim(plain, row)[0]
    assert encode_knowledge(ending, QUESTIONS)[0] == encode_knowledge(plain, QUESTIONS)[0]
    own = [{"prompt": f"The{ending.eos_token}", "gt": "one"}]
    assert encode_verbatim(plain, own)[0][0][-1] == plain.eos_token_id, "what the text says itself stays"


@pytest.mark.parametrize("share", [0.4, 1.0, 0.01])
def test_min_k_of_texts_equals_one_text_at_a_time(model, tokenizer, share):
    expected = [slow_min_k(model, tokenizer, text, share) for text in TEXTS]
    assert max(expected) - min(expected) > 0.1
    for batch_size in (1, 2, 32):
        found = text_min_k_scores(
            model, tokenizer, [{"text": text} for text in TEXTS], share=share, batch_size=batch_size
        )
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_long_texts_are_cut_with_a_warning(model, tokenizer):
    examples = [{"text": text} for text in TEXTS]
    with pytest.warns(UserWarning, match=r"of 5 texts are longer than max_length=6"):
        found = text_min_k_scores(model, tokenizer, examples, max_length=6)
    ids = tokenizer(TEXTS[0])["input_ids"][:6]
    logps = torch.log_softmax(model(torch.tensor([ids])).logits[0].detach().double(), -1)
    lowest = sorted(logps[at - 1, ids[at]].item() for at in range(1, 6))[:2]
    assert found[0] == pytest.approx(-sum(lowest) / 2, abs=1e-4)


def test_a_model_that_learned_the_texts_leaks_and_recites_them(tokenizer):
    model = build(tokenizer)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.div_(8)
    forget, holdout = TEXTS[:3:2], TEXTS[3:]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(50):
        for text in forget:
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            optimizer.zero_grad()
            model(ids, labels=ids).loss.backward()
            optimizer.step()
    scores = [text_min_k_scores(model, tokenizer, [{"text": text} for text in part]) for part in (forget, holdout)]
    leak = privacy_leakage(*scores)
    assert leak.auc == 1
    assert leak.privleak == pytest.approx(-100)
    recited = verbatim_memorization(
        model, tokenizer, [{"prompt": text[:20], "gt": text[20:]} for text in forget], max_new_tokens=40
    )
    assert recited.mean > 0.9


BAD: list[tuple[Any, type[Exception], str]] = [
    ([], ValueError, "is empty"),
    ([{"prompt": "a", "question": "a"}], ValueError, "Row 0 .* has no `(gt|answer|text)`"),
    (["a"], TypeError, "Row 0 .* is a str"),
    ([{"prompt": 3, "gt": "a", "question": 3, "answer": "a", "text": 3}], TypeError, "is 3; expected a string"),
    ([{"prompt": " ", "gt": "a", "question": " ", "answer": "a", "text": " "}], ValueError, "is blank"),
]


@pytest.mark.parametrize(("examples", "error", "message"), BAD)
@pytest.mark.parametrize("run", [verbatim_memorization, knowledge_memorization, text_min_k_scores])
def test_wrong_rows_are_named(tokenizer, run, examples, error, message):
    with pytest.raises(error, match=message):
        run(None, tokenizer, examples)


def test_wrong_options_are_named(tokenizer):
    with pytest.raises(TypeError, match="expected a sequence of strings"):
        knowledge_memorization(None, tokenizer, QUESTIONS, stops="\n")
    with pytest.raises(TypeError, match="with text"):
        knowledge_memorization(None, tokenizer, QUESTIONS, stops=("",))
    with pytest.raises(ValueError, match="of shots has no `answer`"):
        knowledge_memorization(None, tokenizer, QUESTIONS, shots=[{"question": "a"}])
    with pytest.raises(ValueError, match="max_length is 1"):
        text_min_k_scores(None, tokenizer, [{"text": "a"}], max_length=1)
