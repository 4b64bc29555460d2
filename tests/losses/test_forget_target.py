"""The forget target: the gate and the two-sided pull."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hf_unlearn.losses import example_nll, level_loss, lmf_loss, target_gate, token_log_probs
from hf_unlearn.losses.target import Unit

NLL = torch.tensor([[1.0, 5.0, 99.0], [4.0, 4.0, 7.0], [99.0, 99.0, 99.0]])
MASK = torch.tensor([[True, True, False], [True, True, True], [False, False, False]])


def test_example_nll_is_the_mean_over_the_response() -> None:
    assert example_nll(-NLL, MASK).tolist() == [3.0, 5.0, 0.0]
    assert example_nll(torch.full((1, 2), math.nan), torch.zeros(1, 2, dtype=torch.bool)).tolist() == [0.0]


def test_the_gate_by_example_closes_for_all_its_tokens_at_once() -> None:
    assert target_gate(NLL, MASK, 4.0).tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 0]]
    assert target_gate(NLL, MASK, 5.0).tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 0]]  # reached: closed
    assert target_gate(NLL, MASK, 5.1, by="example").tolist() == [[1, 1, 0], [1, 1, 1], [0, 0, 0]]


def test_the_gate_by_token_closes_for_each_token() -> None:
    assert target_gate(NLL, MASK, 4.5, by="token").tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 0]]
    assert torch.equal(target_gate(NLL, MASK, torch.tensor(4.5), by="token"), target_gate(NLL, MASK, 4.5, by="token"))


def test_the_gate_has_no_gradient_and_stops_the_loss_of_a_forgotten_example() -> None:
    logits = torch.zeros(2, 3, 5)
    logits[0, :, 1], logits[1, :, 2] = 9.0, 9.0
    logits.requires_grad_()
    labels = torch.tensor([[-100, 1, 1], [-100, 1, 1]])  # the first is known, the second already unlikely
    logp, mask = token_log_probs(logits, labels)
    gate = target_gate(-logp, mask, 3.0)
    assert not gate.requires_grad
    output = lmf_loss(logits, labels, weights=gate)
    output.loss.backward()
    assert output.count == 4
    assert logits.grad is not None
    assert logits.grad[0].any()
    assert not logits.grad[1].any()


def test_both_gates_are_the_tokens_below_in_the_examples_below() -> None:
    for level in (0.5, 2.0, 4.5, 9.0):
        by_token, by_example = (target_gate(NLL, MASK, level, by=by) for by in ("token", "example"))
        assert torch.equal(target_gate(NLL, MASK, level, by="both"), by_token * by_example)
    with pytest.raises(ValueError, match="a pull is towards one level"):
        level_loss(torch.zeros(1, 2, 3), torch.zeros(1, 2, dtype=torch.long), 1.0, by="both")


def descend(logits: Tensor, labels: Tensor, by: Unit) -> Tensor:
    logits = logits.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        level_loss(logits, labels, 3.0, by=by).loss.backward()
        optimizer.step()
    return -token_log_probs(logits, labels)[0].detach()


@pytest.mark.parametrize("by", ["example", "token"])
def test_the_pull_lands_on_the_level_from_both_sides(by: Unit) -> None:
    logits = torch.zeros(2, 4, 6)
    logits[0, :, 1], logits[1, :, 2] = 9.0, 9.0
    labels = torch.tensor([[-100, 1, 1, 1], [-100, 1, 1, 1]])
    nll = descend(logits, labels, by)
    torch.testing.assert_close(nll.mean(-1), torch.full((2,), 3.0), rtol=1e-3, atol=0)
    if by == "token":
        torch.testing.assert_close(nll, torch.full((2, 3), 3.0), rtol=1e-3, atol=0)


def test_the_pull_is_one_for_certain_text_and_zero_on_the_level() -> None:
    labels = torch.tensor([[-100, 0]])
    certain = torch.tensor([[[60.0, 0.0], [0.0, 0.0]]])
    output = level_loss(certain, labels, 5.0)
    assert output.loss.item() == pytest.approx(1)
    assert output.metrics["nll"].item() == pytest.approx(0, abs=1e-6)
    assert output.metrics["distance"].item() == pytest.approx(1)
    assert level_loss(torch.zeros(1, 2, 2), labels, math.log(2)).loss.item() == pytest.approx(0, abs=1e-12)


def test_the_level_may_be_a_tensor_and_gets_no_gradient() -> None:
    logits, labels = torch.randn(1, 3, 4, requires_grad=True), torch.tensor([[-100, 0, 1]])
    level = torch.tensor(2.0, requires_grad=True)
    output = level_loss(logits, labels, level)
    output.loss.backward()
    assert level.grad is None
    torch.testing.assert_close(output.loss, level_loss(logits, labels, 2.0).loss)


@pytest.mark.parametrize("level", [0.0, -1.0, math.nan])
def test_a_level_that_is_not_positive_is_refused(level: float) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        level_loss(torch.zeros(1, 2, 3), torch.zeros(1, 2, dtype=torch.long), level)
    with pytest.raises(ValueError, match="must be positive"):
        target_gate(NLL, MASK, level)


def test_an_unknown_unit_is_refused() -> None:
    with pytest.raises(ValueError, match="'example', 'token' or 'both', got 'batch'"):
        target_gate(NLL, MASK, 1.0, by="batch")  # type: ignore[arg-type]  # the wrong value is the point
