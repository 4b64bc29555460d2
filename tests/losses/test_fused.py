"""The fused head in float64: values, gradients and gradcheck against whole logits; odd shapes, empty masks, errors."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_unlearn.losses import rows
from hf_unlearn.losses.blocks import LinearBlocks
from hf_unlearn.losses.fused import KnownLogpSum, LogpSum, RowSum, TopGap, WeightTap
from hf_unlearn.losses.head import OutputHead
from hf_unlearn.losses.scores import FullScores, FusedScores, Scores, response_index, through_log_probs

B, T, D, V = 3, 9, 6, 23
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaled": {"scale": 0.3},
    "capped": {"cap": 2.0},
    "both": {"scale": 1.7, "cap": 3.0},
}


def problem(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(B, T, D, dtype=torch.double, generator=generator, requires_grad=True)
    labels = torch.randint(0, V, (B, T), generator=generator)
    labels[0, :4] = -100
    labels[1, 6:] = -100
    labels[1, 2] = -100  # a hole
    labels[2, 1:] = -100  # a row without response: its first token cannot be predicted
    weights = torch.rand(int(response_index(labels).numel()), dtype=torch.double, generator=generator)
    return hidden, labels, weights


def linear(bias: bool) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(D, V, bias=bias).double()


def sequence(scores: Scores) -> Tensor:
    return through_log_probs(lambda logp: nn.functional.softplus(0.1 * scores.row_sums(logp)).square().sum(), scores)


def reference(labels: Tensor) -> FullScores:
    return FullScores(torch.randn(B, T, V, dtype=torch.double, generator=torch.Generator().manual_seed(5)), labels)


def known(scores: Scores) -> Scores:
    scores.log_probs()
    return scores


CALLS: dict[str, Callable[[Scores, Tensor, Tensor], Tensor]] = {
    "nll": lambda s, w, labels: s.of_logp(rows.negative)[0],
    "nll, known": lambda s, w, labels: known(s).of_logp(rows.negative)[0],
    "ascent, weighted": lambda s, w, labels: s.of_logp(rows.identity, w)[0],
    "wga": lambda s, w, labels: s.of_logp(partial(rows.weighted_ascent, beta=0.5), w)[0],
    "satimp": lambda s, w, labels: s.of_logp(rows.saturation_importance)[0],
    "kl to uniform": lambda s, w, labels: s.of_rows(rows.row_kl_to_uniform, w)[0],
    "entropy": lambda s, w, labels: s.of_rows(rows.row_missing_entropy)[0],
    "lmf": lambda s, w, labels: s.margin_squared(w)[0],
    "sequences": lambda s, w, labels: sequence(s),
    "undial": lambda s, w, labels: s.of_pairs(rows.row_undial, reference(labels), w)[0],
    "kl to reference": lambda s, w, labels: s.of_pairs(rows.row_kl_to_reference, reference(labels))[0],
}


@pytest.mark.parametrize("chunk", [1, 4, None])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("call", CALLS)
def test_values_and_gradients_are_those_of_whole_logits(call: str, head: str, bias: bool, chunk: int | None) -> None:
    hidden, labels, weights = problem()
    module = linear(bias)
    output = OutputHead(module=module, chunk_size=chunk, **HEADS[head])
    inputs = [hidden, *module.parameters()]
    want = CALLS[call](FullScores(output.logits(hidden), labels), weights, labels)
    got = CALLS[call](FusedScores(output, hidden, labels), weights, labels)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    for one, other in zip(
        torch.autograd.grad(3.0 * got, inputs), torch.autograd.grad(3.0 * want, inputs), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", ["logp", "known logp", "rows", "pairs"])
def test_gradients_of_the_sums_are_central_differences(kind: str, head: str) -> None:
    hidden, _, _ = problem()
    module, n = linear(True), 7
    x = hidden.detach().flatten(0, 1)[:n].clone().requires_grad_()
    output = OutputHead(module=module, chunk_size=3, **HEADS[head])
    generator = torch.Generator().manual_seed(2)
    targets = torch.randint(0, V, (n,), generator=generator)
    weights = torch.rand(n, dtype=torch.double, generator=generator)
    others = torch.randn(n, V, dtype=torch.double, generator=generator)

    def total(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if kind == "logp":
            return LogpSum.apply(x, weight, bias, None, targets, weights, output, rows.negative)[0]
        if kind == "known logp":
            known = LinearBlocks(output, x.detach(), weight.detach(), bias.detach()).statistics(targets)
            return KnownLogpSum.apply(x, weight, bias, None, targets, weights, output, rows.negative, known)[0]
        if kind == "rows":
            return RowSum.apply(x, weight, bias, None, targets, weights, output, rows.row_kl_to_uniform, None)[0]
        pick = others.__getitem__
        return RowSum.apply(x, weight, bias, None, targets, weights, output, rows.row_undial, pick)[0]

    leaves = (x, module.weight, module.bias)
    for leaf, grad in zip(leaves, torch.autograd.grad(total(*leaves), leaves), strict=True):
        torch.testing.assert_close(grad, slopes(lambda: total(*leaves), leaf), rtol=1e-6, atol=1e-8)


@torch.no_grad()
def slopes(function: Callable[[], Tensor], leaf: Tensor, step: float = 1e-5) -> Tensor:
    """Central differences; torch's gradcheck walks one graph several times, and these sums keep theirs for one pass."""
    result = torch.zeros_like(leaf)
    for place in range(leaf.numel()):
        flat, here = leaf.view(-1), leaf.view(-1)[place].item()
        flat[place] = here + step
        above = function()
        flat[place] = here - step
        result.view(-1)[place] = (above - function()) / (2 * step)
        flat[place] = here
    return result


@pytest.mark.parametrize("n", [0, 1, 7])
@pytest.mark.parametrize("chunk", [1, 2, None])
@pytest.mark.parametrize("head", HEADS)
def test_statistics_of_blocks_are_those_of_whole_rows(head: str, chunk: int | None, n: int) -> None:
    hidden, _, _ = problem()
    module, x = linear(True), hidden.detach().flatten(0, 1)[:n]
    output = OutputHead(module=module, chunk_size=chunk, **HEADS[head])
    with torch.no_grad():
        module.weight[5] = module.weight[11]  # a tie: the first of both is the arg-max, whatever block it is in
        module.bias[5] = module.bias[11] = 9.0
        targets = torch.randint(0, V, (n,), generator=torch.Generator().manual_seed(3))
        known = LinearBlocks(output, x, module.weight, module.bias).statistics(targets)
        logits = output.logits(x)
    torch.testing.assert_close(known.logp, rows.target_log_probs(logits, targets), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(known.maximum, logits.amax(-1, keepdim=True) if n else logits[:, :1])
    torch.testing.assert_close(known.mass, (logits - known.maximum).exp().sum(-1, keepdim=True))
    torch.testing.assert_close(known.argmax, torch.full((n,), 5))


def test_a_second_backward_pass_over_one_graph_is_refused() -> None:
    hidden, labels, _ = problem()
    total, _ = FusedScores(OutputHead(module=linear(False)), hidden, labels).of_logp(rows.negative)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="asked for twice"):
        total.backward()


def test_gradcheck_of_the_margin() -> None:
    hidden, _, _ = problem()
    module = linear(True)
    x = hidden.detach().flatten(0, 1)[:5].requires_grad_()
    top = module(x).argmax(-1)
    assert torch.autograd.gradcheck(lambda *leaves: TopGap.apply(*leaves, None, top), (x, module.weight, module.bias))


def test_the_margin_needs_two_rows_of_the_head_for_a_position() -> None:
    """Slow twin of the trick: the gradient by hand, position by position, with no product over the vocabulary."""
    hidden, _, _ = problem()
    module = linear(True)
    x = hidden.detach().flatten(0, 1)[:5].requires_grad_()
    top = module(x).argmax(-1)
    gap = TopGap.apply(x, module.weight, module.bias, None, top)
    margin = rows.row_margin(module(x))
    torch.testing.assert_close(gap, margin)
    grad_hidden, grad_weight, grad_bias = torch.autograd.grad(gap.square().sum(), [x, module.weight, module.bias])
    want_weight, want_bias = torch.zeros_like(module.weight), torch.zeros_like(module.bias)
    for n in range(5):
        slope = torch.full((V,), -1.0 / V, dtype=torch.double)
        slope[top[n]] += 1.0
        slope *= 2.0 * margin[n].detach()
        torch.testing.assert_close(grad_hidden[n], slope @ module.weight)
        want_weight += slope.outer(x[n].detach())
        want_bias += slope
    torch.testing.assert_close(grad_weight, want_weight)
    torch.testing.assert_close(grad_bias, want_bias)


@pytest.mark.parametrize("call", CALLS)
def test_no_response_at_all_is_a_differentiable_zero(call: str) -> None:
    hidden, labels, _ = problem()
    labels = torch.full_like(labels, -100)
    module = linear(True)
    total = CALLS[call](FusedScores(OutputHead(module=module), hidden, labels), torch.zeros(0), labels)
    assert float(total.detach()) == (0.0 if call != "sequences" else pytest.approx(B * 0.6931471805599453**2))
    grads = torch.autograd.grad(total, [hidden, *module.parameters()])
    assert all(not value.any() for value in grads)


def test_nothing_is_computed_for_gradients_that_nobody_wants() -> None:
    hidden, labels, _ = problem()
    module = linear(False).requires_grad_(False)
    scores = FusedScores(OutputHead(module=module), hidden, labels)
    total, values = scores.of_logp(rows.negative)
    (grad,) = torch.autograd.grad(total, hidden)
    assert grad.any()
    assert not values.requires_grad
    with torch.no_grad():
        total, _ = scores.of_logp(rows.negative)
    assert not total.requires_grad


def test_what_lies_outside_the_response_reaches_nothing() -> None:
    hidden, labels, _ = problem()
    index = response_index(labels)
    broken = hidden.detach().clone().flatten(0, 1)
    outside = torch.ones(B * T, dtype=torch.bool)
    outside[index] = False
    broken[outside] = float("nan")
    broken = broken.view(B, T, D).requires_grad_()
    total, _ = FusedScores(OutputHead(module=linear(False)), broken, labels).margin_squared()
    (grad,) = torch.autograd.grad(total, broken)
    assert total.isfinite()
    assert grad.isfinite().all()
    assert not grad.flatten(0, 1)[outside].any()


def test_layout_helpers_agree_with_a_loop() -> None:
    hidden, labels, _ = problem()
    scores = FusedScores(OutputHead(module=linear(False)), hidden, labels)
    places = [(b, t) for b in range(B) for t in range(T - 1) if labels[b, t + 1] != -100]
    assert scores.index.tolist() == [b * T + t for b, t in places]
    assert scores.targets.tolist() == [int(labels[b, t + 1]) for b, t in places]
    assert scores.lengths.tolist() == [sum(b == row for row, _ in places) for b in range(B)]
    values = torch.arange(1.0, 1.0 + len(places))
    scattered = scores.scatter(values)
    assert scattered.shape == (B, T - 1)
    assert [float(scattered[b, t]) for b, t in places] == values.tolist()
    assert float(scattered.sum()) == float(values.sum())
    assert torch.equal(scores.gather(scattered), values)
    assert torch.equal(scores.mask, scattered > 0)
    assert scores.row_sums(values).tolist() == [
        sum(v for v, (b, _) in zip(values.tolist(), places, strict=True) if b == row) for row in range(B)
    ]


@pytest.mark.parametrize(
    ("arguments", "message"), [({"chunk_size": 0}, "chunk_size is 0"), ({"cap": -1.0}, "cap is -1")]
)
def test_impossible_heads_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OutputHead(module=linear(False), **arguments)


@pytest.mark.parametrize("order", ["sum, rows", "rows, sum", "rows", "sum, sum", "sum, rows, sum, rows"])
def test_a_tap_adds_up_whatever_comes_in_which_order(order: str) -> None:
    """Scale and mean row are multiplied in late, in one pass; each order of uses must give the plain sum."""
    layer, generator = linear(bias=False), torch.Generator().manual_seed(1)
    tap, want, tokens = WeightTap(layer.weight), torch.zeros(V, D, dtype=torch.double), []
    for kind in order.split(", "):
        if kind == "sum":
            grad = torch.randn(V, D, dtype=torch.double, generator=generator)
            scale = torch.randn((), dtype=torch.double, generator=generator)
            want = want + scale * grad
            tokens.append(tap.collect(grad.clone(), scale))
        else:
            everywhere = torch.randn(D, dtype=torch.double, generator=generator)
            rows_of, index = torch.randn(4, D, dtype=torch.double, generator=generator), torch.tensor([3, 3, 0, 22])
            want = want + everywhere
            want = want.index_add(0, index, rows_of)
            tokens.append(tap.collect_rows(everywhere, index, rows_of))
    assert [token is not None for token in tokens] == [True] + [False] * (len(tokens) - 1), "one use hands on"
    torch.testing.assert_close(tap.take(), want)


def test_a_step_leaves_no_cycle_of_the_tap() -> None:
    """A cycle would keep every step's graph until the collector comes."""
    layer = linear(bias=False)
    hidden, labels, _ = problem()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        tap = WeightTap(layer.weight)
        scores = FusedScores(OutputHead(module=layer), hidden, labels, tap=tap)
        total = scores.of_logp(rows.negative)[0] + scores.margin_squared()[0]
        total.backward()
        alive = weakref.ref(tap)
        del tap, scores, total
        assert alive() is None
    finally:
        if was_enabled:
            gc.enable()
