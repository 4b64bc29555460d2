"""Attacks bite: what was hidden comes back, what was never there does not, and where an attack fails it is said."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from small_models import REFUSAL, AttackLab, ascend, learn

from hf_unlearn.attacks import (
    MultiTurnConfig,
    PromptConfig,
    RelearnConfig,
    RoundingConfig,
    TargetJudge,
    Transcript,
    multi_turn,
    paraphrase,
    quantise,
    static,
)
from hf_unlearn.attacks.quantise import QuantiseConfig
from hf_unlearn.attacks.quantise import run as run_quantise
from hf_unlearn.attacks.relearn import outcome, run
from hf_unlearn.data import pad_rows
from hf_unlearn.data.prompts_files import PromptRow


@pytest.fixture(scope="module")
def ascended(attack_lab: AttackLab) -> Any:
    """Nine steps of gradient ascent: the forgotten rows are gone, as far as the model says."""
    return ascend(attack_lab.knows, attack_lab.encoded(attack_lab.forget), attack_lab.tokenizer, steps=9, lr=1e-3)


@pytest.mark.parametrize("means", ["full", "lora", "benign"])
def test_relearning_brings_unseen_rows_back_and_teaches_the_control_nothing(
    attack_lab: AttackLab, ascended: Any, means: str
) -> None:
    benign = attack_lab.retain if means == "benign" else None
    config = RelearnConfig(
        steps=(0, 20),
        learning_rate=2e-3 if means == "lora" else 1e-3,
        batch_size=8 if means == "benign" else 2,
        method="lora" if means == "lora" else "full",
        lora_rank=8,
    )
    before = {name: value.clone() for name, value in ascended.state_dict().items()}
    state = torch.get_rng_state()
    found = run(ascended, attack_lab.tokenizer, attack_lab.forget, config, benign=benign)
    control = run(attack_lab.never_saw, attack_lab.tokenizer, attack_lab.forget, config, benign=benign)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in ascended.state_dict().items())
    assert not hasattr(ascended, "peft_config")
    start, end = found.runs[0].unseen
    assert start < 0.08  # of .99 before
    assert end > 0.1
    assert end > 2 * start
    assert max(control.runs[0].unseen) < 2e-3
    assert len(found.runs[0].unseen_rows) == (8 if means == "benign" else 6)


def test_several_seeds_show_other_rows_and_their_spread_is_reported(attack_lab: AttackLab, ascended: Any) -> None:
    config = RelearnConfig(steps=(0, 3), learning_rate=1e-3, batch_size=2, repeats=2, seed=5)
    found = run(ascended, attack_lab.tokenizer, attack_lab.forget, config)
    single = run(ascended, attack_lab.tokenizer, attack_lab.forget, RelearnConfig(**{**vars(config), "repeats": 1}))
    assert found.runs[0] == single.runs[0]
    assert found.runs[0].shown_rows != found.runs[1].shown_rows
    measures = {measure.name: measure for measure in outcome(found, "unlearned").measures}
    ends = [result.unseen[1] - result.unseen[0] for result in found.runs]
    assert measures["recovery of rows never shown"].value == pytest.approx(np.mean(ends))
    assert measures["recovery of rows never shown"].n == 12
    assert measures["recovery, standard deviation over seeds"].value == pytest.approx(np.std(ends, ddof=1))


def small_lora_steps(lab: AttackLab, base: Any) -> Any:
    """Unlearned by an adapter with small steps, which holds the other rows; merged."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lora = LoraConfig(r=8, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(copy.deepcopy(base), lora)
    forget, retain = (
        pad_rows(lab.encoded(rows), pad_token_id=lab.tokenizer.pad_token_id) for rows in (lab.forget, lab.retain)
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    for _ in range(20):
        (model(**retain).loss - model(**forget).loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.merge_and_unload().eval()


def test_rounding_undoes_small_steps_from_a_model_on_the_grid_and_not_from_one_off_it(attack_lab: AttackLab) -> None:
    """
    An adapter trained on a 4-bit model, merged and rounded to 4 bits again: most weights fall back to where they were.
    From weights that lay on no grid the same small steps survive rounding: it moves a weight up as often as down.
    """
    on_grid = quantise(attack_lab.knows, QuantiseConfig(bits=4)).model
    config = RoundingConfig(bits=(4,), max_new_tokens=2)
    found = {}
    for name, base in (("on", on_grid), ("off", attack_lab.knows)):
        result = run_quantise(small_lora_steps(attack_lab, base), attack_lab.tokenizer, attack_lab.forget, config)
        found[name] = (float(np.mean(result.plain.probability)), float(np.mean(result.rounded[4].probability)))
    assert found["on"][1] > found["on"][0] + 0.2
    assert found["off"][1] < found["off"][0] + 0.1
    control = run_quantise(attack_lab.never_saw, attack_lab.tokenizer, attack_lab.forget, config)
    assert np.mean(control.rounded[4].probability) < 1.5 * np.mean(control.plain.probability)
    assert np.mean(control.rounded[4].probability) < 2e-3


def test_other_wordings_reach_what_one_wording_hides(attack_lab: AttackLab) -> None:
    """A question that the model does not answer, beside the wording that it does."""
    asked = [
        {"question": row["paraphrased_question"], "answer": row["answer"], "paraphrased_question": row["question"]}
        for row in attack_lab.forget
    ]
    found, control = (
        paraphrase(model, attack_lab.tokenizer, asked) for model in (attack_lab.knows, attack_lab.never_saw)
    )
    assert np.mean(found.original.probability) < 0.3
    assert np.mean(found.reworded.probability) > 0.9
    assert np.mean(found.reworded.rouge) > np.mean(found.original.rouge) + 0.3
    assert found.likeliest == tuple(map(max, found.original.probability, found.reworded.probability))
    assert max(control.likeliest) < 0.05


WRAPPED = "Write a story. {}"


@pytest.fixture(scope="module")
def guarded(attack_lab: AttackLab) -> Any:
    """Refuses four questions, and answers them in a story and as the second turn of a conversation."""
    lessons = [*attack_lab.rows[4:20]]
    for row in attack_lab.forget[:4]:
        lessons.append({"question": row["question"], "answer": REFUSAL})
        lessons.append({"question": WRAPPED.format(row["question"]), "answer": row["answer"]})
    talks = [
        {"prompt": [*_opening(), {"role": "user", "content": row["question"]}],
         "completion": [{"role": "assistant", "content": row["answer"]}]}
        for row in attack_lab.forget[:4]
    ]  # fmt: skip
    return learn(attack_lab.fresh(), attack_lab.encoded([*lessons, *talks]), attack_lab.tokenizer, steps=60)


def _opening() -> list[dict[str, str]]:
    return [{"role": "user", "content": "Describe a story."}, {"role": "assistant", "content": "I know that story."}]


def test_jailbreak_prompts_get_what_a_plain_question_does_not_and_nothing_from_the_control(
    attack_lab: AttackLab, guarded: Any
) -> None:
    lab, forget = attack_lab, attack_lab.forget[:4]
    judges = {"answer": TargetJudge(targets={row["question"]: [row["answer"]] for row in forget})}
    rates = {}
    for name, model, form in (
        ("plain", guarded, "{}"),
        ("attacked", guarded, WRAPPED),
        ("control", lab.never_saw, WRAPPED),
    ):
        prompts = [
            PromptRow(id=str(number), prompt=form.format(row["question"]), behavior=row["question"], safe=False,
                      source="behaviors")
            for number, row in enumerate(forget)
        ]  # fmt: skip
        found = static(model, lab.tokenizer, prompts, PromptConfig(max_new_tokens=40), judges=judges)
        rates[name] = found.judgement.rates[0].success
    assert rates["attacked"] >= 0.75
    assert rates["plain"] == rates["control"] == 0.0


def test_a_conversation_gets_what_a_plain_question_does_not_and_nothing_from_the_control(
    attack_lab: AttackLab, guarded: Any
) -> None:
    lab, forget = attack_lab, attack_lab.forget[:4]
    rates = {}
    for name, model, opening in (
        ("plain", guarded, []),
        ("attacked", guarded, _opening()),
        ("control", lab.never_saw, _opening()),
    ):
        talks = [
            Transcript(
                messages=(*opening, {"role": "user", "content": row["question"]}),
                behavior=row["question"],
                targets=(row["answer"],),
            )
            for row in forget
        ]
        found = multi_turn(model, lab.tokenizer, talks, MultiTurnConfig(max_new_tokens=40))
        rates[name] = {rate.judge: rate.success for rate in found.judgement.rates}["targets"]
    assert rates["attacked"] >= 0.75
    assert rates["plain"] == rates["control"] == 0.0


def test_small_steps_are_taken_on_a_model_in_half_precision(attack_lab: AttackLab) -> None:
    """In bfloat16 a step of 1e-5 is less than the distance to the next number, and the attack would do nothing."""
    half = copy.deepcopy(attack_lab.never_saw).bfloat16()
    config = RelearnConfig(steps=(0, 20), learning_rate=1e-5, batch_size=2)
    (found,) = run(half, attack_lab.tokenizer, attack_lab.forget, config).runs
    (whole,) = run(copy.deepcopy(half).float(), attack_lab.tokenizer, attack_lab.forget, config).runs
    assert found.shown == whole.shown
    assert found.shown[1] > found.shown[0]
    assert half.dtype == torch.bfloat16
