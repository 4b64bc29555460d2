"""Losses on hidden states: against loops, against the published formulas, and where vectors vanish."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_unlearn.losses import (
    LossOutput,
    control_vector,
    rerouting_loss,
    rerouting_retain_loss,
    rmu_forget_loss,
    rmu_retain_loss,
)

Vector = list[float]


def rmu_twin(h: Vector, target: Vector) -> float:
    return sum((a - b) ** 2 for a, b in zip(h, target, strict=True)) / len(h)


def rerouting_twin(h: Vector, frozen: Vector) -> float:
    lengths = math.hypot(*h) * math.hypot(*frozen)
    return max(sum(a * b for a, b in zip(h, frozen, strict=True)) / lengths, 0.0) if lengths > 0 else 0.0


@dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    loss: Callable[[Tensor, Tensor, Tensor], LossOutput]  # (hidden, frozen, mask)
    twin: Callable[[Vector, Vector], float]  # value of one token


def rmu_forget(hidden: Tensor, frozen: Tensor, mask: Tensor) -> LossOutput:
    """With the frozen state of the first token as control vector."""
    return rmu_forget_loss(hidden, frozen[0, 0], mask)


CASES = [
    Case(name="rmu_forget", loss=rmu_forget, twin=rmu_twin),
    Case(name="rmu_retain", loss=rmu_retain_loss, twin=rmu_twin),
    Case(name="rerouting", loss=rerouting_loss, twin=rerouting_twin),
    Case(name="rerouting_retain", loss=rerouting_retain_loss, twin=math.dist),
]
PAIRED = [case for case in CASES if case.name != "rmu_forget"]
all_losses = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
paired_losses = pytest.mark.parametrize("case", PAIRED, ids=lambda case: case.name)


def make_batch(b: int, t: int, d: int, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden and frozen states in float64, and a mask with holes and (from 2 rows on) an empty row."""
    g = torch.Generator().manual_seed(seed)
    hidden = 3 * torch.randn(b, t, d, generator=g, dtype=torch.float64)
    frozen = hidden + 2 * torch.randn(b, t, d, generator=g, dtype=torch.float64)
    mask = torch.rand(b, t, generator=g) < 0.6
    mask[0, 0] = True
    if b > 1:
        mask[b // 2] = False
    return hidden, frozen, mask


def values_of(case: Case, hidden: Tensor, frozen: Tensor, mask: Tensor) -> list[float]:
    """The twin's value of every token under the mask."""
    values = []
    for b in range(hidden.shape[0]):
        for t in range(hidden.shape[1]):
            if mask[b, t]:
                other = frozen[0, 0] if case.name == "rmu_forget" else frozen[b, t]
                values.append(case.twin(hidden[b, t].tolist(), other.tolist()))
    return values


def gradient(loss: Tensor, at: Tensor) -> Tensor:
    return torch.autograd.grad(loss, at)[0]


@all_losses
@pytest.mark.parametrize("shape", [(3, 6, 5), (1, 1, 1), (2, 9, 1), (5, 1, 3), (4, 7, 17)], ids=str)
def test_values_and_counts_equal_the_twin(case: Case, shape: tuple[int, int, int]) -> None:
    hidden, frozen, mask = make_batch(*shape)
    expected = values_of(case, hidden, frozen, mask)
    output = case.loss(hidden, frozen, mask)
    assert output.count.item() == len(expected)
    assert output.total.item() == pytest.approx(sum(expected), rel=1e-9, abs=1e-12)
    assert output.loss.item() == pytest.approx(sum(expected) / len(expected), rel=1e-9, abs=1e-12)
    for value in (output.count, *output.metrics.values()):
        assert value.shape == ()
        assert not value.requires_grad


@all_losses
def test_gradient_equals_finite_differences_and_leaves_the_frozen_side_alone(case: Case) -> None:
    hidden, frozen, mask = make_batch(3, 4, 3, seed=1)
    frozen.requires_grad_()
    assert torch.autograd.gradcheck(lambda h: case.loss(h, frozen.detach(), mask).total, hidden.requires_grad_())
    case.loss(hidden, frozen, mask).loss.backward()
    assert frozen.grad is None


@all_losses
@pytest.mark.parametrize("poison", [1.0, math.nan])
def test_an_empty_mask_is_a_zero_that_can_be_differentiated(case: Case, poison: float) -> None:
    hidden = torch.full((2, 5, 3), poison, requires_grad=True)
    output = case.loss(hidden, torch.full((2, 5, 3), poison), torch.zeros(2, 5, dtype=torch.bool))
    assert output.loss.item() == output.total.item() == output.count.item() == 0
    output.loss.backward()
    assert hidden.grad is not None
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))
    assert all(value == 0 for value in output.metrics.values())


@all_losses
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_tokens_outside_the_mask_cannot_poison_the_loss(case: Case, poison: float) -> None:
    hidden, frozen, mask = make_batch(4, 6, 5)
    clean = case.loss(hidden, frozen, mask).loss
    dirty = hidden.masked_fill(~mask.unsqueeze(-1), poison).requires_grad_()
    output = case.loss(dirty, frozen.masked_fill(~mask.unsqueeze(-1), poison), mask)
    assert torch.equal(output.loss, clean)
    output.loss.backward()
    assert dirty.grad is not None
    assert dirty.grad.isfinite().all()
    assert not dirty.grad[~mask].any()


@all_losses
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_states_are_computed_in_float32(case: Case, dtype: torch.dtype) -> None:
    hidden, frozen, mask = make_batch(3, 8, 300)
    half, half_frozen = hidden.to(dtype).requires_grad_(), frozen.to(dtype)
    exact = half.detach().double().requires_grad_()
    output, expected = case.loss(half, half_frozen, mask), case.loss(exact, half_frozen.double(), mask)
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss.double(), expected.loss, rtol=1e-5, atol=1e-6)
    output.loss.backward()
    expected.loss.backward()
    assert half.grad is not None
    assert exact.grad is not None
    assert half.grad.dtype == dtype
    # One rounding of the result to the half type, relative to the largest entry; float16 ends at 6e-8.
    atol = 0.01 * exact.grad.abs().max().item() + 6e-8
    torch.testing.assert_close(half.grad.double(), exact.grad, rtol=0, atol=atol)


@all_losses
def test_states_rounded_to_bfloat16_give_about_the_loss_of_float32(case: Case) -> None:
    hidden, frozen, mask = (x.float() if x.is_floating_point() else x for x in make_batch(3, 8, 300))
    rounded = case.loss(hidden.bfloat16(), frozen.bfloat16(), mask)
    torch.testing.assert_close(rounded.loss, case.loss(hidden, frozen, mask).loss, rtol=0.01, atol=0)


@all_losses
def test_float32_frozen_states_of_a_half_model_are_not_rounded(case: Case) -> None:
    hidden, frozen, mask = make_batch(2, 5, 4)
    half = hidden.bfloat16()
    expected = case.loss(half.float(), frozen.float(), mask)
    output = case.loss(half, frozen.float(), mask)
    assert output.loss.dtype == torch.float32
    assert output.loss == expected.loss


@all_losses
@pytest.mark.parametrize("sizes", [[1, 1, 1, 1, 1], [2, 3], [4, 1]], ids=str)
def test_totals_over_splits_of_the_batch_add_up(case: Case, sizes: list[int]) -> None:
    hidden, frozen, mask = make_batch(5, 7, 4)
    if case.name == "rmu_forget":
        control = frozen[0, 0]
        whole = rmu_forget_loss(hidden, control, mask)
        parts = [rmu_forget_loss(h, control, m) for h, m in zip(hidden.split(sizes), mask.split(sizes), strict=True)]
    else:
        whole = case.loss(hidden, frozen, mask)
        pieces = zip(hidden.split(sizes), frozen.split(sizes), mask.split(sizes), strict=True)
        parts = [case.loss(*piece) for piece in pieces]
    torch.testing.assert_close(sum(part.total for part in parts), whole.total)
    assert sum(part.count for part in parts) == whole.count
    for name, mean in whole.metrics.items():
        torch.testing.assert_close(sum(part.metrics[name] * part.count for part in parts) / whole.count, mean)


# The published formulas, read off the papers and the releases and written down plainly. They know no mask.


def test_rmu_is_the_mean_squared_error_of_the_release_and_the_equation_of_the_paper_over_d() -> None:
    hidden, frozen, _ = make_batch(4, 6, 5)
    everything = torch.ones(4, 6, dtype=torch.bool)
    control = control_vector(5, scale=6.5, seed=0, dtype=torch.float64)
    forget = rmu_forget_loss(hidden, control, everything).loss
    retain = rmu_retain_loss(hidden, frozen, everything).loss
    # The release: mse_loss(activations, control), and alpha mse_loss(activations, frozen activations).
    torch.testing.assert_close(forget, F.mse_loss(hidden, control.expand_as(hidden)))
    torch.testing.assert_close(retain, F.mse_loss(hidden, frozen))
    # The paper: 1/L sum over the L tokens of ||M(t) - c u||_2^2, and of ||M(t) - M_frozen(t)||_2^2.
    unit = control / 6.5
    paper_forget = sum((hidden[b, t] - 6.5 * unit).norm() ** 2 for b in range(4) for t in range(6)) / 24
    paper_retain = sum((hidden[b, t] - frozen[b, t]).norm() ** 2 for b in range(4) for t in range(6)) / 24
    torch.testing.assert_close(5 * forget, paper_forget)
    torch.testing.assert_close(5 * retain, paper_retain)


def test_circuit_breakers_equal_the_formulas_of_the_release() -> None:
    hidden, frozen, mask = make_batch(4, 6, 5)
    # ReLU of the inner product of the normalised states, zero off the mask, summed and divided by the mask's sum.
    product = (hidden / hidden.norm(dim=-1, keepdim=True)) * (frozen / frozen.norm(dim=-1, keepdim=True))
    expected = (product * mask.unsqueeze(-1)).sum(dim=-1).relu().sum() / mask.sum()
    torch.testing.assert_close(rerouting_loss(hidden, frozen, mask).loss, expected)
    # The norm of the difference. The release averages over all positions with zeros at padding; here over the mask.
    kept = mask.unsqueeze(-1)
    over_all_positions = (kept * hidden - kept * frozen).norm(p=2, dim=-1).mean()
    output = rerouting_retain_loss(hidden, frozen, mask)
    torch.testing.assert_close(output.total / mask.numel(), over_all_positions)


# Where vectors vanish or coincide.


@paired_losses
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("ours", "theirs"), [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0), (1.0, 1.0), (1e-30, 1.0)])
def test_zero_equal_and_tiny_vectors_give_finite_values_and_gradients(
    case: Case, dtype: torch.dtype, ours: float, theirs: float
) -> None:
    hidden = torch.full((1, 2, 8), ours, dtype=dtype, requires_grad=True)
    frozen = torch.full((1, 2, 8), theirs, dtype=dtype)
    output = case.loss(hidden, frozen, torch.ones(1, 2, dtype=torch.bool))
    assert output.loss.isfinite()
    assert gradient(output.total, hidden).isfinite().all()


@pytest.mark.parametrize(("ours", "theirs"), [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_rerouting_leaves_a_zero_vector_where_it_is(ours: float, theirs: float) -> None:
    hidden = torch.full((1, 1, 8), ours, requires_grad=True)
    output = rerouting_loss(hidden, torch.full((1, 1, 8), theirs), torch.ones(1, 1, dtype=torch.bool))
    assert output.total == 0
    assert output.count == 1
    assert not gradient(output.total, hidden).any()


def test_rerouting_is_one_at_the_start_and_off_beyond_orthogonal() -> None:
    frozen = torch.tensor([[[2.0, 0.0], [2.0, 0.0], [2.0, 0.0], [2.0, 0.0]]])
    hidden = torch.tensor([[[5.0, 0.0], [0.0, 3.0], [-1.0, 0.1], [1.0, 1.0]]], requires_grad=True)
    mask = torch.ones(1, 4, dtype=torch.bool)
    output = rerouting_loss(hidden, frozen, mask)
    cosines = [1.0, 0.0, -1 / math.hypot(1, 0.1), math.sqrt(0.5)]
    assert output.total.item() == pytest.approx(1 + math.sqrt(0.5))
    assert output.metrics["cosine"].item() == pytest.approx(sum(cosines) / 4)
    grad = gradient(output.total, hidden)[0]
    torch.testing.assert_close(grad[0], torch.zeros(2), atol=1e-6, rtol=0)  # parallel: a maximum
    assert not grad[2].any()  # beyond orthogonal: done
    assert (grad[3] * hidden.detach()[0, 3]).sum().item() == pytest.approx(0, abs=1e-6)  # turns, does not shrink
    assert grad[3, 0] > 0


def test_gradient_of_the_rerouting_retain_loss_has_length_one_but_at_the_frozen_state() -> None:
    hidden, frozen, _ = make_batch(1, 3, 6)
    frozen[0, 1] = hidden[0, 1]
    frozen[0, 2] = hidden[0, 2] + 1e-7
    hidden.requires_grad_()
    output = rerouting_retain_loss(hidden, frozen, torch.ones(1, 3, dtype=torch.bool))
    lengths = gradient(output.total, hidden)[0].norm(dim=-1)
    torch.testing.assert_close(lengths, torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64))


@paired_losses
def test_retain_losses_are_zero_at_the_frozen_model(case: Case) -> None:
    hidden, _, mask = make_batch(3, 4, 5)
    start = case.loss(hidden, hidden.clone(), mask).loss
    torch.testing.assert_close(start.item(), 1.0 if case.name == "rerouting" else 0.0)


def test_descent_on_rmu_ends_on_the_control_vector() -> None:
    hidden, _, mask = make_batch(2, 4, 6)
    hidden.requires_grad_()
    control = control_vector(6, scale=20.0, seed=3, dtype=torch.float64)
    optimizer = torch.optim.SGD([hidden], lr=0.25 * 6 * mask.sum().item())
    for _ in range(60):
        optimizer.zero_grad()
        output = rmu_forget_loss(hidden, control, mask)
        output.loss.backward()
        optimizer.step()
    torch.testing.assert_close(hidden.detach()[mask], control.expand(int(mask.sum()), 6))
    assert output.metrics["activation_norm"].item() == pytest.approx(20)


# The control vector.


def test_control_vector_is_the_same_numbers_on_every_machine() -> None:
    vector = control_vector(4096, scale=6.5, seed=42)
    assert vector.shape == (4096,)
    assert vector[:3].tolist() == pytest.approx([0.010246560, 0.011084490, 0.021775313], rel=1e-6)
    assert torch.equal(vector, control_vector(4096, scale=6.5, seed=42))


def test_control_vector_has_the_length_asked_for_and_the_entries_of_the_release() -> None:
    vector = control_vector(4096, scale=6.5, seed=1, dtype=torch.float64)
    assert vector.norm().item() == pytest.approx(6.5)
    assert (vector >= 0).all()
    # Uniform in [0, 1) before the normalisation: the mean is half the largest entry, the variance a twelfth.
    uniform = vector / vector.max()
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.02)
    assert uniform.var().item() == pytest.approx(1 / 12, abs=0.005)


def test_control_vectors_of_two_seeds_have_a_cosine_near_three_quarters() -> None:
    first, second = (control_vector(4096, scale=1.0, seed=seed) for seed in (0, 1))
    assert not torch.equal(first, second)
    assert (first @ second).item() == pytest.approx(0.75, abs=0.03)


def test_control_vector_neither_reads_nor_moves_the_global_generator() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    vector = control_vector(16, scale=1.0, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(control_vector(16, scale=1.0, seed=7), vector)


def test_control_vector_in_another_type_is_the_rounded_one() -> None:
    exact = control_vector(33, scale=6.5, seed=0, dtype=torch.float64)
    for dtype in (torch.float32, torch.bfloat16):
        vector = control_vector(33, scale=6.5, seed=0, dtype=dtype, device="cpu")
        assert vector.dtype == dtype
        assert torch.equal(vector, exact.to(dtype))
    assert control_vector(33, scale=6.5, seed=0, device="meta").device.type == "meta"


@pytest.mark.parametrize("size", [0, -4])
def test_control_vector_refuses_a_size_that_is_not_positive(size: int) -> None:
    with pytest.raises(ValueError, match=f"must be positive, got {size}"):
        control_vector(size, scale=1.0, seed=0)


@pytest.mark.parametrize("scale", [0.0, -6.5, math.nan, math.inf])
def test_control_vector_refuses_a_scale_that_is_not_a_positive_number(scale: float) -> None:
    with pytest.raises(ValueError, match="must be a positive number"):
        control_vector(8, scale=scale, seed=0)


# What is refused.


@all_losses
@pytest.mark.parametrize("dtype", [torch.long, torch.float32], ids=str)
def test_labels_and_weights_are_refused_as_masks(case: Case, dtype: torch.dtype) -> None:
    hidden, frozen, mask = make_batch(2, 3, 4)
    with pytest.raises(TypeError, match="expected a boolean mask"):
        case.loss(hidden, frozen, mask.to(dtype))


@all_losses
def test_a_mask_of_another_shape_is_refused(case: Case) -> None:
    hidden, frozen, mask = make_batch(2, 3, 4)
    with pytest.raises(ValueError, match="without shifting"):
        case.loss(hidden, frozen, mask[:, 1:])
    for several in (hidden[None], hidden[..., 0], hidden[..., None]):
        with pytest.raises(ValueError, match="states of one layer"):
            case.loss(several, several, mask)


@paired_losses
def test_frozen_states_that_would_broadcast_are_refused(case: Case) -> None:
    hidden, frozen, mask = make_batch(2, 3, 4)
    with pytest.raises(ValueError, match="same batch and layer"):
        case.loss(hidden, frozen[:1], mask)


def test_a_control_vector_that_would_broadcast_is_refused() -> None:
    hidden, _, mask = make_batch(2, 3, 4)
    for control in (torch.zeros(1), torch.zeros(1, 1, 4), torch.tensor(0.0)):
        with pytest.raises(ValueError, match="expected a control vector of shape"):
            rmu_forget_loss(hidden, control, mask)


@pytest.mark.parametrize("loss", [rmu_forget_loss, rmu_retain_loss, rerouting_loss, rerouting_retain_loss])
@pytest.mark.parametrize("share", [0.5, 0.0], ids=["half", "empty"])
def test_positions_that_are_given_are_those_of_the_mask(loss: Callable[..., LossOutput], share: float) -> None:
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(3, 7, generator=generator) < share
    hidden, frozen = torch.randn(2, 3, 7, 5, generator=generator, dtype=torch.float64)
    other = control_vector(5, scale=2.0, seed=1) if loss is rmu_forget_loss else frozen
    found = []
    for positions in (None, mask.flatten().nonzero().squeeze(-1)):
        states = hidden.clone().requires_grad_(True)
        output = loss(states, other, mask, positions=positions)
        output.loss.backward()
        assert states.grad is not None
        found.append(torch.cat([output.loss.detach()[None], output.count[None], states.grad.flatten()]))
    assert torch.equal(found[0], found[1])
    assert found[0][1] == mask.sum()
