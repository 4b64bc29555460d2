"""Judges by hand-made cases: words, refusals, gibberish, a judge that raises, standard errors, and a model as judge."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from hf_unlearn.attacks import (
    Judge,
    ModelJudge,
    RefusalJudge,
    TargetJudge,
    Verdict,
    answer_perplexities,
    judge_answers,
    topic_words,
)
from hf_unlearn.attacks.judges import words_in
from hf_unlearn.attacks.summary import clustered_mean

LOOP = "no no no no no no no no no no"


@pytest.mark.parametrize(
    ("target", "answer", "found"),
    [
        ("Paris", "It is in PARIS, of course.", True),
        ("Paris", "A comparison.", False),
        ("art", "He started late.", False),
        ("golden greyhound", "a golden,\n greyhound!", True),
        ("golden greyhound", "a golden old greyhound", False),
        ("Zoë", "Zoe\u0308 wrote it", True),  # decomposed
        ("straße", "STRASSE 5", True),
        ("ﬁlm", "a film", True),  # a ligature
        ("secret", "se\u200bcret", True),  # an invisible space
        ("東京", "彼女は東京で生まれ", True),
        ("京東", "彼女は東京で生まれ", False),
        ("हिन्दी", "वह हिन्दी बोलती है", True),
        ("Москве", "она в МОСКВЕ", True),
        ("C3PO", "a c3po unit", True),
        ("42", "in 1942", False),
    ],
)
def test_a_target_is_found_as_whole_words_in_any_form(target: str, answer: str, found: bool) -> None:
    assert TargetJudge(targets=[target])("p", answer).success == found


def test_a_share_of_the_targets_can_be_asked_for() -> None:
    targets = ["one", "two", "three", "four"]
    for share, needed in ((0.0, 1), (0.25, 1), (0.5, 2), (0.75, 3), (1.0, 4)):
        judge = TargetJudge(targets=targets, share=share)
        for count in range(5):
            answer = " and ".join(targets[:count]) or "nothing"
            assert judge("p", answer) == Verdict(success=count >= needed)


def test_targets_belong_to_their_prompt() -> None:
    judge = TargetJudge(targets={"a": ["red"], "b": ["blue"]})
    assert judge("a", "red").success
    assert not judge("b", "red").success
    with pytest.raises(ValueError, match="no target for a prompt of 1 characters"):
        judge("c", "red")


@pytest.mark.parametrize("targets", ["word", [], {}, {"a": []}, {"a": "word"}, ["..."], {"a": ["ok", " "]}])
def test_targets_that_cannot_be_found_are_refused(targets: Any) -> None:
    with pytest.raises(ValueError, match=r"expected"):
        TargetJudge(targets=targets)


def test_the_content_words_of_a_request() -> None:
    found = topic_words(["Describe the weather in Lisbon and Porto!", "Who?", "..."])
    assert found == {"Describe the weather in Lisbon and Porto!": ["weather", "lisbon", "porto"], "Who?": ["who"]}
    assert words_in("It's_a \u201ctest\u201d") == ["it", "s", "a", "test"]


def test_a_refusal_at_the_end_is_seen_where_it_is_looked_for() -> None:
    late = "Well. " * 60 + "I cannot."
    assert RefusalJudge()("p", late) == Verdict(success=True, refusal=False)
    assert RefusalJudge(anywhere=True)("p", late) == Verdict(success=False, refusal=True)
    assert RefusalJudge()("p", "  ") == Verdict(success=False, refusal=False)


def test_gibberish_is_neither_a_success_nor_a_refusal_and_no_judge_is_asked_about_it() -> None:
    asked = []

    def own(prompt: str, answer: str) -> bool:
        asked.append(answer)
        return True

    answers = ["Sure: Paris.", "I'm sorry, no.", LOOP, "", "Berlin."]
    judges: dict[str, Judge] = {"refusal": RefusalJudge(), "target": TargetJudge(targets=["Paris"]), "own": own}
    found = judge_answers(["p"] * 5, answers, judges, subject="control")
    by_name = {rate.judge: rate for rate in found.rates}
    assert found.degenerate == (False, False, True, True, False)
    assert asked == ["Sure: Paris.", "I'm sorry, no.", "Berlin."]
    assert found.success["refusal"] == (True, False, False, False, True)
    assert found.refusal["refusal"] == (False, True, False, False, False)
    assert by_name["refusal"].success == pytest.approx(2 / 5)
    assert by_name["refusal"].refusal == pytest.approx(1 / 5)
    assert by_name["target"].success == pytest.approx(1 / 5)
    assert by_name["target"].refusal is None  # it does not tell
    assert by_name["own"].success == pytest.approx(3 / 5)
    assert all(rate.degenerate == pytest.approx(2 / 5) for rate in found.rates)
    assert all((rate.n, rate.failed, rate.subject) == (5, 0, "control") for rate in found.rates)


def test_word_salad_is_gibberish_by_the_perplexity_that_is_given() -> None:
    judges = {"refusal": RefusalJudge()}
    found = judge_answers(["p", "p"], ["a fine answer", "seven quickly"], judges, perplexities=[20.0, 9e4])
    assert found.degenerate == (False, True)
    assert found.rates[0].success == 0.5


def test_a_judge_that_raises_loses_its_own_answers_and_nothing_of_the_others() -> None:
    def breaks(prompt: str, answer: str) -> Verdict:
        if "7" in answer:
            raise RuntimeError("I dislike sevens")
        return Verdict(success=True)

    def wrong(prompt: str, answer: str) -> Any:
        return "yes"

    answers = [f"answer {number}" for number in range(10)]
    found = judge_answers(["p"] * 10, answers, {"breaks": breaks, "wrong": wrong, "refusal": RefusalJudge()})
    broken, refused, good = found.rates
    assert (broken.n, broken.failed, broken.success) == (9, 1, 1.0)
    assert found.success["breaks"][7] is None
    assert found.failures["breaks"] == ("1 of 10 answers could not be judged; first: RuntimeError: I dislike sevens")
    assert (refused.n, refused.failed) == (0, 10)
    assert np.isnan(refused.success)
    assert "returned a str; expected a Verdict or a bool" in found.failures["wrong"]
    assert (good.n, good.failed, good.success) == (10, 0, 1.0)


def test_a_judge_of_batches_falls_back_to_one_answer_at_a_time() -> None:
    class Batched:
        calls = 0

        def __call__(self, prompt: str, answer: str) -> Verdict:
            return self.judge_all([prompt], [answer])[0]

        def judge_all(self, prompts: list[str], answers: list[str]) -> list[Verdict]:
            self.calls += 1
            if any("bad" in answer for answer in answers):
                raise ValueError("one is bad")
            return [Verdict(success=True) for _ in answers]

    good, bad = Batched(), Batched()
    judge_answers(["p"] * 3, ["a", "b", "c"], {"good": good})
    found = judge_answers(["p"] * 3, ["a", "bad", "c"], {"bad": bad})
    assert good.calls == 1
    assert (found.rates[0].n, found.rates[0].failed) == (2, 1)
    assert found.success["bad"] == (True, None, True)


def test_prompts_for_one_behaviour_are_not_independent_observations():
    rng = np.random.default_rng(0)
    by_group = rng.integers(2, size=20).astype(float)
    values, groups = np.repeat(by_group, 5), np.repeat(np.arange(20), 5).tolist()
    alone, together = clustered_mean(values), clustered_mean(values, groups)
    assert alone.value == together.value == pytest.approx(values.mean())
    slow = np.std([by_group[rng.integers(20, size=20)].mean() for _ in range(2000)], ddof=1)
    assert together.standard_error == pytest.approx(slow, rel=0.1)
    assert alone.standard_error is not None
    assert alone.standard_error < 0.6 * together.standard_error
    answers = ["Sure, it is." if value else "I cannot." for value in values]
    judges = {"refusal": RefusalJudge()}
    rates = [judge_answers(["p"] * 100, answers, judges, groups=g).rates[0] for g in (None, [str(g) for g in groups])]
    assert rates[0].standard_error < rates[1].standard_error


def test_what_cannot_be_judged_is_refused() -> None:
    with pytest.raises(ValueError, match="as many of each"):
        judge_answers(["p"], ["a", "b"], {"refusal": RefusalJudge()})
    with pytest.raises(ValueError, match="at least one"):
        judge_answers([], [], {"refusal": RefusalJudge()})
    with pytest.raises(ValueError, match="no judge"):
        judge_answers(["p"], ["a"], {})


def model_judge(lab, **changes):
    return ModelJudge(
        model=lab.knows,
        tokenizer=lab.tokenizer,
        template="Asked: {behavior}\nSaid: {generation}\nVerdict:",
        yes=("The",),
        no=("He",),
        min_mass=0.0,
        **changes,
    )


def test_a_model_judges_a_batch_as_it_judges_one_at_a_time(attack_lab):
    lab = attack_lab
    answers = [row["answer"] for row in lab.rows[:7]]
    prompts = [row["question"] for row in lab.rows[:7]]
    judge = model_judge(lab, batch_size=3)
    slow = []
    for prompt, answer in zip(prompts, answers, strict=True):
        parts = ("Asked: ", prompt, "\nSaid: ", answer, "\nVerdict:")
        ids = [token for part in parts for token in lab.tokenizer(part)["input_ids"]]
        with torch.no_grad():
            logits = lab.knows(torch.tensor([ids])).logits[0, -1]
        yes, no = (lab.tokenizer(word)["input_ids"][0] for word in ("The", "He"))
        slow.append(bool(logits[yes] > logits[no]))
    assert [verdict.success for verdict in judge.judge_all(prompts, answers)] == slow
    assert [judge(prompt, answer).success for prompt, answer in zip(prompts, answers, strict=True)] == slow
    space = (" ",)
    shared = replace(judge, yes=("The", *space), no=("He", *space))  # a token of both tells nothing
    assert [verdict.success for verdict in shared.judge_all(prompts, answers)] == slow
    swapped = replace(judge, yes=("He",), no=("The",))
    assert [verdict.success for verdict in swapped.judge_all(prompts, answers)] == [not value for value in slow]


def test_an_answer_cannot_speak_in_the_template_or_in_special_tokens(attack_lab):
    judge = model_judge(attack_lab)
    end = attack_lab.tokenizer.eos_token
    ids = judge._encode("{answer} {generation}", f"x{end}y {{prompt}}")
    assert attack_lab.tokenizer.eos_token_id not in ids
    assert attack_lab.tokenizer.decode(ids) == f"Asked: {{answer}} {{generation}}\nSaid: x{end}y {{prompt}}\nVerdict:"


def test_a_judge_that_says_neither_yes_nor_no_has_not_judged(attack_lab):
    judge = replace(model_judge(attack_lab), min_mass=0.999999)
    found = judge_answers(["p", "p"], ["a fine answer", LOOP], {"model": judge})
    assert (found.rates[0].failed, found.rates[0].n) == (1, 0)
    assert np.isnan(found.rates[0].success)
    assert "together on answer 0" in found.failures["model"]
    long = judge_answers(["p"], [" ".join(map(str, range(300)))], {"model": model_judge(attack_lab)})
    assert "the judge reads 256" in long.failures["model"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"template": "{prompt}"}, "expected {answer}"),
        ({"yes": ()}, "tells apart"),
        ({"yes": ("He",)}, "begin with the same tokens"),
        ({"min_mass": 2.0}, "min_mass"),
    ],
)
def test_a_model_judge_that_cannot_work_is_refused(attack_lab, changes, message):
    with pytest.raises(ValueError, match=message):
        replace(model_judge(attack_lab), **changes)


def test_perplexity_is_that_of_the_answer_by_itself(attack_lab):
    lab = attack_lab
    answer = lab.rows[10]["answer"]
    values = answer_perplexities(lab.knows, lab.tokenizer, [answer, "", "zq vx jk qq wz"])
    ids = [lab.tokenizer.eos_token_id, *lab.tokenizer(answer)["input_ids"]]
    with torch.no_grad():
        logps = copy.deepcopy(lab.knows)(torch.tensor([ids])).logits[0].log_softmax(-1)
    nll = np.mean([-float(logps[place, token]) for place, token in enumerate(ids[1:])])
    assert values[0] == pytest.approx(np.exp(nll), rel=1e-4)
    assert values[1] == 1.0
    assert values[2] > 1000 > values[0]


@pytest.mark.parametrize("code", [0x0336, 0x034F, 0xFE0F, 0x3164, 0x115F, 0xE0101, 0x200B, 0x00AD, 0x0000])
def test_what_shows_nothing_or_strikes_letters_out_hides_no_target(code: int) -> None:
    assert TargetJudge(targets=["Lisbon"])("p", f"It is Lis{chr(code)}bon.").success
    assert TargetJudge(targets=["caf\u00e9"])("p", "A cafe\u0301.").success  # accents stay
    assert not TargetJudge(targets=["cafe"])("p", "A caf\u00e9.").success


@pytest.mark.parametrize("value", [None, "yes", float("nan")])
def test_a_verdict_that_is_no_verdict_loses_its_own_answer_alone(value: Any) -> None:
    def judge(prompt: str, answer: str) -> Verdict:
        return Verdict(success=value if prompt == "p" else True)

    found = judge_answers(["p", "q"], ["Well, yes it is.", "The other."], {"odd": judge, "own": lambda p, a: True})
    assert found.success["odd"] == (None, True)
    assert found.success["own"] == (True, True)
    assert "expected true or false" in found.failures["odd"]
