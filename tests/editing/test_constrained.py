"""Plan, apply and verify in one call: what is reported is the edited model, and a failure leaves nothing behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel
from planned import same, state
from small_lab import SmallLab
from test_plan_edit import QUICK, largest_demand, measured_retain, plan_of, word_probabilities

from hf_unlearn.attacks.refusal import is_refusal
from hf_unlearn.editing import EditConfig, EditResult, constrained, constrained_edit, settled
from hf_unlearn.editing.edit_rows import prompt_of
from hf_unlearn.metrics.generate import greedy


def edit(lab: SmallLab, model: Any, changes: dict[str, Any] | None = None, **options: Any) -> EditResult:
    config = EditConfig(**{**QUICK, **(changes or {})})
    shared: dict[str, Any] = {"retain_dataset": lab.retain, "progress": False, **options}
    return constrained_edit(model, lab.tokenizer, lab.forget, config, **shared)


@pytest.mark.parametrize("how", ["adapter", "merge"])
def test_the_edited_model_keeps_the_promise_and_undo_is_exact(lab: SmallLab, how: str) -> None:
    model = lab.model()
    before = state(model)
    result = edit(lab, model, merge=how == "merge")
    assert isinstance(result.model, PeftModel) == (how == "adapter")
    largest = largest_demand(result.model, result.plan)
    assert max(word_probabilities(result.model, lab)) <= largest <= 1e-4 * 1.001
    measures = result.plan.measures
    assert measures["constrained"]["after"] == pytest.approx(largest, rel=1e-3)
    assert measures["retain_probability"]["after"] == pytest.approx(measured_retain(result.model, lab), rel=1e-4)
    assert measures["realised"] == pytest.approx({"2": 1.0}, abs=1e-4)
    assert measures["said"] == {"rows": 6, "before": measures["said"]["before"], "after": 0}
    assert measures["pairs"] == plan_of(lab).measures["pairs"], "what was planned is kept beside"
    assert result.applied.undo() is model
    same(before, state(model))
    assert min(word_probabilities(model, lab)) > 0.5


def test_a_merge_into_bfloat16_is_measured_as_it_is(lab: SmallLab, monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[str] = []
    monkeypatch.setattr(settled.logger, "warning", messages.append)
    model = lab.model(torch.bfloat16)
    before = state(model)
    result = edit(lab, model, {"probability": 1e-3}, merge=True)
    reach = result.plan.measures["constrained"]["after"]
    assert reach == pytest.approx(largest_demand(model, result.plan), rel=0.2)  # other batches, in bfloat16
    assert result.plan.measures["realised"] == {str(k): v for k, v in result.applied.realised.items()}
    assert result.applied.realised[2] != 1.0
    assert result.applied.realised[2] == pytest.approx(1.0, abs=0.2)
    assert reach <= 1e-3 * 1.001 or "Rounding eats a part" in messages[-1]
    result.applied.undo()
    same(before, state(model))


def test_an_adapter_that_misses_the_probability_is_warned_of_and_not_planned_anew(
    lab: SmallLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages: list[str] = []
    monkeypatch.setattr(settled.logger, "warning", messages.append)
    verify = constrained.verify_plan

    def missed(*given: Any, **options: Any) -> dict[str, Any]:
        found = verify(*given, **options)
        found["constrained"]["after"] = 2e-3
        return found

    monkeypatch.setattr(constrained, "verify_plan", missed)
    model = lab.model()
    result = edit(lab, model, {"probability": 1e-3, "variants": 0, "max_new_tokens": 1})
    assert [text for text in messages if "above the wanted 0.001" in text] == messages[-1:]
    assert not any("planning anew" in text or "Rounding" in text for text in messages)
    assert result.plan.measures["constrained"]["after"] == 2e-3


@pytest.mark.parametrize("losses", [1, 9])
def test_what_a_merge_loses_is_planned_anew_up_to_three_times(
    lab: SmallLab, monkeypatch: pytest.MonkeyPatch, losses: int
) -> None:
    """As if rounding ate the first edits: each new plan aims lower, and only a last loss is warned of as such."""
    messages: list[str] = []
    asked: list[float] = []
    monkeypatch.setattr(settled.logger, "warning", messages.append)
    verify, plan = constrained.verify_plan, constrained.plan_edit

    def eaten(*given: Any, **options: Any) -> dict[str, Any]:
        found = verify(*given, **options)
        if len(asked) <= losses:
            found["constrained"]["after"] = 2e-3
        return found

    def planned(model: Any, tokenizer: Any, dataset: Any, config: EditConfig, **options: Any) -> Any:
        asked.append(config.probability)
        assert torch.equal(model.model.layers[1].mlp.down_proj.weight, clean), "planned on the model as it was"
        return plan(model, tokenizer, dataset, config, **options)

    monkeypatch.setattr(constrained, "verify_plan", eaten)
    monkeypatch.setattr(constrained, "plan_edit", planned)
    model = lab.model()
    before, clean = state(model), model.model.layers[1].mlp.down_proj.weight.detach().clone()
    result = edit(lab, model, {"probability": 1e-3, "variants": 0, "max_new_tokens": 1}, merge=True)
    assert asked == pytest.approx([1e-3 / 4**number for number in range(min(losses, 3) + 1)])
    assert sum("planning anew for" in text for text in messages) == min(losses, 3)
    assert ("Rounding eats a part" in messages[-1]) == (losses == 9)
    assert not torch.equal(model.model.layers[1].mlp.down_proj.weight, clean)
    result.applied.undo()
    same(before, state(model))


def test_a_loss_that_no_lower_plan_makes_good_is_refused_and_the_model_stays(
    lab: SmallLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    verify = constrained.verify_plan

    def eaten(*given: Any, **options: Any) -> dict[str, Any]:
        found = verify(*given, **options)
        found["constrained"]["after"] = 0.9
        return found

    monkeypatch.setattr(constrained, "verify_plan", eaten)
    model = lab.model()
    before = state(model)
    with pytest.raises(ValueError, match=r"Merged into float32, the edit leaves a word a probability of 0\.9"):
        edit(lab, model, {"probability": 1e-4, "variants": 0, "max_new_tokens": 1}, merge=True)
    same(before, state(model))


@pytest.mark.parametrize(("how", "fails_at"), [("adapter", 1), ("merge", 1), ("merge", 4)])
def test_a_failing_verification_undoes_the_edit(
    lab: SmallLab, monkeypatch: pytest.MonkeyPatch, how: str, fails_at: int
) -> None:
    verify, calls = constrained.verify_plan, list[int]()

    def broken(*given: Any, **options: Any) -> dict[str, Any]:
        calls.append(1)
        if len(calls) == fails_at:
            raise KeyboardInterrupt
        found = verify(*given, **options)
        found["constrained"]["after"] = 2e-2
        return found

    monkeypatch.setattr(constrained, "verify_plan", broken)
    model = lab.model()
    before = state(model)
    with pytest.raises(KeyboardInterrupt):
        edit(lab, model, {"probability": 1e-2, "variants": 0, "max_new_tokens": 1}, merge=how == "merge")
    assert len(calls) == fails_at
    same(before, state(model))


def test_attacks_are_judged_before_and_after_on_the_right_answers(lab: SmallLab) -> None:
    model, tokenizer = lab.model(), lab.tokenizer
    attacks = [{"prompt": [{"role": "user", "content": row["question"]}]} for row in lab.forget]
    prompts = [prompt_of(row) for row in lab.rows()]
    seen: list[tuple[str, str]] = []

    def judge(prompt: str, answer: str) -> bool:
        seen.append((prompt, answer))
        return "laundry" in answer or "father" in answer

    changes = {"max_new_tokens": 48, "token": "first"}
    found = edit(lab, model, changes, attack_dataset=attacks, judge=judge)
    texts = {}
    with found.model.disable_adapter():
        texts["before"] = greedy(found.model, tokenizer, prompts, max_new_tokens=48)
    texts["after"] = greedy(found.model, tokenizer, prompts, max_new_tokens=48)
    attack = found.plan.measures["attack"]
    assert attack["prompts"] == 6
    for name, answers in texts.items():
        assert attack["success"][name] == sum("laundry" in text or "father" in text for text in answers)
        assert attack["refused"][name] == sum(map(is_refusal, answers))
    assert attack["success"]["before"] == 3 != attack["success"]["after"], "which of the two it was shows"
    assert [prompt for prompt, _ in seen[:6]] == [tokenizer.decode(ids, skip_special_tokens=True) for ids in prompts]
    assert [answer for _, answer in seen[:6]] == texts["before"]
    assert [answer for _, answer in seen[-6:]] == texts["after"]
    assert "laundry" not in str(found.plan.as_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"as_adapter": True, "merge": True}, "expected exactly one"), ({"adapter_name": "a.b"}, "adapter")],
)
def test_what_cannot_be_applied_leaves_the_model_as_it_was(lab: SmallLab, options: Any, message: str) -> None:
    model = lab.model()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        edit(lab, model, {"variants": 0}, **options)
    same(before, state(model))
