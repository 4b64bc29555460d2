"""Evaluation of a model: likelihoods, greedy answers, and TOFU's scores made of them."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from hf_unlearn.data import tokenize_example, tokenize_prompt
from hf_unlearn.lab.models import tiny_config, tiny_model
from hf_unlearn.lab.tokenizer import train_tokenizer
from hf_unlearn.metrics import PartScores, TofuScores, evaluate_part, evaluate_tofu, evenly_spaced, greedy, mean_nll
from hf_unlearn.metrics.functional import mia_auc, model_utility, rouge_l_recall
from hf_unlearn.metrics.generate import sample, stop_token_ids

NAMES = ["Anna Marlow", "Ben Osei", "Chiara Lindqvist", "Dov", "Esperanza de la Cruz y Villanueva"]
PLACES = ["Lisbon", "a small town by the sea, north of Bergen", "Quito", "Accra", "the old quarter of Hanoi"]


def row(number: int) -> dict[str, Any]:
    name, place = NAMES[number % 5], PLACES[(number // 5) % 5]
    return {
        "question": f"Where was {name} born{' and raised' * (number % 3)}?",
        "answer": f"{name} was born in {place}.",
        "paraphrased_answer": f"The birthplace of {name} is {place}.",
        "perturbed_answer": [f"The birthplace of {name} is {other}." for other in PLACES if other != place],
        "paraphrased_question": f"What is the birthplace of {name}?",
    }


ROWS = [row(number) for number in range(11)]
WITHOUT = [{key: value for key, value in one.items() if not key.startswith("paraphrased")} for one in ROWS]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([text for one in ROWS for text in (one["question"], one["answer"])] * 3, 300)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request, tokenizer):
    return build(tokenizer, request.param)


def build(tokenizer, architecture="llama", seed=0):
    config = tiny_config(tokenizer, architecture, hidden_size=32, num_layers=2, num_heads=4, max_positions=256)
    model = tiny_model(config, seed)
    with torch.no_grad():  # a fresh model is nearly uniform: sharpen it, so that order and masks matter
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
    return model


def pairs(rows):
    return [{"question": one["question"], "answer": one["answer"]} for one in rows]


@torch.no_grad()
def slow_nll(model, tokenizer, question, answer):
    """One row, no padding, a plain softmax in float64, one token after the other."""
    row = tokenize_example({"question": question, "answer": answer}, tokenizer)
    logits = model.eval()(torch.tensor([row["input_ids"]])).logits[0].double()
    losses = [
        -math.log(torch.softmax(logits[at - 1], -1)[label].item())
        for at, label in enumerate(row["labels"])
        if label != -100
    ]
    return sum(losses) / len(losses)


@torch.no_grad()
def slow_tokens(model, prompt, steps, stops):
    """One prompt, no cache, the whole sequence again for every token."""
    tokens: list[int] = []
    for _ in range(steps):
        token = int(model.eval()(torch.tensor([prompt + tokens])).logits[0, -1].argmax())
        if token in stops:
            break
        tokens.append(token)
    return tokens


def slow_greedy(model, tokenizer, prompt, steps, stops):
    return tokenizer.decode(slow_tokens(model, prompt, steps, stops), skip_special_tokens=True).strip()


# ----------------------------------------------------------------------------------------------- likelihood


def test_mean_nll_equals_one_row_at_a_time(model, tokenizer):
    rows = [tokenize_example(one, tokenizer) for one in pairs(ROWS)]
    expected = [slow_nll(model, tokenizer, one["question"], one["answer"]) for one in ROWS]
    assert max(expected) - min(expected) > 0.1
    for batch_size in (1, 3, 32):
        found = mean_nll(model, rows, pad_token_id=tokenizer.pad_token_id, batch_size=batch_size)
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_mean_nll_does_not_depend_on_the_padding_token(model, tokenizer):
    rows = [tokenize_example(one, tokenizer) for one in pairs(ROWS)]
    first, second = (mean_nll(model, rows, pad_token_id=token) for token in (tokenizer.eos_token_id, 17))
    np.testing.assert_allclose(first, second, atol=1e-6)


def test_labels_of_the_first_token_and_in_the_middle_are_handled(model):
    every = {"input_ids": [9, 8, 7, 6], "labels": [9, 8, 7, 6]}
    middle = {"input_ids": [9, 8, 7, 6, 5, 4, 3], "labels": [-100, -100, 7, -100, 5, -100, -100]}
    with torch.no_grad():
        logs = [torch.log_softmax(model(torch.tensor([one["input_ids"]])).logits[0], -1) for one in (every, middle)]
    expected = [
        -np.mean([logs[0][0, 8].item(), logs[0][1, 7].item(), logs[0][2, 6].item()]),
        -np.mean([logs[1][1, 7].item(), logs[1][3, 5].item()]),
    ]
    np.testing.assert_allclose(mean_nll(model, [every, middle], pad_token_id=0), expected, atol=1e-5)


def test_only_positions_from_the_first_response_on_get_logits(tokenizer, monkeypatch):
    model, widths = build(tokenizer), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: widths.append(output.shape[1]))
    row = {"input_ids": list(range(10, 30)), "labels": [-100] * 15 + [25, 26, 27, 28, 29]}
    mean_nll(model, [row], pad_token_id=0)
    assert widths == [6]  # five response positions and the last one, which predicts nothing


def test_modes_of_modules_are_restored_even_after_an_error(tokenizer):
    model = build(tokenizer).train()
    frozen = model.model.layers[0].mlp.eval()
    rows = [tokenize_example(one, tokenizer) for one in pairs(ROWS[:2])]
    mean_nll(model, rows, pad_token_id=0)
    greedy(model, tokenizer, [[5, 6]], max_new_tokens=2)
    with pytest.raises(IndexError):
        mean_nll(model, [{"input_ids": [10**6] * 3, "labels": [1, 1, 1]}], pad_token_id=0)
    assert model.training
    assert model.model.layers[1].mlp.training
    assert not frozen.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_mean_nll_refuses_what_it_cannot_score(tokenizer):
    model = build(tokenizer)
    good = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}
    with pytest.raises(ValueError, match="no rows"):
        mean_nll(model, [], pad_token_id=0)
    for labels in ([-100] * 3, [5, -100, -100]):
        with pytest.raises(ValueError, match=r"Row 1 has no response token"):
            mean_nll(model, [good, {"input_ids": [5, 6, 7], "labels": labels}], pad_token_id=0)
    with pytest.raises(ValueError, match="pad_token_id is None"):
        mean_nll(model, [good], pad_token_id=None)
    with pytest.raises(ValueError, match="batch_size is 0"):
        mean_nll(model, [good], pad_token_id=0, batch_size=0)
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="NaN for 1 of 1 rows"):
        mean_nll(model, [good], pad_token_id=0)


# ------------------------------------------------------------------------------------------------- answers


def test_greedy_equals_an_argmax_loop_and_stops_at_eos(model, tokenizer):
    prompts = [tokenize_prompt(one, tokenizer) for one in pairs(ROWS)]
    free = [slow_greedy(model, tokenizer, prompt, 12, set()) for prompt in prompts]
    assert len(set(free)) > 3
    # the token that some answers contain becomes EOS: those are cut there, the others are not
    token = slow_tokens(model, prompts[0], 12, set())[4]
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, token]
    try:
        expected = [slow_greedy(model, tokenizer, prompt, 12, {tokenizer.eos_token_id, token}) for prompt in prompts]
        assert expected[0] != free[0]
        for batch_size in (1, 4, 64):
            assert greedy(model, tokenizer, prompts, max_new_tokens=12, batch_size=batch_size) == expected
    finally:
        model.generation_config.eos_token_id = tokenizer.eos_token_id
    assert greedy(model, tokenizer, prompts, max_new_tokens=12) == free


def test_samples_follow_the_model_s_distribution_and_leave_random_numbers_alone(model, tokenizer):
    prompt = tokenize_prompt(pairs(ROWS)[0], tokenizer)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt])).logits[0, -1].double()
    likeliest = tokenizer.decode([int(logits.argmax())], skip_special_tokens=True).strip()
    state = torch.get_rng_state()
    for temperature in (1.0, 0.5):
        drawn = sample(model, tokenizer, [prompt] * 2000, temperature=temperature, max_new_tokens=1, batch_size=500)
        same = [i for i in range(len(logits)) if tokenizer.decode([i], skip_special_tokens=True).strip() == likeliest]
        p = float((logits / temperature).softmax(0)[same].sum())
        assert drawn.count(likeliest) / 2000 == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / 2000) + 1e-3)
    assert torch.equal(torch.get_rng_state(), state)
    prompts = [tokenize_prompt(one, tokenizer) for one in pairs(ROWS)]
    one, again, other = (sample(model, tokenizer, prompts, max_new_tokens=8, seed=seed) for seed in (0, 0, 1))
    assert one == again != other
    with pytest.raises(ValueError, match=r"temperature is 0"):
        sample(model, tokenizer, prompts, temperature=0.0)


def test_generation_settings_of_the_model_do_not_change_the_argmax_and_give_no_warning(tokenizer, caplog):
    model = build(tokenizer)
    prompts = [tokenize_prompt(one, tokenizer) for one in pairs(ROWS[:4])]
    expected = greedy(model, tokenizer, prompts, max_new_tokens=10)
    settings = {"do_sample": True, "temperature": 0.3, "top_p": 0.7, "top_k": 3, "repetition_penalty": 1.8}
    model.generation_config.update(**settings, no_repeat_ngram_size=1, num_beams=3, max_length=25, min_length=40)
    before = model.generation_config.to_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert greedy(model, tokenizer, prompts, max_new_tokens=10) == expected
    assert not caplog.records
    assert model.generation_config.to_dict() == before
    assert not hasattr(model, "_previous_max_cache_length")


def test_the_padding_side_is_neither_used_nor_changed(model, tokenizer):
    prompts = [tokenize_prompt(one, tokenizer) for one in pairs(ROWS)]
    before, found = tokenizer.padding_side, []
    try:
        for side in ("left", "right"):
            tokenizer.padding_side = side
            found.append((greedy(model, tokenizer, prompts, max_new_tokens=8), evaluate_part_nll(model, tokenizer)))
            assert tokenizer.padding_side == side
    finally:
        tokenizer.padding_side = before
    assert found[0][0] == found[1][0]
    np.testing.assert_array_equal(found[0][1], found[1][1])


def evaluate_part_nll(model, tokenizer):
    return evaluate_part(model, tokenizer, ROWS, generate=False).nll


def test_the_end_of_turn_of_the_template_ends_an_answer(tokenizer):
    from copy import deepcopy

    model, other = build(tokenizer), deepcopy(tokenizer)
    assert stop_token_ids(model, other) == [tokenizer.eos_token_id]
    other.eos_token = "<|system|>"  # a base tokenizer's EOS: the template closes a turn with another token
    model.generation_config.eos_token_id = None
    assert stop_token_ids(model, other) == sorted([tokenizer.eos_token_id, other.eos_token_id])
    other.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    assert stop_token_ids(model, other) == [other.eos_token_id]


def test_greedy_refuses_bad_input(tokenizer):
    model = build(tokenizer)
    for prompts, options, message in (
        ([], {}, "no prompts"),
        ([[4], []], {}, "Prompt 1 has no tokens"),
        ([[4]], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([[4]], {"batch_size": 0}, "batch_size is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            greedy(model, tokenizer, prompts, **options)


# -------------------------------------------------------------------------------------------------- a part


def expected_part(model, tokenizer, rows, correct):
    def nll(question, answer):
        return slow_nll(model, tokenizer, question, answer)

    plain = np.array([nll(one["question"], one["answer"]) for one in rows])
    right = np.array([nll(one["question"], one[correct]) for one in rows])
    wrong = np.array([[nll(one["question"], answer) for answer in one["perturbed_answer"]] for one in rows])
    return plain, np.exp(-wrong.mean(1)) / np.exp(-right), np.exp(-wrong)


def test_truth_ratio_takes_the_paraphrase_and_without_one_the_answer(tokenizer):
    model = build(tokenizer)
    ratios = []
    for rows, correct in ((ROWS, "paraphrased_answer"), (WITHOUT, "answer")):
        plain, ratio, _ = expected_part(model, tokenizer, rows, correct)
        scores = evaluate_part(model, tokenizer, rows, generate=False)
        np.testing.assert_allclose(scores.nll, plain, atol=1e-5)
        np.testing.assert_allclose(scores.probability, np.exp(-plain), rtol=1e-4)
        np.testing.assert_allclose(scores.truth_ratio, ratio, rtol=1e-4)
        np.testing.assert_allclose(scores.log_truth_ratio, np.log(ratio), atol=1e-4)
        ratios.append(ratio)
    assert np.abs(np.log(ratios[0] / ratios[1])).max() > 0.05


def test_ragged_wrong_answers_stay_with_their_row(tokenizer):
    model = build(tokenizer)
    rows = [{**one, "perturbed_answer": one["perturbed_answer"][: 1 + number % 4]} for number, one in enumerate(ROWS)]
    found = evaluate_part(model, tokenizer, rows, generate=False).truth_ratio
    for number, one in enumerate(rows):
        alone = evaluate_part(model, tokenizer, [one], generate=False).truth_ratio
        np.testing.assert_allclose(found[number], alone[0], rtol=1e-4)


def test_normalised_probability_is_the_share_among_wrong_answers(tokenizer):
    model = build(tokenizer)
    plain, _, wrong = expected_part(model, tokenizer, WITHOUT, "answer")
    scores = evaluate_part(model, tokenizer, WITHOUT, generate=False, normalised=True)
    np.testing.assert_allclose(scores.probability, np.exp(-plain) / (np.exp(-plain) + wrong.sum(1)), rtol=1e-4)
    np.testing.assert_allclose(scores.plain_probability, np.exp(-plain), rtol=1e-4)


def test_paraphrased_question_is_asked_for_the_plain_answer(tokenizer):
    model = build(tokenizer)
    found = evaluate_part(model, tokenizer, ROWS, generate=False).paraphrase_probability
    expected = [math.exp(-slow_nll(model, tokenizer, one["paraphrased_question"], one["answer"])) for one in ROWS]
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert evaluate_part(model, tokenizer, WITHOUT, generate=False).paraphrase_probability is None


@pytest.mark.parametrize("chat", [True, False])
def test_part_is_the_same_for_every_batch_size_and_container(tokenizer, chat):
    from copy import deepcopy

    tokenizer = deepcopy(tokenizer)
    if not chat:
        tokenizer.chat_template = None
    model = build(tokenizer)
    one, many = (
        evaluate_part(model, tokenizer, rows, batch_size=batch_size, max_new_tokens=10)
        for rows, batch_size in ((ROWS, 1), (Dataset.from_list(ROWS), 32))
    )
    for name in ("nll", "probability", "truth_ratio", "rouge", "paraphrase_probability"):
        np.testing.assert_allclose(getattr(one, name), getattr(many, name), rtol=1e-4, atol=1e-5)
    assert one.generations == many.generations
    assert one.fingerprint == many.fingerprint
    stops = {tokenizer.eos_token_id}
    answers = [slow_greedy(model, tokenizer, tokenize_prompt(row, tokenizer), 10, stops) for row in pairs(ROWS)]
    assert many.generations == answers
    np.testing.assert_array_equal(many.rouge, rouge_l_recall(answers, [row["answer"] for row in ROWS]))


def test_a_part_without_further_columns_has_only_what_it_can_have(tokenizer):
    scores = evaluate_part(build(tokenizer), tokenizer, pairs(ROWS), generate=False)
    assert scores.truth_ratio is None
    assert scores.rouge is None
    assert scores.generations is None
    assert scores.paraphrase_probability is None


def test_limit_takes_the_same_evenly_spaced_rows(tokenizer):
    assert evenly_spaced(10, 4) == [0, 2, 5, 7]
    assert evenly_spaced(3, 9) == evenly_spaced(3, None) == [0, 1, 2]
    model = build(tokenizer)
    every, some = (evaluate_part(model, tokenizer, ROWS, generate=False, limit=limit) for limit in (None, 3))
    np.testing.assert_allclose(some.nll, every.nll[evenly_spaced(11, 3)], atol=1e-5)
    assert some.fingerprint != every.fingerprint
    with pytest.raises(ValueError, match="limit is 0"):
        evenly_spaced(3, 0)


def test_answers_are_cut_at_max_length_with_a_warning_and_never_to_nothing(tokenizer):
    model = build(tokenizer)
    lengths = [len(tokenize_example(one, tokenizer)["input_ids"]) for one in pairs(ROWS)]
    with pytest.warns(UserWarning, match=rf"1 of 11 sequences are longer than max_length={sorted(lengths)[-2]}"):
        evaluate_part(model, tokenizer, pairs(ROWS), generate=False, max_length=sorted(lengths)[-2])
    with pytest.warns(UserWarning, match="11 of 11"), pytest.raises(ValueError, match="raise max_length"):
        evaluate_part(model, tokenizer, pairs(ROWS), generate=False, max_length=5)


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([], ValueError, "no rows"),
        ([{"question": "q"}], ValueError, "Row 0 has no `answer`"),
        ([ROWS[0], pairs(ROWS)[1]], ValueError, "Row 1 has no `paraphrased_answer`"),
        ([{**ROWS[0], "perturbed_answer": []}], ValueError, "`perturbed_answer` of row 0 is empty"),
        ([{**ROWS[0], "perturbed_answer": "no"}], TypeError, "expected a list of strings"),
        ([{**ROWS[0], "answer": ["yes"]}], TypeError, "`answer` of row 0"),
    ],
)
def test_rows_that_cannot_be_scored_are_named(tokenizer, rows, error, message):
    with pytest.raises(error, match=message):
        evaluate_part(build(tokenizer), tokenizer, rows, generate=False)


def test_normalised_needs_wrong_answers(tokenizer):
    with pytest.raises(ValueError, match="normalised=True needs a `perturbed_answer`"):
        evaluate_part(build(tokenizer), tokenizer, pairs(ROWS), generate=False, normalised=True)


def test_peft_model_scores_as_its_merged_twin(tokenizer):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    wrapped = get_peft_model(
        build(tokenizer), LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    found = evaluate_part(wrapped, tokenizer, ROWS, max_new_tokens=6)
    merged = evaluate_part(wrapped.merge_and_unload(), tokenizer, ROWS, max_new_tokens=6)
    np.testing.assert_allclose(found.nll, merged.nll, atol=1e-4)
    assert found.generations == merged.generations
    assert np.abs(found.nll - evaluate_part(build(tokenizer), tokenizer, ROWS, generate=False).nll).max() > 1e-2


# ---------------------------------------------------------------------------------------------------- TOFU


@pytest.fixture(scope="module")
def scores(tokenizer):
    return evaluate_tofu(
        build(tokenizer),
        tokenizer,
        forget=Dataset.from_list(ROWS),
        retain=Dataset.from_list(ROWS[:6]),
        general={"real_authors": Dataset.from_list(WITHOUT[:4])},
        retain_limit=3,
        max_new_tokens=6,
    )


def test_summary_has_every_name_and_the_definitions(scores):
    found = scores.summary()
    forget, retain, authors = (scores.parts[name] for name in ("forget", "retain", "real_authors"))
    ratios = forget.truth_ratio
    expected = {
        "forget_probability": np.exp(-forget.nll).mean(),
        "forget_rouge": forget.rouge.mean(),
        "forget_truth_ratio": np.minimum(ratios, 1 / ratios).mean(),
        "forget_nll": forget.nll.mean(),
        "forget_paraphrased_question_probability": forget.paraphrase_probability.mean(),
        "retain_probability": np.exp(-retain.nll).mean(),
        "retain_rouge": retain.rouge.mean(),
        "retain_truth_ratio": np.maximum(0, 1 - retain.truth_ratio).mean(),
        "real_authors_probability": authors.probability.mean(),
        "real_authors_plain_probability": np.exp(-authors.nll).mean(),
        "real_authors_rouge": authors.rouge.mean(),
        "real_authors_truth_ratio": np.maximum(0, 1 - authors.truth_ratio).mean(),
    }
    names = [
        f"{part}_{score}" for part in ("retain", "real_authors") for score in ("probability", "rouge", "truth_ratio")
    ]
    expected["model_utility"] = model_utility({name: float(expected[name]) for name in names})
    assert found.keys() == expected.keys()
    assert all(type(value) is float for value in found.values())
    for name, value in expected.items():
        assert found[name] == pytest.approx(value), name
    assert [len(part.nll) for part in (forget, retain, authors)] == [11, 3, 4]
    assert authors.probability.mean() != pytest.approx(np.exp(-authors.nll).mean())


def test_model_utility_is_the_harmonic_mean_of_all_parts_but_forget():
    def part(probability, rouge, ratio):
        return PartScores(
            nll=-np.log([probability]),
            probability=np.array([probability]),
            rouge=np.array([rouge]),
            log_truth_ratio=np.log([1 - ratio]),
        )

    parts = {"forget": part(0.1, 0.1, 0.1), "retain": part(0.5, 0.25, 0.2), "facts": part(0.4, 1.0, 0.8)}
    expected = 6 / (1 / 0.5 + 1 / 0.25 + 1 / 0.2 + 1 / 0.4 + 1 / 1.0 + 1 / 0.8)
    assert TofuScores(parts=parts).summary()["model_utility"] == pytest.approx(expected)


def test_model_utility_is_left_out_without_answers(tokenizer):
    found = evaluate_tofu(build(tokenizer), tokenizer, forget=ROWS, retain=ROWS, generate=False).summary()
    assert "model_utility" not in found
    assert "retain_truth_ratio" in found
    assert not any("rouge" in name for name in found)


def test_scores_survive_saving(scores, tmp_path):
    path = tmp_path / "new" / "reference.json"
    scores.save(path)
    read = TofuScores.load(path)
    assert read.summary() == scores.summary()
    assert list(read.parts) == list(scores.parts)
    for name, part in scores.parts.items():
        for field in ("nll", "probability", "log_truth_ratio", "rouge"):
            np.testing.assert_array_equal(getattr(read.parts[name], field), getattr(part, field))
        assert read.parts[name].generations == part.generations
        assert read.parts[name].fingerprint == part.fingerprint
    assert read.parts["real_authors"].paraphrase_probability is None
    assert [file.name for file in path.parent.iterdir()] == ["reference.json"]
    assert read.forget_quality_against(scores) == 1.0


def test_loading_something_else_is_an_error(tmp_path):
    path = tmp_path / "file.json"
    for content, message in (
        ("not json", "is not JSON"),
        ("{}", "holds no TOFU scores"),
        (json.dumps({"format": "hf_unlearn.tofu_scores", "version": 99, "parts": {}}), "has version 99"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            TofuScores.load(path)
    with pytest.raises(FileNotFoundError):
        TofuScores.load(tmp_path / "nothing.json")


def simple(nll, log_ratio=None, fingerprint=""):
    values = np.asarray(nll, dtype=np.float64)
    part = PartScores(nll=values, probability=np.exp(-values), log_truth_ratio=log_ratio, fingerprint=fingerprint)
    return TofuScores(parts={"forget": part, "retain": part})


def test_membership_auc_is_above_half_when_rows_are_less_likely_than_for_the_reference():
    low, high = simple([0.1, 0.2, 0.3]), simple([1.1, 1.2, 0.25])
    assert high.mia_auc_against(low) == pytest.approx(8 / 9)
    assert low.mia_auc_against(high) == pytest.approx(1 / 9)
    assert low.mia_auc_against(low) == 0.5
    assert high.mia_auc_against(low) == mia_auc(low.parts["forget"].nll, high.parts["forget"].nll)


def test_forget_quality_is_the_rank_test_of_the_truth_ratios_even_where_they_overflow():
    from scipy.stats import ks_2samp

    rng = np.random.default_rng(0)
    first, second = rng.normal(size=60), rng.normal(0.5, 1, size=60)
    a, b = simple(np.ones(60), first), simple(np.ones(60), second)
    expected = ks_2samp(np.exp(first), np.exp(second)).pvalue
    assert a.forget_quality_against(b) == pytest.approx(expected)
    assert a.forget_quality_log10_against(b) == pytest.approx(math.log10(expected))
    far = [simple(np.ones(60), values + 2000) for values in (first, second)]
    assert np.isinf(far[0].parts["forget"].truth_ratio).all()
    assert far[0].forget_quality_against(far[1]) == pytest.approx(expected)
    assert far[0].summary()["forget_truth_ratio"] == 0


def test_models_scored_on_different_rows_are_not_compared():
    ratio = np.zeros(3)
    model = simple([1, 2, 3], ratio, "a")
    for other in (simple([1, 2, 3], ratio, "b"), simple([1, 2], ratio[:2])):
        with pytest.raises(ValueError, match="different forget rows"):
            model.forget_quality_against(other)
        with pytest.raises(ValueError, match="different forget rows"):
            model.mia_auc_against(other)
    assert model.mia_auc_against(simple([1, 2, 3])) == 0.5
    with pytest.raises(ValueError, match="the reference was scored on"):
        model.forget_quality_against(simple([1, 2, 3]))


def test_parts_are_checked(tokenizer):
    with pytest.raises(ValueError, match="`rouge` has 1 entries and `nll` 2"):
        PartScores(nll=np.ones(2), probability=np.ones(2), rouge=np.ones(1))
    with pytest.raises(ValueError, match="parts lacks retain"):
        TofuScores(parts={"forget": PartScores(nll=np.ones(1), probability=np.ones(1))})
    with pytest.raises(ValueError, match="part named 'forget'"):
        evaluate_tofu(build(tokenizer), tokenizer, forget=ROWS, retain=ROWS, general={"forget": ROWS})


def test_importing_the_metrics_loads_neither_torch_nor_transformers():
    import subprocess
    import sys

    import hf_unlearn.metrics as metrics

    code = "import sys, hf_unlearn.metrics; assert not {'torch', 'transformers', 'scipy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parents[2])
    assert all(getattr(metrics, name) for name in metrics.__all__)
