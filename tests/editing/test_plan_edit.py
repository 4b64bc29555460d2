"""From words to a plan on a small trained model: what it promises holds by a forward pass, and nothing is touched."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import DatasetDict
from planned import same, state
from small_lab import SmallLab

from hf_unlearn.editing import EditConfig, EditPlan, apply_edit, passes, pcr, plan_edit, planning
from hf_unlearn.editing.added import edits_in_force
from hf_unlearn.editing.edit_rows import prompt_of
from hf_unlearn.editing.variants import with_variants
from hf_unlearn.metrics.generate import greedy

WORDS = ["greyhound", "laundry", "blacksmith"]
QUICK: dict[str, Any] = {
    "words": WORDS,
    "probability": 1e-4,
    "variants": 1,
    "generation_rounds": 0,
    "max_new_tokens": 8,
}


def plan_of(lab: SmallLab, model: Any = None, retain: Any = True, dataset: Any = None, **changes: Any) -> EditPlan:
    return plan_edit(
        lab.model() if model is None else model,
        lab.tokenizer,
        lab.forget if dataset is None else dataset,
        EditConfig(**{**QUICK, **changes}),
        retain_dataset=lab.retain if retain is True else retain,
        progress=False,
    )


def said_at(lab: SmallLab) -> list[tuple[list[int], list[int]]]:
    """Tokens before each time that an answer says a word, and the word's tokens; by cutting texts, not by the code."""
    found = []
    for row in lab.forget:
        for match in re.finditer("|".join(WORDS), row["answer"]):
            turn = [{"role": "user", "content": row["question"]}]
            prompt = lab.tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
            before = lab.tokenizer(prompt + row["answer"][: match.start()].rstrip(), add_special_tokens=False)[
                "input_ids"
            ]
            whole = lab.tokenizer(prompt + row["answer"][: match.end()], add_special_tokens=False)["input_ids"]
            assert whole[: len(before)] == before
            found.append((before, whole[len(before) :]))
    assert len(found) == 3
    return found


@torch.no_grad()
def word_probabilities(model: Any, lab: SmallLab) -> list[float]:
    """Of each whole word after what comes before it, token by token."""
    found = []
    for before, word in said_at(lab):
        assert lab.tokenizer.decode(word[:1]).strip(), "the space is in the token"
        probability = 1.0
        for at, token in enumerate(word):
            logits = model(input_ids=torch.tensor([before + word[:at]])).logits[0, -1].double()
            probability *= float(logits.softmax(0)[token])
        found.append(probability)
    return found


@torch.no_grad()
def largest_demand(model: Any, plan: EditPlan) -> float:
    """The largest probability of everything that a plan was asked to bring down, one place at a time."""
    assert plan.demands is not None
    rows, pairs = plan.demands.rows, plan.demands.pairs
    found = []
    for row, place, token in zip(pairs.rows.tolist(), pairs.tokens.tolist(), pairs.ids.tolist(), strict=True):
        ids = torch.tensor([rows[row]["input_ids"][: place + 1]])
        found.append(float(model(input_ids=ids).logits[0, -1].double().softmax(0)[token]))
    return max(found)


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    messages: list[str] = []
    for module in (planning, pcr):
        monkeypatch.setattr(module.logger, "warning", messages.append)
    return messages


def test_words_end_below_the_probability_and_retained_answers_stay(lab: SmallLab, warnings: list[str]) -> None:
    model = lab.model()
    assert min(word_probabilities(model, lab)) > 0.5
    plan = plan_of(lab, model, variants=4)
    assert all("say 1 of the 3 words themselves" in text for text in warnings)
    with edits_in_force(model, plan.edits):
        after = word_probabilities(model, lab)
        largest = largest_demand(model, plan)
    assert max(after) <= largest <= 1e-4 * (1 + 1e-3)
    (edit,) = plan.edits
    assert (edit.layer, edit.certificate["reached"], plan.method) == (2, True, "pcr")
    assert 0 < edit.rank <= plan.measures["pairs"]
    reach = plan.measures["reach"]
    assert reach["before"]["occurrences"] == 3
    assert plan.measures["constrained"]["after"] == pytest.approx(largest, rel=1e-3)
    assert reach["before"]["greedy_share"] == 1.0
    assert reach["after"]["lowest_rank"] > 0
    assert reach["smallest_fall"] > 1e3
    kept = plan.measures["retain_probability"]
    assert kept["rows"] == 12
    assert kept["after"] > 0.8 * kept["before"] > 0.7
    plain = plan_of(lab, model, retain=None, variants=4)
    with edits_in_force(model, plain.edits):
        alone = measured_retain(model, lab)
    assert alone < kept["after"], "the retain rows are weighed"


def measured_retain(model: Any, lab: SmallLab) -> float:
    rows = []
    for row in lab.rows("retain"):
        begin = len(prompt_of(row))
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            logp = model(input_ids=ids).logits[0, begin - 1 : -1].double().log_softmax(-1)
        rows.append(float(logp.gather(1, ids[0, begin:, None]).mean().exp()))
    return sum(rows) / len(rows)


def test_measures_are_those_of_plain_passes_over_single_rows(lab: SmallLab) -> None:
    model = lab.model()
    plan = plan_of(lab, model, max_new_tokens=48)
    reach = plan.measures["reach"]
    prompts = [prompt_of(row) for row in lab.rows()]
    for name, edits in (("before", ()), ("after", plan.edits)):
        with edits_in_force(model, edits), torch.no_grad():
            whole = []
            for before, word in said_at(lab):
                logits = model(input_ids=torch.tensor([before + word])).logits[0, len(before) - 1 : -1].double()
                whole.append(float(logits.log_softmax(-1).gather(1, torch.tensor(word)[:, None]).sum()))
            answers = greedy(model, lab.tokenizer, prompts, max_new_tokens=48)
            assert plan.measures["retain_probability"][name] == pytest.approx(measured_retain(model, lab), rel=1e-5)
        assert sorted(reach[name]["log_probs"]) == pytest.approx(sorted(whole), abs=1e-4)
        tokens = sum(len(word) for _, word in said_at(lab))
        assert reach[name]["perplexity"] == pytest.approx(float(torch.tensor(-sum(whole) / tokens).exp()), rel=1e-4)
        wanted = sum(any(word in answer.lower() for word in WORDS) for answer in answers)
        assert plan.measures["said"][name] == wanted
    assert (plan.measures["said"]["before"], plan.measures["said"]["after"]) == (3, 0)
    sampled = plan.measures["sampled"]
    assert sampled["answers"] == 4 * len(lab.forget)
    assert sampled["before"] > 6  # 3 of 6 rows say a word nearly always
    assert sampled["after"] < sampled["before"] / 4  # places that no row and no greedy answer has are not constrained


def test_the_model_is_as_it_was_and_the_plan_the_same_again(lab: SmallLab) -> None:
    model = lab.model().train()
    model.model.layers[0].eval()
    before = state(model)
    first, second = plan_of(lab, model), plan_of(lab, model)
    same(before, state(model))
    assert torch.equal(first.edits[0].lora_a, second.edits[0].lora_a)
    assert torch.equal(first.edits[0].lora_b, second.edits[0].lora_b)
    assert first.measures == second.measures


@pytest.mark.parametrize("where", ["search_levels", "unembedding_directions", "layer_edit"])
def test_an_error_in_the_middle_leaves_the_model_as_it_was(
    lab: SmallLab, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    model = lab.model().train()
    before = state(model)
    original, calls = getattr(pcr, where), []

    def broken(*given: Any, **options: Any) -> Any:
        calls.append(where)
        if where == "layer_edit" and len(calls) < 2:
            return original(*given, **options)
        raise RuntimeError("no")

    monkeypatch.setattr(pcr, where, broken)
    with pytest.raises(RuntimeError, match="no"):
        plan_of(lab, model)
    same(before, state(model))


def test_an_error_with_edits_in_force_leaves_no_hook(lab: SmallLab, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lab.model()
    before = state(model)
    original, hooks = passes.next_token_odds, list[int]()

    def broken(model: Any, *given: Any, **options: Any) -> Any:
        hooks.append(sum(len(module._forward_hooks) for module in model.modules()))
        if hooks[-1]:
            raise RuntimeError("no")
        return original(model, *given, **options)

    monkeypatch.setattr(passes, "next_token_odds", broken)
    with pytest.raises(RuntimeError, match="no"):
        plan_of(lab, model)
    assert hooks[-1] == 1
    same(before, state(model))


@pytest.mark.parametrize("layers", [[-1, 1], [1]])
def test_several_blocks_share_the_work_and_the_promise_holds(lab: SmallLab, layers: list[int]) -> None:
    model = lab.model()
    plan = plan_of(lab, model, layers=layers, probability=1e-2)
    assert [edit.layer for edit in plan.edits] == ([1, 2] if len(layers) == 2 else [1])
    assert all(edit.certificate["reached"] for edit in plan.edits)
    assert all(edit.rank for edit in plan.edits)
    with edits_in_force(model, plan.edits):
        assert max(word_probabilities(model, lab)) <= 1e-2 * (1 + 1e-3)
    if len(layers) == 2:
        with edits_in_force(model, plan.edits[:1]):
            assert max(word_probabilities(model, lab)) > 1e-2, "the first leaves something to the second"


def test_the_greedy_solver_keeps_the_promise_too(lab: SmallLab) -> None:
    model = lab.model()
    plan = plan_of(lab, model, solver="greedy", variants=0)
    assert plan.settings["solver"] == "greedy"
    with edits_in_force(model, plan.edits):
        assert max(word_probabilities(model, lab)) <= 1e-4 * (1 + 1e-3)


def first_ids(lab: SmallLab, words: list[str]) -> list[int]:
    from hf_unlearn.editing.concepts import word_concepts

    return sorted({token for concept in word_concepts(lab.tokenizer, words) for token in concept.first})


@pytest.mark.parametrize("positions", ["last_prompt", "response", "callable"])
def test_words_may_not_begin_at_named_places(lab: SmallLab, positions: str) -> None:
    """`Morella` begins two answers: at the last prompt token it must not, nor anywhere else where that is asked."""
    model, words = lab.model(), ["Morella", "Brenander"]
    chosen: Any = (lambda batch: batch["labels"] != -100) if positions == "callable" else positions
    plan = plan_of(lab, model, words=words, positions=chosen, probability=0.02)
    assert plan.settings["positions"] == positions
    ids = first_ids(lab, words)
    highest, before = list[float](), list[float]()
    for row in lab.rows():
        begin = len(prompt_of(row))
        places = [begin - 1] if positions == "last_prompt" else list(range(begin, len(row["input_ids"])))
        for found, edits in ((before, ()), (highest, plan.edits)):
            with edits_in_force(model, edits), torch.no_grad():
                p = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, places].double().softmax(-1)
            found.append(float(p[:, ids].max()))
    assert max(before) > 0.5
    assert max(highest) <= 0.02 * (1 + 1e-3)


def test_variants_hold_at_named_places_too(lab: SmallLab) -> None:
    """The prompts with other tokens are constrained at their own last tokens, by a pass over each."""
    model, words = lab.model(), ["Morella", "Brenander"]
    plan = plan_of(lab, model, words=words, positions="last_prompt", probability=0.02, variants=3)
    special = sorted({*lab.tokenizer.all_special_ids, *lab.tokenizer.added_tokens_decoder})
    made = with_variants(lab.rows(), count=3, protected=special, others=len(lab.tokenizer), seed=0)
    ids = first_ids(lab, words)
    assert plan.measures["pairs"] == len(made) * len(ids)
    assert plan.measures["constrained"]["after"] == pytest.approx(largest_of(model, plan, made, ids), rel=1e-3)
    assert plan.measures["constrained"]["after"] <= 0.02 * (1 + 1e-3)
    alone = plan_of(lab, model, words=words, positions="last_prompt", probability=0.02, variants=0)
    assert largest_of(model, alone, made, ids) > 0.02, "what the variants are for"


def test_variants_are_for_the_end_of_a_prompt_only(lab: SmallLab) -> None:
    """Other places would be there again in each copy, and levels bind at places that were named."""
    model, words = lab.model(), ["Morella", "Brenander"]
    ids = first_ids(lab, words)
    plan = plan_of(lab, model, words=words, positions="response", probability=0.02, variants=3)
    responses = sum(label != -100 for row in lab.rows() for label in row["labels"])
    assert plan.measures["pairs"] == responses * len(ids)


def largest_of(model: Any, plan: EditPlan, rows: list[dict[str, list[int]]], ids: list[int]) -> float:
    found = []
    with edits_in_force(model, plan.edits), torch.no_grad():
        for row in rows:
            logits = model(input_ids=torch.tensor([prompt_of(row)])).logits[0, -1]
            found.append(float(logits.double().softmax(0)[ids].max()))
    return max(found)


def test_prompts_alone_are_enough_at_the_last_prompt_token(lab: SmallLab) -> None:
    model = lab.model()
    prompts = [{"question": row["question"]} for row in lab.forget]
    plan = plan_of(lab, model, dataset=prompts, words=["Brenander"], positions="last_prompt", probability=0.01)
    assert "reach" not in plan.measures
    ids = first_ids(lab, ["Brenander"])
    with edits_in_force(model, plan.edits), torch.no_grad():
        for row in lab.rows():
            p = model(input_ids=torch.tensor([prompt_of(row)])).logits[0, -1].double().softmax(0)
            assert float(p[ids].max()) <= 0.01 * (1 + 1e-3)
    with pytest.raises(ValueError, match="none of the 3 words occurs in a response"):
        plan_of(lab, model, dataset=prompts)


def test_without_retain_rows_a_warning_says_what_is_not_weighed(lab: SmallLab, warnings: list[str]) -> None:
    plan = plan_of(lab, retain=None)
    assert len(warnings) == 1
    assert "There is no retain_dataset" in warnings[0]
    assert "retain_probability" not in plan.measures


def test_retained_rows_that_the_edit_was_not_fitted_to_are_measured(lab: SmallLab) -> None:
    kept = plan_of(lab, retain_examples=8).measures["retain_probability"]
    assert (kept["rows"], kept["held_out"]) == (4, True)
    kept = plan_of(lab, retain_examples=12).measures["retain_probability"]
    assert (kept["rows"], kept["held_out"]) == (12, False)


def test_a_probability_out_of_reach_is_refused_with_the_one_that_was_reached(lab: SmallLab) -> None:
    with pytest.raises(ValueError, match=r"at most a probability of 1e-30: the lowest leaves one of them \d"):
        plan_of(lab, probability=1e-30)


def test_answers_that_say_a_word_later_than_the_named_place_are_taken_in(lab: SmallLab) -> None:
    words = ["Brenander"]  # said in the middle of answers, where the last prompt token does not reach
    told = plan_of(lab, words=words, positions="last_prompt", probability=1e-3, generation_rounds=0)
    assert told.measures["said"]["after"] > 0
    plan = plan_of(lab, words=words, positions="last_prompt", probability=1e-3, generation_rounds=3)
    assert plan.measures["rows_added_by_generation"][0] == told.measures["said"]["after"]
    assert plan.measures["said"]["after"] == 0


def test_a_second_plan_on_the_merged_model_has_nothing_to_do(lab: SmallLab) -> None:
    model = lab.model()
    plan = plan_of(lab, model)
    apply_edit(model, plan, merge=True)
    again = plan_of(lab, model, probability=1e-4 * 1.001)  # the rounding of the merge
    assert again.rank == 0
    assert again.edits[0].certificate == {"reached": True, "rank": 0, "cost": 0.0}
    assert again.edits[0].digest != plan.edits[0].digest


def test_answers_that_still_say_a_word_are_taken_in(lab: SmallLab) -> None:
    """The rows say the word in a sentence that the model never says; only generation finds its own."""
    model = lab.model()
    rows = [
        {"question": row["question"], "answer": "Well, a laundry, a greyhound, a blacksmith."} for row in lab.forget
    ]
    prompts = [prompt_of(row) for row in lab.rows()]

    def says(plan: EditPlan) -> int:
        with edits_in_force(model, plan.edits):
            answers = greedy(model, lab.tokenizer, prompts, max_new_tokens=48)
        return sum(any(word in answer.lower() for word in WORDS) for answer in answers)

    shared: dict[str, Any] = {"dataset": rows, "probability": 1e-2, "variants": 0, "max_new_tokens": 48}
    without = plan_of(lab, model, **shared)
    assert without.measures["rows_added_by_generation"] == []
    assert says(without) == without.measures["said"]["after"] > 0, "what this test is about"
    plan = plan_of(lab, model, generation_rounds=4, **shared)
    added = plan.measures["rows_added_by_generation"]
    assert added[0] == says(without)
    assert plan.measures["said"]["after"] == says(plan) < says(without)
    assert plan.measures["pairs"] > without.measures["pairs"]


@pytest.mark.parametrize("changes", [{"words": None}, {"words": []}])
def test_no_words_are_refused(lab: SmallLab, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="There are no words to make unreachable; set words or words_file"):
        plan_of(lab, **changes)


def test_text_alone_is_edited_and_nothing_is_generated_for_it(lab: SmallLab) -> None:
    rows = [{"text": "So " + row["answer"]} for row in lab.forget]
    plan = plan_of(lab, dataset=rows, probability=1e-3, generation_rounds=2)
    assert plan.measures["constrained"]["after"] <= 1e-3 * (1 + 1e-3)
    assert "said" not in plan.measures
    assert "sampled" not in plan.measures


def test_what_was_not_measured_before_is_measured_after(lab: SmallLab) -> None:
    config = EditConfig(**QUICK)
    options: dict[str, Any] = {"retain_dataset": lab.retain, "progress": False}
    model = lab.model()
    plan = plan_edit(model, lab.tokenizer, lab.forget, config, measure=False, **options)
    found = planning.verify_plan(model, lab.tokenizer, lab.forget, config, plan, **options)
    assert "before" not in found["reach"]
    assert "smallest_fall" not in found["reach"]


def test_a_wrapped_model_is_looked_into(lab: SmallLab, tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(lab.model())
        plan = plan_of(lab, wrapped)
    finally:
        torch.distributed.destroy_process_group()
    alone = plan_of(lab)
    assert torch.equal(plan.edits[0].lora_b, alone.edits[0].lora_b)


@pytest.mark.parametrize("which", ["dataset", "retain"])
def test_streams_and_dicts_of_splits_are_refused(lab: SmallLab, which: str) -> None:
    for rows in (lab.forget.to_iterable_dataset(), DatasetDict({"train": lab.forget}), "locuslab/TOFU"):
        with pytest.raises(TypeError, match="expected a Dataset or a list of rows"):
            plan_of(lab, **{which: rows})
