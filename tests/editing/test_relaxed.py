"""ARR's adversary: relaxed prompts against the token they stand for, and the edit that holds against a new attack."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from region_cases import FEW, assert_untouched, merged, prompts, responses, state, strong, twin
from test_capture import build
from torch import Tensor

from hf_unlearn.editing.regions.plans import RegionConfig, plan_arr
from hf_unlearn.editing.regions.relaxed import MixedEmbeddings, attack, round_to_tokens, starts
from hf_unlearn.editing.regions.rows import region_rows


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma"])
def test_arr_raises_the_least_loss_of_a_fresh_attack(family: str) -> None:
    """Attacked again by hand, with merged weights: fails where the sign of either player is wrong."""
    model = strong(family)
    before = state(model)
    config = RegionConfig(radius=0.3, **{**FEW, "steps": 20})
    plan = plan_arr(model, prompts(), token_ids=[5, 6], layers=(2, 3), config=config, pad_token_id=0)
    assert_untouched(model, before)
    measures = plan.measures
    assert measures["relaxed"]["before"] < measures["clean"]["before"], "the adversary lowers the loss"
    assert measures["relaxed"]["after"] > measures["relaxed"]["before"] + 0.05, "the edit raises it"
    deltas = {edit.layer: edit.delta() for edit in plan.edits}
    assert measures["clean"]["after"] == pytest.approx(twin(model, deltas, prompts(), [5, 6]).item(), rel=1e-4)
    assert all(edit.norm() <= edit.certificate["radius"] * (1 + 1e-6) for edit in plan.edits)
    least = []
    for found in ({}, deltas):
        model.load_state_dict({**model.state_dict(), **merged(model, found)})
        least.append(by_hand(model, prompts(), [5, 6], steps=20))
        model.load_state_dict({**model.state_dict(), **before})
    assert least[1] > least[0] + 0.05


def by_hand(model: Any, given: list[dict[str, list[int]]], token_ids: list[int], *, steps: int) -> float:
    """Mean over the rows of the least loss that a plain attack through `inputs_embeds` finds, row by row."""
    found = []
    table = model.get_input_embeddings()(torch.arange(61)).detach()  # with the scale that the module applies
    for row in given:
        ids = torch.tensor(row["input_ids"])

        def evaluate(mixtures: Tensor, ids: Tensor = ids) -> tuple[Tensor, Tensor]:
            mixtures = mixtures.detach().requires_grad_()
            embeds = torch.cat([table[ids[:-1]], mixtures[0] @ table, table[ids[-1:]]])[None]
            logp = model(inputs_embeds=embeds).logits[0, -1].log_softmax(-1)
            loss = -logp[token_ids].logsumexp(0)
            return loss.detach()[None], torch.autograd.grad(loss, mixtures)[0]

        found.append(float(attack(evaluate, torch.full((1, 2, 61), 1 / 61), steps=steps, length=1.0)[1]))
    return sum(found) / len(found)


def test_the_attack_on_a_linear_loss_ends_at_the_best_vertex_and_never_rises() -> None:
    slope = torch.randn(3, 2, 9, generator=torch.Generator().manual_seed(0))
    best, lowest = attack(
        lambda x: ((slope * x).sum((1, 2)), slope), torch.full((3, 2, 9), 1 / 9), steps=400, length=1
    )
    torch.testing.assert_close(lowest, slope.amin(-1).sum(1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(best, round_to_tokens(-slope), rtol=1e-3, atol=1e-3)
    rising, kept = attack(lambda x: ((x**2).sum((1, 2)), -2 * x), torch.eye(9)[None, :2], steps=5, length=0.5)
    assert kept.item() == 2.0
    torch.testing.assert_close(rising, torch.eye(9)[None, :2])


def test_a_vertex_is_its_token_and_excluded_tokens_never_appear() -> None:
    model = strong()
    mixing = MixedEmbeddings(model, [0, 3])
    assert mixing.ids.tolist() == [1, 2, *range(4, 61)]
    ids, wanted = torch.tensor([[1, 8, 9, 10]]), torch.tensor([[1, 20, 4, 10]])
    vertices = torch.nn.functional.one_hot(torch.tensor([[18, 2]]), 59).float()
    with mixing.mixed(torch.tensor([[1, 2]]), vertices), torch.no_grad():
        found = model(input_ids=ids).logits
    with torch.no_grad():
        torch.testing.assert_close(found, model(input_ids=wanted).logits)


def test_random_starts_belong_to_the_row_and_the_seed() -> None:
    both = starts([4, 7], 2, 11, random=True, seed=1)
    torch.testing.assert_close(both[1:], starts([7], 2, 11, random=True, seed=1))
    torch.testing.assert_close(both.sum(-1), torch.ones(2, 2))
    assert not torch.equal(both, starts([4, 7], 2, 11, random=True, seed=2))
    assert starts([4], 2, 4, random=False, seed=0).unique().tolist() == [0.25]


def test_free_positions_go_where_the_row_says_or_before_the_last_prompt_token() -> None:
    given: list[dict[str, Any]] = [*responses()[:1], {**prompts()[0], "free_at": 1}]
    made = region_rows(given[:1], [], free_positions=2)[0]
    ids = given[0]["input_ids"]
    assert made["free_at"] == 3
    assert made["input_ids"] == [*ids[:3], ids[3], ids[3], *ids[3:]]
    assert made["labels"] == [-100] * 6 + ids[4:]
    marked = region_rows(given, [9, 8], free_positions=1)
    assert marked["free_at"] == [3, 1]
    assert [row["labels"].index(9) for row in marked] == [5, 5]
    assert [len(row["labels"]) for row in marked] == [6, 6]


@pytest.mark.parametrize(
    ("row", "config", "message"),
    [
        ({"free_at": 5}, {}, "free_at of row 0 is 5; expected a column of its prompt, 0 to 3"),
        ({"input_ids": [5], "labels": [-100]}, {}, "The prompt of row 0 has one token"),
        ({}, {"excluded_token_ids": (61,)}, r"excluded_token_ids holds \[61\]"),
        ({}, {"excluded_token_ids": tuple(range(61))}, "the whole vocabulary"),
    ],
)
def test_bad_free_positions_say_what_was_expected(row: dict[str, Any], config: dict[str, Any], message: str) -> None:
    given = {"input_ids": [1, 5, 6], "labels": [-100] * 3, **row}
    with pytest.raises(ValueError, match=message):
        plan_arr(build(), [given], token_ids=[5], config=RegionConfig(**config), pad_token_id=0)
