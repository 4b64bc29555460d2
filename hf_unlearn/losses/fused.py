"""Losses straight from hidden states through a linear head, without logits for the whole batch.

Shapes: N response positions, d hidden size, V vocabulary. Some logits live only long enough to give their values and,
because the weight of every row is known, their gradients as well: forward does the work of forward and backward,
backward is one multiplication. (The idea of accumulating in forward is Liger Kernel's, arXiv 2410.10989.)
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_unlearn.losses.blocks import LinearBlocks, RowStatistics, compute_dtype
from hf_unlearn.losses.head import OutputHead
from hf_unlearn.losses.rows import LogpFunction, PairedRowFunction, RowFunction, upcast


class WeightTap:
    """
    One gradient buffer for all uses of the head's weight in a forward pass.

    Autograd would hold a `(V, d)` gradient for each use and add them; here the uses add to one buffer, and only the
    tap hands it on. `weight` stands for the parameter; it shares its memory.

    Args:
        parameter (`Tensor`):
            The head's weight `(V, d)`, which requires a gradient.
    """

    def __init__(self, parameter: Tensor) -> None:
        self._buffer: Tensor | None = None
        self._scale: Tensor | None = None  # of the buffer, not multiplied in yet
        self._everywhere: Tensor | None = None  # added to every row
        self._rows: list[tuple[Tensor, Tensor]] = []
        self.weight: Tensor = _Tap.apply(parameter, self)

    def collect(self, grad: Tensor, scale: Tensor) -> Tensor | None:
        """Adds `scale * grad`, and may keep `grad`; returns what a backward function must return for the weight."""
        first, scale = self._is_empty, scale.to(grad.dtype)
        if self._buffer is None:
            self._buffer, self._scale = grad, scale
        else:
            self._settle().addcmul_(grad, scale)
        return self._token() if first else None

    def collect_rows(self, everywhere: Tensor, index: Tensor, rows: Tensor) -> Tensor | None:
        """Adds `everywhere` `(d,)` to every row, and `rows` `(N, d)` to the rows `index` `(N,)`."""
        first = self._is_empty
        self._everywhere = everywhere if self._everywhere is None else self._everywhere + everywhere
        self._rows.append((index, rows))
        return self._token() if first else None

    @property
    def _is_empty(self) -> bool:
        return self._buffer is None and self._everywhere is None

    def _token(self) -> Tensor:
        # One use in each backward pass must hand on a gradient, so that autograd comes to the tap; a zero of no size.
        return self.weight.new_zeros(()).expand(self.weight.shape)

    def _settle(self) -> Tensor:
        """The dense part with its scale multiplied in."""
        assert self._buffer is not None
        if self._scale is not None:
            self._buffer.mul_(self._scale)
            self._scale = None
        return self._buffer

    def take(self) -> Tensor:
        """The sum; the tap is empty afterwards. Scale and what goes to every row cost one pass together."""
        buffer, everywhere = self._buffer, self._everywhere
        if buffer is None:
            assert everywhere is not None
            buffer = everywhere.expand(self.weight.shape).clone()
        elif everywhere is None:
            buffer = self._settle()
        elif self._scale is None:
            buffer.add_(everywhere.to(buffer.dtype))
        else:
            torch.addcmul(everywhere.to(buffer.dtype), buffer, self._scale, out=buffer)
        for index, rows in self._rows:
            buffer.index_add_(0, index, rows.to(buffer.dtype))
        self._buffer = self._scale = self._everywhere = None
        self._rows = []
        return buffer


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: Tensor, tap: WeightTap) -> Tensor:
        # Weak, or tap, weight and this node would hold each other until the collector comes. The uses hold the tap.
        ctx.tap = weakref.ref(tap)
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return ctx.tap().take().to(grads[0].dtype), None


class _Accumulator:
    """Chunks of logits of a linear head, and the gradients that are collected from them."""

    def __init__(self, head: OutputHead, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Any) -> None:
        self.head = head
        self.dtype = compute_dtype(weight)
        self.hidden = hidden.to(self.dtype)
        self.weight = weight.detach().to(self.dtype)
        self.bias = None if bias is None else bias.detach().to(self.dtype)
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        half = weight.dtype in (torch.float16, torch.bfloat16)
        self.grad_hidden = torch.zeros_like(hidden) if needs[0] else None
        # A half weight gets a half gradient anyway; a float32 weight under autocast keeps a float32 sum.
        self.grad_weight = torch.empty_like(weight, dtype=weight.dtype if half else wide) if needs[1] else None
        self._is_written = False
        self.grad_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and needs[2] else None

    @property
    def needs_grad(self) -> bool:
        return any(grad is not None for grad in (self.grad_hidden, self.grad_weight, self.grad_bias))

    def slices(self) -> Any:
        return self.head.chunks(len(self.hidden), len(self.weight), self.hidden.device)

    def rows(self, part: slice) -> Tensor:
        """Finished logits `(n, V)` of a chunk."""
        with torch.autocast(self.hidden.device.type, enabled=False):
            return self.head.finish(F.linear(self.hidden[part], self.weight, self.bias))

    def add(self, part: slice, grad: Tensor, rows: Tensor) -> None:
        """Takes the gradient `(n, V)` of finished logits; both tensors may be overwritten."""
        grad = self.head.unfinish_(grad, rows)
        if self.grad_bias is not None:
            self.grad_bias += grad.sum(dim=0)
        with torch.autocast(self.hidden.device.type, enabled=False):
            grad = grad.to(self.dtype)
            if self.grad_hidden is not None:
                self.grad_hidden[part] = (grad @ self.weight).to(self.grad_hidden.dtype)
            if self.grad_weight is None:
                return
            first, self._is_written = not self._is_written, True
            if self.grad_weight.dtype != self.dtype:
                product = grad.t() @ self.hidden[part]
                self.grad_weight.copy_(product) if first else self.grad_weight.add_(product)
            elif first:
                torch.mm(grad.t(), self.hidden[part], out=self.grad_weight)
            else:
                self.grad_weight.addmm_(grad.t(), self.hidden[part])

    def grads(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of hidden states, weight and bias; None where not needed."""
        if self.grad_weight is not None and not self._is_written:
            self.grad_weight.zero_()
        return self.grad_hidden, self.grad_weight, self.grad_bias


class _Fused(torch.autograd.Function):
    """Base of the two sums below: backward scales what forward has accumulated."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Any) -> Any:
        """Scales the gradients of forward, in place: a second pass over the same graph has nothing left to scale."""
        if ctx.grads is None:
            raise RuntimeError(
                "The gradients of a fused loss were asked for twice. They are kept for one backward pass; run the "
                "forward pass again, or use whole logits (fused_head=False)."
            )
        tapped = None
        if ctx.tap is not None and ctx.grads[1] is not None:
            tapped = ctx.tap.collect(ctx.grads[1], grad_total)
            ctx.grads = (ctx.grads[0], None, ctx.grads[2])
        grads = [
            None if grad is None else grad.mul_(grad_total.to(grad.dtype)).to(dtype)
            for grad, dtype in zip(ctx.grads, ctx.dtypes, strict=True)
        ]
        ctx.grads = None
        return (grads[0], grads[1] if tapped is None else tapped, grads[2], *[None] * ctx.others)

    @staticmethod
    def finish(
        ctx: Any,
        grads: tuple[Tensor | None, ...],
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tap: WeightTap | None,
        others: int,
    ) -> None:
        """Keeps what backward needs. Not by save_for_backward: these are nobody's inputs, and they change in place."""
        ctx.grads = grads
        ctx.dtypes = [hidden.dtype, weight.dtype, hidden.dtype if bias is None else bias.dtype]
        ctx.others, ctx.tap = others, tap


class LogpSum(_Fused):
    """
    `sum_n w_n f(log p_n)` and the values `f(log p_n)`, where the gradient by the logits is `w f' (e_y - p)`.

    One pass, whole rows at a time: three products with the vocabulary.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tap: WeightTap | None,
        targets: Tensor,
        row_weights: Tensor | None,
        head: OutputHead,
        function: LogpFunction,
    ) -> tuple[Tensor, Tensor]:
        """`(total, values (N,))`; the gradients are ready when it returns."""
        sums = _Accumulator(head, hidden, weight, bias, ctx.needs_input_grad)
        wide = upcast(hidden).dtype
        values = torch.zeros(len(hidden), dtype=wide, device=hidden.device)
        for part in sums.slices():
            rows, labels = sums.rows(part), targets[part].unsqueeze(-1)
            chosen = rows.gather(-1, labels)
            top = rows.amax(dim=-1, keepdim=True)
            # `rows` itself is needed again only for the slope of a cap
            mass = (rows if head.cap is None else rows.clone()).sub_(top).exp_()
            size = mass.sum(dim=-1, keepdim=True)
            with torch.enable_grad():
                logp = (chosen - top - size.log()).squeeze(-1).requires_grad_()
                value = function(logp)
            values[part] = value.detach().to(wide)
            if not sums.needs_grad:
                continue
            scale = torch.ones_like(value) if row_weights is None else row_weights[part].to(value)
            (slope,) = torch.autograd.grad(value, logp, scale)
            slope = slope.unsqueeze(-1)
            grad = mass.mul_(-slope / size).scatter_add_(-1, labels, slope)
            sums.add(part, grad, rows)
        _Fused.finish(ctx, sums.grads(), hidden, weight, bias, tap, 5)
        ctx.mark_non_differentiable(values)
        total = (values if row_weights is None else values * row_weights.to(values)).sum()
        return total, values


class KnownLogpSum(_Fused):
    """[`LogpSum`] of rows whose statistics are known: by blocks of the vocabulary, three products more."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tap: WeightTap | None,
        targets: Tensor,
        row_weights: Tensor | None,
        head: OutputHead,
        function: LogpFunction,
        known: RowStatistics,
    ) -> tuple[Tensor, Tensor]:
        """`(total, values (N,))`; the gradients are ready when it returns. `known` is of the same rows."""
        with torch.enable_grad():
            logp = known.logp.detach().requires_grad_()
            value = function(logp)
        values = value.detach()
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[2])
        grads: tuple[Tensor | None, ...] = (None, None, None)
        if any(needs):
            scale = torch.ones_like(value) if row_weights is None else row_weights.to(value)
            (slope,) = torch.autograd.grad(value, logp, scale)
            grads = LinearBlocks(head, hidden, weight.detach(), bias).gradients(targets, slope, known, needs)
        _Fused.finish(ctx, grads, hidden, weight, bias, tap, 6)
        ctx.mark_non_differentiable(values)
        total = (values if row_weights is None else values * row_weights.to(values)).sum()
        return total, values


class RowSum(_Fused):
    """`sum_n w_n f(z_n)` and the values `f(z_n)` for any function of single rows, perhaps with a reference's."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tap: WeightTap | None,
        targets: Tensor,
        row_weights: Tensor | None,
        head: OutputHead,
        function: RowFunction | PairedRowFunction,
        reference: Any,
    ) -> tuple[Tensor, Tensor]:
        """`(total, values (N,))`; the gradients are ready when it returns."""
        sums = _Accumulator(head, hidden, weight, bias, ctx.needs_input_grad)
        values = torch.zeros(len(hidden), dtype=upcast(hidden).dtype, device=hidden.device)
        for part in sums.slices():
            others = () if reference is None else (reference(part), targets[part])
            with torch.enable_grad():
                rows = sums.rows(part).requires_grad_()
                value = function(rows, *others)
            values[part] = value.detach().to(values.dtype)
            if not sums.needs_grad:
                continue
            scale = torch.ones_like(value) if row_weights is None else row_weights[part].to(value)
            (grad,) = torch.autograd.grad(value, rows, scale)
            sums.add(part, grad, rows.detach())
        _Fused.finish(ctx, sums.grads(), hidden, weight, bias, tap, 6)
        ctx.mark_non_differentiable(values)
        total = (values if row_weights is None else values * row_weights.to(values)).sum()
        return total, values


class TopGap(torch.autograd.Function):
    """
    `(W_a - mean_k W_k) h + (b_a - mean_k b_k)`: the margin of a linear head, given the arg-max `a` of every row.

    Its gradient needs two rows of the head for each position, so backward is a gather and a rank-one update; no
    product with the vocabulary is formed (`d margin / dz = e_argmax - 1/V`).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, tap: WeightTap | None, top: Tensor
    ) -> Tensor:
        """Margins `(N,)` of hidden states `(N, d)` for the arg-max `(N,)`."""
        wide = upcast(hidden).dtype
        direction = weight.index_select(0, top).to(wide) - weight.mean(dim=0, dtype=wide)
        gap = (direction * hidden.to(wide)).sum(dim=-1)
        if bias is not None:
            gap = gap + bias.index_select(0, top).to(wide) - bias.mean(dtype=wide)
        ctx.save_for_backward(hidden, direction, top)
        ctx.shape, ctx.dtype, ctx.tap = weight.shape, weight.dtype, tap
        ctx.bias_dtype = None if bias is None else bias.dtype
        return gap

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Gathered rows and one rank-one update."""
        (grad,) = grads
        hidden, direction, top = ctx.saved_tensors
        grad_hidden = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_hidden = (grad.unsqueeze(-1) * direction).to(hidden.dtype)
        if ctx.needs_input_grad[1]:
            outer = grad.unsqueeze(-1) * hidden.to(grad.dtype)
            everywhere = (outer.sum(dim=0) / -ctx.shape[0]).to(ctx.dtype)
            if ctx.tap is not None:
                grad_weight = ctx.tap.collect_rows(everywhere, top, outer)
            else:
                grad_weight = everywhere.expand(ctx.shape).clone().index_add_(0, top, outer.to(ctx.dtype))
        if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
            flat = (grad.sum() / -ctx.shape[0]).to(ctx.bias_dtype)
            grad_bias = flat.expand(ctx.shape[0]).clone().index_add_(0, top, grad.to(ctx.bias_dtype))
        return grad_hidden, grad_weight, grad_bias, None, None
