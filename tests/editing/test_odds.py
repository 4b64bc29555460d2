"""Log-odds and ranks of next tokens: those of a plain softmax of the model's own logits, row by row."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from planned import make_plan
from test_capture import FAMILIES, build
from test_capture import rows as five_rows
from torch import Tensor

from hf_unlearn.editing import odds
from hf_unlearn.editing.added import edits_in_force
from hf_unlearn.editing.mlp import mlp_output
from hf_unlearn.editing.odds import Odds, Pairs, next_token_odds

PAIRS = Pairs.of(
    [(0, 2, 7), (0, 2, 8), (0, 8, 3), (1, 3, 60), (1, 4, 4), (2, 0, 9), (2, 11, 9), (4, 5, 30), (4, 1, 0), (4, 1, 5)]
)


def ask(model: Any, pairs: Pairs = PAIRS, **options: Any) -> Odds:
    return next_token_odds(model, five_rows(), pairs, pad_token_id=0, **{"batch_size": 3, **options})


@torch.no_grad()
def twin(model: Any, pairs: Pairs = PAIRS) -> tuple[Tensor, Tensor]:
    """One row alone, one pair after the other: log p - log of the sum of all other probabilities."""
    odds, ranks = [], []
    for row, token, number in zip(pairs.rows.tolist(), pairs.tokens.tolist(), pairs.ids.tolist(), strict=True):
        logits = model(input_ids=torch.tensor([five_rows()[row]["input_ids"]])).logits[0, token].double().tolist()
        own = logits[number]
        highest = max(other for at, other in enumerate(logits) if at != number)
        others = math.fsum(math.exp(other - highest) for at, other in enumerate(logits) if at != number)
        odds.append(own - highest - math.log(others))
        ranks.append(sum(other > own for other in logits))
    return torch.tensor(odds, dtype=torch.float64), torch.tensor(ranks)


def same(found: Odds, wanted: tuple[Tensor, Tensor], tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found.values, wanted[0], rtol=tolerance, atol=tolerance)
    assert found.ranks.tolist() == wanted[1].tolist()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scale", [1.0, 400.0])
def test_odds_and_ranks_are_those_of_a_plain_softmax_in_every_family(family: str, scale: float) -> None:
    """With a head 400 times as large tokens have nearly all or nearly nothing; Gemma's cap then bites."""
    model = build(family).double()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(scale)
    wanted = twin(model)
    if scale > 1.0:
        spread = float(wanted[0].abs().max())
        assert (20.0 < spread <= 61.0) if family == "gemma" else spread > 40.0
    same(ask(model), wanted)


def test_near_one_what_is_left_is_not_lost_and_near_zero_neither() -> None:
    model = build()
    pairs = Pairs.of([(0, 3, token) for token in range(61)])
    with torch.no_grad():
        model.lm_head.weight.mul_(2e4 / float(twin(model, pairs)[0].std()))  # thousands of nats apart
    odds = ask(model, pairs)
    same(odds, twin(model, pairs))
    top = int(odds.values.argmax())
    assert odds.values[top] > 100.0, "a probability that float64 rounds to 1"
    assert float(odds.probabilities()[top]) == 1.0
    assert odds.ranks[top] == 0
    assert sorted(odds.ranks.tolist()) == list(range(61))
    assert odds.values.min() < -1000.0, "one that it rounds to 0"
    torch.testing.assert_close(odds.log_probs()[odds.values < -50], odds.values[odds.values < -50])


def test_between_the_two_ways_of_counting_there_is_no_step() -> None:
    """Above one half the odds are summed anew: both sides of one half, and of float64's last bits."""
    from hf_unlearn.editing.odds import log_odds

    for gap in (-40.0, -1e-9, 0.0, 1e-9, 0.5, 30.0, 36.0, 37.0, 50.0, 700.0):
        logits = torch.tensor([[gap, 0.0]], dtype=torch.float64)
        values, ranks = log_odds(logits, [0, 0], torch.tensor([0, 1]))
        assert values.tolist() == pytest.approx([gap, -gap], rel=1e-12, abs=1e-15)
        assert ranks.tolist() == [int(gap < 0), int(gap > 0)]


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_batches_and_padding_change_nothing(batch_size: int) -> None:
    same(ask(build(), batch_size=batch_size), twin(build()))
    other = next_token_odds(build(), five_rows(), PAIRS, pad_token_id=17, batch_size=batch_size)
    torch.testing.assert_close(other.values, ask(build()).values)


def test_more_pairs_than_are_summed_at_once_keep_their_places() -> None:
    pairs = Pairs.of([(row, token, number) for row in (0, 3) for token in (1, 4) for number in range(61)])
    same(ask(build(), pairs), twin(build(), pairs))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_edits_in_force_count_as_merged_weights_do(family: str) -> None:
    model = build(family)
    before = twin(model)
    edits = make_plan(model).edits
    with edits_in_force(model, edits):
        found = ask(model)
    same(ask(model), before)
    with torch.no_grad():
        for edit in edits:
            weight = mlp_output(model, edit.layer).module.get_parameter("weight")
            weight.add_(edit.delta().T if edit.transposed else edit.delta())
    same(found, twin(model), 1e-4)
    assert (found.values - before[0]).abs().max() > 0.05, "the edits are felt"


def test_each_module_has_its_own_mode_back_and_nothing_is_left_behind() -> None:
    model = build("gpt2").train()  # with dropout
    model.transformer.h[0].eval()  # frozen by hand
    modes = {name: module.training for name, module in model.named_modules()}
    same(ask(model), twin(build("gpt2")))
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_logits_that_are_not_finite_are_named() -> None:
    model = build()
    with torch.no_grad():
        model.lm_head.weight[9] = torch.nan
    with pytest.raises(FloatingPointError, match="log-odds of token 7 after token 2 of row 0 are nan"):
        ask(model)


@pytest.mark.parametrize("token", [-1, 9])
def test_a_token_outside_its_row_is_refused(token: int) -> None:
    with pytest.raises(ValueError, match="Row 0 has 9 tokens"):
        ask(build(), Pairs.of([(0, token, 3)]))


def test_pairs_are_sorted_taken_once_and_know_their_places() -> None:
    pairs = Pairs.of([(2, 1, 5), (0, 3, 9), (2, 1, 4), (0, 3, 9)])
    assert len(pairs) == 3
    places, of_pair = pairs.places()
    assert places == [(0, 3), (2, 1)]
    assert of_pair.tolist() == [0, 1, 1]
    chosen = pairs.chosen(torch.tensor([False, True, True]))
    assert (chosen.rows.tolist(), chosen.tokens.tolist(), chosen.ids.tolist()) == ([2, 2], [1, 1], [4, 5])


def test_logits_exist_for_a_few_places_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sizes = build(), list[int]()
    whole = odds.log_odds

    def counted(logits: Tensor, *others: Any) -> Any:
        sizes.append(len(logits))
        return whole(logits, *others)

    monkeypatch.setattr(odds, "_CHUNK", 2)
    monkeypatch.setattr(odds, "log_odds", counted)
    same(ask(model, batch_size=5), twin(model))
    assert max(sizes) == 2
    assert sum(sizes) == len(PAIRS.places()[0])


def test_shares_stay_with_their_pairs_and_are_powers_of_what_a_word_may_have() -> None:
    pairs = Pairs.shared({(2, 1, 5): 0.5, (0, 3, 9): 1.0, (2, 1, 4): 0.25})
    assert pairs.shares.tolist() == [1.0, 0.25, 0.5]
    assert pairs.chosen(torch.tensor([False, True, True])).shares.tolist() == [0.25, 0.5]
    both = pairs.and_then(Pairs.of([(0, 0, 0)]), 5)
    assert (both.rows.tolist(), both.shares.tolist()) == ([0, 2, 2, 5], [1.0, 0.25, 0.5, 1.0])
    limits = pairs.limits(1e-4)
    torch.testing.assert_close(limits.sigmoid(), torch.tensor([1e-4, 0.1, 0.01], dtype=torch.float64))
    torch.testing.assert_close(pairs.bounds(limits), torch.full((3,), 1e-4, dtype=torch.float64))
    assert pairs.bounds(torch.full((3,), -2000.0, dtype=torch.float64)).tolist() == [0.0, 0.0, 0.0]
