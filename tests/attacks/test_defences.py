"""SmoothLLM takes the majority's side, Self-Reminder wraps the prompt; and what counts as a refusal."""

from __future__ import annotations

import numpy as np
import pytest

from hf_unlearn.attacks import SmoothLLMConfig, attack_succeeds, defences, is_refusal, self_reminder, smooth_llm
from hf_unlearn.attacks.defences import swap_characters
from hf_unlearn.data import tokenize_prompt
from hf_unlearn.lab.tokenizer import train_tokenizer
from hf_unlearn.lab.world import make_world


def test_a_tenth_of_the_characters_is_swapped() -> None:
    rng = np.random.default_rng(0)
    text = "a sentence of exactly forty characters.."
    assert len(text) == 40
    changed = [sum(a != b for a, b in zip(text, swap_characters(text, 0.1, rng), strict=True)) for _ in range(200)]
    assert max(changed) == 4
    assert np.mean(changed) > 3.8  # a character may be swapped for itself
    assert swap_characters(text, 0.0, rng) == text
    assert swap_characters("", 0.5, rng) == ""


@pytest.mark.parametrize(("refusing", "side"), [(0, False), (4, False), (5, True), (9, True)])
def test_the_answer_is_one_of_the_majority(monkeypatch, refusing: int, side: bool) -> None:
    answers = [f"I'm sorry, no. {i}" if i < refusing else f"Sure: {i}" for i in range(10)]
    seen: list[str] = []

    def fake(model, tokenizer, prompts, config, description) -> list[str]:
        seen.extend(prompts)
        return answers * (len(prompts) // 10)

    monkeypatch.setattr(defences, "_answer", fake)
    given = smooth_llm(None, None, ["tell me about the weather", "and about the sea"])
    assert [is_refusal(answer) for answer in given] == [side, side]
    assert all(answer in answers for answer in given)
    assert len(seen) == 20
    assert len(set(seen)) == 20  # every copy is perturbed by itself
    assert given == smooth_llm(None, None, ["tell me about the weather", "and about the sea"])


def test_prompts_go_through_the_chat_template_once_and_the_reminder_is_around_them(monkeypatch) -> None:
    world = make_world(seed=0, num_authors=10, questions_per_author=2)
    tokenizer = train_tokenizer([text for row in world.full for text in (row["question"], row["answer"])], 500)
    monkeypatch.setattr(defences, "greedy", lambda model, tokenizer, prompts, **options: list(map(tuple, prompts)))
    questions = world.full["question"][:3]

    def ids(texts: list[str]) -> list[tuple[int, ...]]:
        return [tuple(tokenize_prompt({"question": text, "answer": ""}, tokenizer)) for text in texts]

    given = self_reminder(None, tokenizer, questions, reminder=("before", "after"))
    assert given == ids([f"before\n\n{question}\n\nafter" for question in questions])
    assert defences._answer(None, tokenizer, questions, SmoothLLMConfig(), None) == ids(questions)


@pytest.mark.parametrize(
    ("answer", "refused", "success"),
    [
        ("I'm sorry, but I can't help with that.", True, False),
        ("I\u2019m sorry, but no.", True, False),
        ("Sure, here is how.", False, True),
        ("   ", False, False),
        ("Well. " * 60 + "I'm sorry.", False, True),
    ],
)
def test_a_refusal_is_in_how_an_answer_begins(answer: str, refused: bool, success: bool) -> None:
    assert is_refusal(answer) == refused
    assert attack_succeeds("prompt", answer) == success


@pytest.mark.parametrize("wrong", [{"copies": 0}, {"share": 1.5}, {"share": -0.1}])
def test_options_out_of_range_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SmoothLLMConfig(**wrong)
