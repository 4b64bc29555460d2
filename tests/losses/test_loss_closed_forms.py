"""Facts about single losses that can be written down."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hf_unlearn import losses

LABELS = torch.tensor([[-100, 0]])


def gradient_norm(name: str, top: float, vocabulary: int = 32_000) -> float:
    """Gradient norm at one position with logit `top` on the label and 0 elsewhere."""
    logits = torch.zeros(1, 2, vocabulary, dtype=torch.float64)
    logits[0, 0, 0] = top
    logits.requires_grad_()
    getattr(losses, name)(logits, LABELS).loss.backward()
    assert logits.grad is not None
    return logits.grad.norm().item()


def test_lmf_gradient_is_large_where_the_others_have_vanished() -> None:
    assert gradient_norm("lmf_loss", 25.0) == pytest.approx(50, rel=1e-3)
    assert gradient_norm("entropy_loss", 25.0) == pytest.approx(1e-5, rel=0.2)
    assert gradient_norm("grad_ascent_loss", 25.0) == pytest.approx(4e-7, rel=0.2)


def test_lmf_does_not_switch_off() -> None:
    top = math.log(31_999 * 0.005 / 0.995)  # p_max = 0.005
    assert gradient_norm("lmf_loss", top) == pytest.approx(10, rel=0.03)


def test_lmf_gradient_is_twice_the_margin_times_argmax_minus_mean() -> None:
    logits = torch.tensor([[[3.0, 1.0, 3.0, -1.0], [0.0] * 4]], requires_grad=True)
    losses.lmf_loss(logits, LABELS).loss.backward()
    margin = 3.0 - 1.5
    expected = 2 * margin * (torch.tensor([1.0, 0, 0, 0]) - 0.25)  # a tie goes to one index, that of torch.max
    index = logits[0, 0].max(dim=-1).indices.item()
    assert index in (0, 2)
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad[0, 0], expected.roll(int(index)))


def test_kl_to_uniform_lies_within_log_v_below_the_margin() -> None:
    logits = 5 * torch.randn(50, 2, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for row in logits:
        margin = losses.lmf_loss(row[None], LABELS).loss.sqrt()
        kl = losses.kl_to_uniform_loss(row[None], LABELS).loss
        assert margin - math.log(11) <= kl <= margin


@pytest.mark.parametrize("name", ["lmf_loss", "kl_to_uniform_loss", "entropy_loss"])
def test_flattening_losses_are_zero_at_uniform_and_invariant_to_a_constant(name: str) -> None:
    loss = getattr(losses, name)
    assert loss(torch.full((1, 2, 9), 4.0), LABELS).loss.item() == pytest.approx(0, abs=1e-6)
    logits = torch.randn(1, 2, 9, dtype=torch.float64)
    torch.testing.assert_close(loss(logits + 7, LABELS).loss, loss(logits, LABELS).loss)
    assert loss(logits, LABELS).loss > 0


def test_grad_ascent_is_minus_the_cross_entropy() -> None:
    logits = torch.randn(2, 5, 7, dtype=torch.float64)
    labels = torch.tensor([[-100, -100, 3, 1, 0], [-100, 2, 2, -100, 6]])
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(losses.nll_loss(logits, labels).loss, expected)
    torch.testing.assert_close(losses.grad_ascent_loss(logits, labels).loss, -expected)
    torch.testing.assert_close(losses.wga_loss(logits, labels, beta=0.0).loss, -expected)
    torch.testing.assert_close(losses.satimp_loss(logits, labels, beta1=0.0, beta2=0.0).loss, -expected)


@pytest.mark.parametrize(
    ("name", "weight"), [("wga_loss", lambda p: p), ("satimp_loss", lambda p: p**5 * (1 - p))], ids=["wga", "satimp"]
)
def test_reweighted_ascent_has_the_gradient_of_ascent_times_a_fixed_weight(
    name: str, weight: Callable[[Tensor], Tensor]
) -> None:
    logits = torch.randn(1, 2, 6, dtype=torch.float64, requires_grad=True)
    getattr(losses, name)(logits, LABELS).loss.backward()
    p = logits.detach()[0, 0].softmax(-1)
    onehot = torch.eye(6, dtype=torch.float64)[0]
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad[0, 0], weight(p[0]) * (onehot - p))


def test_undial_is_least_where_the_model_equals_the_lowered_reference() -> None:
    reference = torch.randn(1, 2, 6, dtype=torch.float64)
    logits = reference.clone()
    logits[0, 0, 0] -= 10.0
    logits.requires_grad_()
    output = losses.undial_loss(logits, reference, LABELS)
    output.loss.backward()
    q = logits.detach()[0, 0].softmax(-1)
    torch.testing.assert_close(output.loss.detach(), -(q * q.log()).sum())
    torch.testing.assert_close(logits.grad, torch.zeros_like(logits), atol=1e-12, rtol=0)


def test_kl_to_reference_is_zero_at_the_reference_and_positive_elsewhere() -> None:
    logits = torch.randn(1, 2, 6, requires_grad=True)
    output = losses.kl_to_reference_loss(logits, logits.detach().clone(), LABELS)
    output.loss.backward()
    assert output.loss.item() == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(logits.grad, torch.zeros_like(logits), atol=1e-6, rtol=0)
    assert losses.kl_to_reference_loss(logits, torch.randn(1, 2, 6), LABELS).loss > 0


def gradient(loss: Tensor, at: Tensor) -> Tensor:
    return torch.autograd.grad(loss, at)[0]


def test_npo_gradient_becomes_gradient_ascent_as_beta_goes_to_zero() -> None:
    logps = torch.tensor([-3.0, -20.0, -90.0], dtype=torch.float64, requires_grad=True)
    reference, n = torch.tensor([-2.0, -25.0, -30.0], dtype=torch.float64), torch.tensor([2, 5, 9])
    ascent = torch.full((3,), 1 / 3, dtype=torch.float64)
    torch.testing.assert_close(
        gradient(losses.npo_loss(logps, reference, num_tokens=n, beta=1e-8).loss, logps), ascent, rtol=1e-6, atol=0
    )
    weight = 2 * torch.sigmoid(0.1 * (logps.detach() - reference))
    torch.testing.assert_close(gradient(losses.npo_loss(logps, reference, num_tokens=n).loss, logps), weight * ascent)


def test_npo_is_dpo_with_a_constant_chosen_side() -> None:
    logps, reference, chosen = torch.randn(3, 4, dtype=torch.float64)
    n = torch.ones(4)
    npo = losses.npo_loss(logps, reference, num_tokens=n, beta=0.7)
    dpo = losses.dpo_loss(chosen, logps, chosen, reference, num_chosen_tokens=n, num_rejected_tokens=n, beta=0.7)
    torch.testing.assert_close(npo.loss, dpo.loss)


def test_sequence_losses_stay_finite_far_from_the_reference() -> None:
    logps, reference, n = torch.tensor([-5000.0, 0.0], requires_grad=True), torch.tensor([0.0, -5000.0]), torch.ones(2)
    output = losses.npo_loss(logps, reference, num_tokens=n, beta=1.0)
    assert output.total.item() == pytest.approx(10_000)
    torch.testing.assert_close(gradient(output.total, logps), torch.tensor([0.0, 2.0]))


def test_sequences_without_tokens_do_not_count_even_if_they_hold_nan() -> None:
    nan = math.nan
    logps = torch.tensor([-2.0, nan], requires_grad=True)
    reference, n = torch.tensor([-1.0, nan]), torch.tensor([3, 0])
    for output in (
        losses.npo_loss(logps, reference, num_tokens=n),
        losses.simnpo_loss(logps, n),
        losses.dpo_loss(logps, logps, reference, reference, num_chosen_tokens=n, num_rejected_tokens=torch.ones(2)),
        losses.dpo_loss(logps, logps, reference, reference, num_chosen_tokens=torch.ones(2), num_rejected_tokens=n),
    ):
        assert output.count == 1
        assert output.loss.isfinite()
        assert gradient(output.loss, logps).isfinite().all()
        assert all(value.isfinite() for value in output.metrics.values())


def test_dpo_metrics_describe_the_margin() -> None:
    zero, n = torch.zeros(2), torch.ones(2)
    output = losses.dpo_loss(
        torch.tensor([3.0, -1.0]), zero, zero, zero, num_chosen_tokens=n, num_rejected_tokens=n, beta=0.5
    )
    assert output.metrics["accuracy"] == 0.5
    assert output.metrics["reward_margin"] == 0.5


def test_sequence_losses_refuse_a_bad_beta_and_shapes_that_would_broadcast() -> None:
    logps, n = torch.zeros(3), torch.ones(3)
    with pytest.raises(ValueError, match="beta must be positive, got 0"):
        losses.npo_loss(logps, logps, num_tokens=n, beta=0.0)
    with pytest.raises(ValueError, match="one shape"):
        losses.npo_loss(logps, logps[:, None], num_tokens=n)
    with pytest.raises(ValueError, match="one shape"):
        losses.simnpo_loss(logps[:, None], n[:, None])
