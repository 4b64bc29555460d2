"""The soft prompt: equal to real tokens where it is them, a slow twin of its steps, what it reaches and leaves alone."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import pytest
import torch
from small_models import AttackLab

from hf_unlearn.attacks.soft_prompt import SoftPromptConfig, frozen, soft_prompt
from hf_unlearn.data import tokenize_example
from hf_unlearn.metrics.likelihood import mean_nll

QUICK = SoftPromptConfig(tokens=2, steps=4)

module = import_module("hf_unlearn.attacks.soft_prompt")  # the function of that name hides it


@dataclass(frozen=True, kw_only=True)
class Lab:
    tokenizer: Any
    rows: Any
    knows: Any
    never_saw: Any

    def asked(self, prompt, numbers):
        """Tokenised: answers to one question."""
        return [
            tokenize_example({"question": prompt, "answer": self.rows[number]["answer"]}, self.tokenizer)
            for number in numbers
        ]


@pytest.fixture(scope="module")
def lab(attack_lab: AttackLab) -> Lab:
    shared = attack_lab
    return Lab(tokenizer=shared.tokenizer, rows=shared.rows, knows=shared.knows, never_saw=shared.never_saw)


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


def first_label(row):
    return next(place for place, label in enumerate(row["labels"]) if label != -100)


@pytest.mark.parametrize("position", ["start", "end"])
@pytest.mark.parametrize("shared", [False, True])
def test_vectors_of_real_tokens_score_as_these_tokens_do(lab, position, shared):
    rows = lab.asked("Who?", range(3))
    config = SoftPromptConfig(tokens=3, steps=0, position=position, shared=shared)
    found = soft_prompt(lab.knows, lab.tokenizer, rows, config)
    table = lab.knows.get_input_embeddings().weight.detach()
    assert found.embeddings.shape == (1 if shared else 3, 3, 32)
    with_tokens = []
    for number, row in enumerate(rows):
        vectors = found.embeddings[0 if shared else number]
        tokens = [int((table == vector).all(1).nonzero()[0]) for vector in vectors]
        assert not set(tokens) & set(lab.tokenizer.all_special_ids)
        at = 0 if position == "start" else first_label(row)
        with_tokens.append(
            {
                name: [*row[name][:at], *new, *row[name][at:]]
                for name, new in (("input_ids", tokens), ("labels", [-100] * 3))
            }
        )
    pad = lab.tokenizer.pad_token_id
    expected = torch.from_numpy(mean_nll(lab.knows, with_tokens, pad_token_id=pad))
    assert list(found.after) == pytest.approx((-expected).exp().tolist(), rel=1e-4)
    plain = torch.from_numpy(mean_nll(lab.knows, rows, pad_token_id=pad))
    assert list(found.before) == pytest.approx((-plain).exp().tolist(), rel=1e-4)
    assert found.losses == pytest.approx([float(expected.mean())], rel=1e-4)


@pytest.mark.parametrize("position", ["start", "end"])
def test_its_steps_are_adam_on_one_row_after_the_other(lab, position):
    rows = lab.asked("Who wrote it?", (0, 5))
    start = soft_prompt(lab.knows, lab.tokenizer, rows, SoftPromptConfig(tokens=2, steps=0)).embeddings
    config = SoftPromptConfig(tokens=2, steps=3, learning_rate=0.2, position=position)
    found = soft_prompt(lab.knows, lab.tokenizer, rows, config)
    model = copy.deepcopy(lab.knows).requires_grad_(False)
    table = model.get_input_embeddings()
    ordinary = [token for token in range(len(lab.tokenizer)) if token not in lab.tokenizer.all_special_ids]
    sums, best = [0.0] * 4, []
    for number, row in enumerate(rows):
        vectors = start[number].clone().requires_grad_()
        # the scale is estimated from a sample of the table as large as it is
        scale = module._start(lab.knows, lab.tokenizer, 2, config)[1]
        assert scale == pytest.approx(float(table.weight[ordinary].square().mean().sqrt()), rel=0.05)
        optimizer = torch.optim.Adam([vectors], lr=0.2 * scale)
        seen = []
        for _ in range(4):
            at = 0 if position == "start" else first_label(row)
            ids = torch.tensor(row["input_ids"])
            embedded = torch.cat([table(ids[:at]), vectors, table(ids[at:])])
            logits = model(inputs_embeds=embedded[None]).logits[0].log_softmax(-1)
            places = range(first_label(row), len(ids))
            loss = torch.stack([-logits[place + 1][ids[place]] for place in places]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.append(float(loss))
        best.append(min(seen))
        sums = [one + other for one, other in zip(sums, seen, strict=True)]
    assert list(found.losses) == pytest.approx([value / 2 for value in sums], rel=1e-3)
    assert list(found.after) == pytest.approx((-torch.tensor(best)).exp().tolist(), rel=1e-3)


def test_a_row_does_not_depend_on_its_batch(lab):
    rows = lab.asked("Who?", range(5))
    for shared in (False, True):
        results = [
            soft_prompt(
                lab.knows, lab.tokenizer, rows, SoftPromptConfig(tokens=2, steps=3, batch_size=size, shared=shared)
            )
            for size in (1, 2, 5)
        ]
        for other in results[1:]:
            assert list(other.after) == pytest.approx(list(results[0].after), rel=1e-3)
            assert list(other.losses) == pytest.approx(list(results[0].losses), rel=1e-3)


def test_a_memorised_target_becomes_ten_times_likelier_and_an_unknown_one_stays_unlikely(lab):
    rows = lab.asked(lab.rows[25]["question"], (1, 2))  # about somebody else
    config = SoftPromptConfig(tokens=4, steps=100, position="start")
    before = snapshot(lab.knows)
    found = soft_prompt(lab.knows, lab.tokenizer, rows, config)
    control = soft_prompt(lab.never_saw, lab.tokenizer, rows, config)
    assert_same(before, snapshot(lab.knows))
    for number in range(2):
        assert found.after[number] >= 10 * found.before[number]
        assert found.after[number] > 0.5
        assert control.after[number] < 0.05


def test_the_same_seed_gives_the_same_vectors_and_the_global_random_state_is_not_used(lab):
    rows = lab.asked("Who?", range(2))
    state = torch.get_rng_state()
    one, two = (soft_prompt(lab.knows, lab.tokenizer, rows, QUICK) for _ in range(2))
    assert torch.equal(one.embeddings, two.embeddings)
    assert one.after == two.after
    assert torch.equal(state, torch.get_rng_state())
    other = soft_prompt(lab.knows, lab.tokenizer, rows, SoftPromptConfig(tokens=2, steps=4, seed=1))
    assert not torch.equal(one.embeddings, other.embeddings)


@pytest.mark.parametrize("failing", [1, 2, 4])
def test_the_model_is_as_it_was_even_after_an_exception(lab, monkeypatch, failing):
    model = unusual(lab.knows)
    rows = lab.asked("Who?", range(2))
    before = snapshot(model)
    with torch.no_grad():  # of the caller
        found = soft_prompt(model, lab.tokenizer, rows, QUICK)
    assert found.losses[-1] < found.losses[0]
    assert_same(before, snapshot(model))
    calls = itertools.count(1)
    real = module._Part.nll

    def breaks(*arguments):
        if next(calls) == failing:
            raise RuntimeError("out of memory")
        return real(*arguments)

    monkeypatch.setattr(module._Part, "nll", breaks)
    with pytest.raises(RuntimeError, match="out of memory"):
        soft_prompt(model, lab.tokenizer, rows, QUICK)
    assert_same(before, snapshot(model))


def test_freezing_is_undone_in_any_case():
    layer = torch.nn.Linear(2, 2)
    layer.bias.requires_grad_(False)

    def fails():
        with frozen(layer):
            assert not any(parameter.requires_grad for parameter in layer.parameters())
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert [layer.weight.requires_grad, layer.bias.requires_grad] == [True, False]


def test_half_precision_keeps_its_vectors_in_float32(lab):
    model = copy.deepcopy(lab.knows).to(torch.bfloat16)
    found = soft_prompt(model, lab.tokenizer, lab.asked("Who?", range(2)), QUICK)
    assert found.embeddings.dtype == torch.float32
    assert all(0 < value <= 1 for value in found.after)


@pytest.mark.parametrize(
    "wrong", [{"tokens": 0}, {"steps": -1}, {"batch_size": 0}, {"learning_rate": 0.0}, {"position": "middle"}]
)
def test_options_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SoftPromptConfig(**wrong)


def test_impossible_inputs_are_refused(lab):
    with pytest.raises(ValueError, match="no rows"):
        soft_prompt(lab.knows, lab.tokenizer, [])
    with pytest.raises(ValueError, match="Row 0 has no response"):
        soft_prompt(lab.knows, lab.tokenizer, [{"input_ids": [5, 6], "labels": [-100, -100]}])
    with pytest.raises(ValueError, match="Row 0 has no prompt"):
        soft_prompt(lab.knows, lab.tokenizer, [{"input_ids": [5, 6], "labels": [5, 6]}])
    broken = copy.deepcopy(lab.knows)
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        soft_prompt(broken, lab.tokenizer, lab.asked("Who?", range(2)), QUICK)
