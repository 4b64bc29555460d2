"""GCG: its gradient by differences and by one-hot vectors, its draws, its tokens as text, what it reaches and leaves."""

from __future__ import annotations

import copy
import itertools
from importlib import import_module

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from small_models import AttackLab
from transformers import AutoModelForCausalLM

from hf_unlearn.attacks.gcg import (
    GCGConfig,
    allowed_tokens,
    draw_candidates,
    gcg,
    run,
    target_nll,
    token_gradients,
)
from hf_unlearn.attacks.gcg_rows import gcg_rows, outcome
from hf_unlearn.data import tokenize_example, tokenize_prompt
from hf_unlearn.metrics.likelihood import mean_nll

SHAPE = {
    "vocab_size": 30,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "max_position_embeddings": 32,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
GEMMA = {**SHAPE, "head_dim": 8, "num_key_value_heads": 1, "sliding_window": 8}
GPT2 = {"vocab_size": 30, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "eos_token_id": 1}
FAMILIES = [("LlamaConfig", SHAPE), ("GPT2Config", GPT2), ("Gemma2Config", GEMMA), ("Gemma3TextConfig", GEMMA)]
QUICK = GCGConfig(suffix=" !" * 4, steps=3, candidates=16, top_k=8, seed=0)

module = import_module("hf_unlearn.attacks.gcg")  # the function of that name hides it


@pytest.fixture(scope="module")
def lab(attack_lab: AttackLab) -> AttackLab:
    return attack_lab


def snapshot(model):
    """Everything of a model that an attack must leave alone."""
    return {
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "flags": {name: value.requires_grad for name, value in model.named_parameters()},
        "grads": {name: None if v.grad is None else v.grad.clone() for name, v in model.named_parameters()},
        "modes": {name: part.training for name, part in model.named_modules()},
    }


def assert_same(one, other):
    assert one["flags"] == other["flags"]
    assert one["modes"] == other["modes"]
    for part in ("values", "grads"):
        for name, value in one[part].items():
            now = other[part][name]
            assert (value is None) == (now is None), name
            assert value is None or torch.equal(value, now), name


def unusual(model):
    """A copy with a frozen weight, a gradient and modules in different modes."""
    model = copy.deepcopy(model).train()
    model.model.layers[0].eval()
    model.model.norm.weight.requires_grad_(False)
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.grad = torch.full_like(weight, 0.5)
    return model


def make(name, shape, dtype=torch.float64):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(getattr(transformers, name)(**shape), dtype=dtype).eval()


def slow_nll(model, embedded, ids, length):
    """Mean NLL of the last `length` tokens, from embeddings `(1, T, d)`."""
    logits = model(inputs_embeds=embedded).logits[0]
    places = range(len(ids) - length - 1, len(ids) - 1)
    return torch.stack([-logits[place].log_softmax(-1)[ids[place + 1]] for place in places]).mean()


@pytest.mark.parametrize(("name", "shape"), FAMILIES)
def test_the_gradient_is_that_of_the_one_hot_vectors_and_of_finite_differences(name, shape):
    model = make(name, shape)
    model.requires_grad_(False)
    ids, positions, length = [5, 9, 3, 17, 22, 8, 4], range(2, 5), 2
    got = token_gradients(model, ids, positions, length)
    assert got.shape == (3, 30)

    table = model.get_input_embeddings()(torch.arange(30))
    hot = F.one_hot(torch.tensor(ids), 30).to(table.dtype).requires_grad_()
    slow_nll(model, (hot @ table)[None], ids, length).backward()
    torch.testing.assert_close(got.double(), hot.grad[2:5], rtol=1e-4, atol=1e-6)

    step = 2e-2  # the norms of these models compute in float32, whatever the weights are: smaller steps drown in it
    for place, token in itertools.product(range(3), (0, 7, 29)):
        values = []
        for sign in (1, -1):
            embedded = model.get_input_embeddings()(torch.tensor([ids])).clone()
            embedded[0, positions[place]] += sign * step * table[token]
            values.append(float(slow_nll(model, embedded, ids, length)))
        assert float(got[place, token]) == pytest.approx((values[0] - values[1]) / (2 * step), rel=2e-2, abs=1e-4)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_the_nll_of_candidates_is_that_of_each_alone(batch_size):
    model = make("LlamaConfig", SHAPE, torch.float32)
    sequences = torch.randint(2, 30, (5, 9), generator=torch.Generator().manual_seed(0)).tolist()
    got = target_nll(model, sequences, 3, batch_size)
    with torch.no_grad():
        embedded = [model.get_input_embeddings()(torch.tensor([ids])) for ids in sequences]
        slow = [float(slow_nll(model, e, ids, 3)) for e, ids in zip(embedded, sequences, strict=True)]
    assert got.tolist() == pytest.approx(slow, rel=1e-5)


def test_candidates_replace_one_token_by_one_of_the_steepest():
    gradient = torch.tensor([[0.0, -5.0, 1.0, -9.0, 2.0], [3.0, 2.0, -1.0, 0.0, -4.0]])
    allowed = torch.tensor([0, 1, 2, 4])  # 3 would be the steepest of the first position
    generator = torch.Generator().manual_seed(0)
    assert draw_candidates((0, 0), gradient, allowed, 50, 1, generator) == [(0, 4), (1, 0)]
    assert draw_candidates((1, 4), gradient, allowed, 50, 1, generator) == []  # nothing but itself
    found = draw_candidates((0, 0), gradient, allowed, 500, 2, generator)
    assert found == [(0, 2), (0, 4), (1, 0)]  # 0 is the second at the first position: the suffix itself
    assert len(draw_candidates((0, 0), gradient, allowed, 500, 99, generator)) == 6
    assert len(draw_candidates((0, 0), gradient, allowed, 1, 99, generator)) <= 1


def test_only_ordinary_tokens_are_drawn(lab):
    allowed = allowed_tokens(lab.tokenizer).tolist()
    assert not set(allowed) & set(lab.tokenizer.all_special_ids)
    assert all(lab.tokenizer.decode([token]).isascii() for token in allowed)
    more = set(allowed_tokens(lab.tokenizer, ascii_only=False).tolist())
    assert set(allowed) < more
    assert not more & set(lab.tokenizer.all_special_ids)


def test_a_memorised_target_becomes_ten_times_likelier_and_an_unknown_one_stays_unlikely(lab):
    """
    Tenfold is no sign of memory by itself: the model that never saw the target gains about as much. In absolute terms
    it stays far below the other, and says nothing of the target.
    """
    prompt = lab.rows[30]["question"]  # about somebody else
    config = GCGConfig(suffix=" !" * 10, steps=40, candidates=64, top_k=64, keep_best=True, end_of_turn=True)
    rows = [{"question": prompt, "answer": lab.rows[number]["answer"]} for number in (1, 2)]
    before = snapshot(lab.knows)
    found = gcg_rows(lab.knows, lab.tokenizer, rows, config, max_new_tokens=40)
    control = gcg_rows(lab.never_saw, lab.tokenizer, rows, config, max_new_tokens=40)
    assert_same(before, snapshot(lab.knows))
    for number, row in enumerate(rows):
        reached, other = found.searches[number], control.searches[number]
        assert reached.after >= 10 * reached.before
        assert reached.after > 0.15
        assert other.after < 0.05
        assert reached.after > 10 * other.after
        assert control.rouge[number] < found.rouge[number]
        # what is reported is what the text does, by the metric that everything else is scored with
        for suffix, value in (("", reached.before), (reached.suffix, reached.after)):
            asked = tokenize_example({"question": prompt + suffix, "answer": row["answer"]}, lab.tokenizer)
            nll = mean_nll(lab.knows, [asked], pad_token_id=lab.tokenizer.pad_token_id)
            assert float(np.exp(-nll[0])) == pytest.approx(value, rel=1e-3)
    assert control.judgement.success["whole target"] == (False, False)
    assert not any(name in answer for name in ("Brenander", "greyhound", "tuba") for answer in control.answers)
    measures = {measure.name: measure for measure in outcome(found, "target").measures}
    after = measures["probability of the target, with the suffix"]
    assert after.value == pytest.approx(np.mean([search.after for search in found.searches]))
    assert after.n == 2


def test_rows_without_question_and_answer_are_refused_before_a_search(lab):
    with pytest.raises(ValueError, match="no rows"):
        run(lab.knows, lab.tokenizer, [])
    with pytest.raises(ValueError, match="Row 1 has the columns"):
        run(None, lab.tokenizer, [{"question": "Who?", "answer": "He."}, {"question": "Who?"}])


def test_the_suffix_is_text_that_is_tokenised_to_the_tokens_that_were_optimised(lab):
    found = gcg(lab.knows, lab.tokenizer, "Who wrote it?", "A man.", QUICK)
    ids = tokenize_prompt({"question": "Who wrote it?" + found.suffix, "answer": ""}, lab.tokenizer)
    plain = tokenize_prompt({"question": "Who wrote it?", "answer": ""}, lab.tokenizer)
    width = len(found.suffix_ids)
    assert any(tuple(ids[place : place + width]) == found.suffix_ids for place in range(len(ids)))
    assert len(ids) == len(plain) + width
    assert width == len(lab.tokenizer(QUICK.suffix)["input_ids"])


def test_tokens_that_would_merge_are_refused(lab):
    merged = next(
        (left, right)
        for left, right in itertools.product(allowed_tokens(lab.tokenizer).tolist(), repeat=2)
        if len(lab.tokenizer(lab.tokenizer.decode([left, right]))["input_ids"]) == 1
    )
    frame = module.SuffixFrame(lab.tokenizer, "Who?", "He.", " ! !", True)
    assert frame.reproduces(frame.suffix)
    assert not frame.reproduces(merged)
    assert [*frame.before, *frame.after] == frame.plain


def test_the_same_seed_gives_the_same_suffix_and_the_global_random_state_is_not_used(lab):
    state = torch.get_rng_state()
    one, two = (gcg(lab.knows, lab.tokenizer, "Who?", "A man.", QUICK) for _ in range(2))
    assert one == two
    assert torch.equal(state, torch.get_rng_state())
    other = gcg(lab.knows, lab.tokenizer, "Who?", "A man.", GCGConfig(suffix=" !" * 4, steps=3, candidates=16, seed=1))
    assert other.suffix_ids != one.suffix_ids
    batched = GCGConfig(suffix=" !" * 4, steps=3, candidates=16, top_k=8, eval_batch_size=5)
    assert gcg(lab.knows, lab.tokenizer, "Who?", "A man.", batched).suffix_ids == one.suffix_ids


def test_the_best_is_kept_and_never_lost(lab):
    keeping = GCGConfig(suffix=" !" * 4, steps=8, candidates=4, top_k=64, keep_best=True)
    kept = gcg(lab.knows, lab.tokenizer, "Who?", "A man.", keeping)
    assert list(kept.losses) == sorted(kept.losses, reverse=True)
    plain = GCGConfig(suffix=" !" * 4, steps=8, candidates=4, top_k=64)
    free = gcg(lab.knows, lab.tokenizer, "Who?", "A man.", plain)
    for found in (kept, free):
        assert len(found.losses) == 9
        assert found.after == pytest.approx(np.exp(-min(found.losses)))
        assert found.initial == pytest.approx(np.exp(-found.losses[0]))


def test_the_search_ends_at_the_wanted_probability_or_before_it_starts(lab):
    early = GCGConfig(suffix=" !" * 4, steps=50, candidates=16, stop_probability=1e-9)
    assert len(gcg(lab.knows, lab.tokenizer, "Who?", "A man.", early).losses) == 1
    none = gcg(lab.knows, lab.tokenizer, "Who?", "A man.", GCGConfig(suffix=" !" * 4, steps=0))
    assert none.suffix == " ! ! ! !"
    assert none.after == none.initial
    assert none.rejected == 0.0


@pytest.mark.parametrize("failing", [1, 2, 3, 6])
def test_the_model_is_as_it_was_even_after_an_exception(lab, monkeypatch, failing):
    model = unusual(lab.knows)
    before = snapshot(model)
    gcg(model, lab.tokenizer, "Who?", "A man.", QUICK)
    assert_same(before, snapshot(model))
    calls = itertools.count(1)
    real = module._nll

    def breaks(*arguments):
        if next(calls) == failing:
            raise RuntimeError("out of memory")
        return real(*arguments)

    monkeypatch.setattr(module, "_nll", breaks)
    with pytest.raises(RuntimeError, match="out of memory"):
        gcg(model, lab.tokenizer, "Who?", "A man.", QUICK)
    assert_same(before, snapshot(model))


def test_messages_one_token_and_tokenizers_without_a_template_work_too(lab):
    words = (lab.tokenizer.decode([token]) for token in allowed_tokens(lab.tokenizer).tolist())
    word = next(word for word in words if word.startswith(" ") and word.strip().isalpha())
    config = GCGConfig(suffix=word, steps=2, candidates=8, top_k=8)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
    found = gcg(lab.knows, lab.tokenizer, messages, "A", config)
    assert len(found.suffix_ids) == 1
    assert messages[-1]["content"] == "Who?"
    with torch.no_grad():  # of the caller
        alone = gcg(lab.knows, lab.tokenizer, [messages[1]], "A", config)
    assert alone == gcg(lab.knows, lab.tokenizer, "Who?", "A", config)
    base = copy.deepcopy(lab.tokenizer)
    base.chat_template = None
    found = gcg(lab.knows, base, "Who?", "A man.", config)
    assert found.suffix_ids[0] in tokenize_prompt({"question": "Who?" + found.suffix, "answer": ""}, base)


@pytest.mark.parametrize(
    "wrong",
    [
        {"suffix": "  "},
        {"steps": -1},
        {"candidates": 0},
        {"top_k": 0},
        {"eval_batch_size": 0},
        {"stop_probability": 0.0},
        {"stop_probability": 1.5},
    ],
)
def test_options_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        GCGConfig(**wrong)


def test_impossible_inputs_are_refused(lab):
    with pytest.raises(ValueError, match="target"):
        gcg(lab.knows, lab.tokenizer, "Who?", " ", QUICK)
    with pytest.raises(ValueError, match="the last to be the user's"):
        gcg(lab.knows, lab.tokenizer, [{"role": "assistant", "content": "Hm."}], "A", QUICK)
    with pytest.raises(ValueError, match="the last to be the user's"):
        gcg(lab.knows, lab.tokenizer, [], "A", QUICK)
    broken = copy.deepcopy(lab.knows)
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        gcg(broken, lab.tokenizer, "Who?", "A", QUICK)
    merging = next(text for text in ("an", "es", "er", "s") if _merges(lab.tokenizer, text))
    with pytest.raises(ValueError, match="starts with a space"):
        gcg(lab.knows, lab.tokenizer, "Who wrot" + merging[0], "A", GCGConfig(suffix=merging[1:] or "x"))


def _merges(tokenizer, text):
    return len(text) == 2 and len(tokenizer(text)["input_ids"]) == 1
