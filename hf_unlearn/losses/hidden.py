"""Losses on hidden states: RMU (arXiv 2403.03218) and representation rerouting (circuit breakers, arXiv 2406.04313).

Shapes: B batch, T tokens, d model width, N masked tokens of the whole batch.

All functions take the states of *one* layer, `hidden (B, T, d)`, and `mask (B, T)`, boolean, true at the tokens that
count. Nothing is shifted: the state at `t` belongs to token `t`, so an attention mask or `labels != -100` fits as it
is. Every token has one value and `count` is the number of tokens, so totals add over micro-batches and ranks. What the
other positions hold reaches neither the loss nor a gradient. Half types are computed in float32. For several layers,
average the outputs of the layers. `positions (N,)` are the true entries of the flattened mask, for a caller who has
them: looking for them makes the host wait for the device.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_unlearn.losses.rows import upcast
from hf_unlearn.losses.tokens import LossOutput, reduce_tokens


def control_vector(
    size: int,
    *,
    scale: float,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """The point that RMU moves forget activations to, `scale * u / ||u||` with the entries of `u` uniform in [0, 1).

    As in the paper's algorithm and in its release no entry is negative, so the vectors of two seeds have a cosine near
    3/4. The release draws on the model's device and in its type, and its numbers differ from machine to machine; here
    they depend on `size` and `seed` only. Save the seed with the model. Topics that are forgotten together get a seed
    each.

    Args:
        size (`int`): width `d` of the model.
        scale (`float`): length of the vector, the steering coefficient `c` of the paper, above the norm that the
            activations have: 6.5 for Zephyr-7B, whose forget activations start near 3 (the release's log).
        seed (`int`): seed of the generator.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): type of the result. The losses compute in
            float32 in any case.
        device (`torch.device` or `str`, *optional*): device of the result; drawn on the CPU in any case.

    Returns:
        `Tensor`: shape `(d,)`.

    Raises:
        ValueError: if `size` or `scale` is not positive.
    """
    if size < 1:
        raise ValueError(f"size is the width of the model and must be positive, got {size}")
    if not 0 < scale < math.inf:
        raise ValueError(f"scale is the length of the vector and must be a positive number, got {scale}")
    generator = torch.Generator(device="cpu").manual_seed(seed)
    # In float64, so that the order of the summation of the norm on another processor is rounded away.
    direction = torch.rand(size, generator=generator, dtype=torch.float64)
    return (scale * direction / torch.linalg.vector_norm(direction)).to(device=device, dtype=dtype)


def rmu_forget_loss(hidden: Tensor, control: Tensor, mask: Tensor, *, positions: Tensor | None = None) -> LossOutput:
    """RMU's forget loss, `||h_t - control||_2^2 / d` for each token (arXiv 2403.03218).

    This is the release's `mse_loss`: a mean over the width. The paper's equation sums over the width; as the factor
    `1/d` is on both of RMU's terms, the weight between them is the same. The release also averages over padding,
    which counts here only if the mask says so. The paper puts all tokens of a forget text under the mask.

    Args:
        hidden (`Tensor`): shape `(B, T, d)`, states of one layer on forget texts.
        control (`Tensor`): shape `(d,)`, from [`control_vector`]. Detached.
        mask (`Tensor`): shape `(B, T)`, boolean.
        positions (`Tensor`, *optional*): as in the module's docstring.

    Returns:
        [`LossOutput`]: in squared units of the activations; metric `activation_norm`, the mean of `||h_t||_2`, which
        RMU drives to the length of the control vector.

    Raises:
        TypeError: if the mask is not boolean.
        ValueError: if the shapes do not fit.
    """
    rows, mask = _masked_rows(hidden, mask, positions)
    if control.shape != hidden.shape[-1:]:
        raise ValueError(
            f"expected a control vector of shape (d,) = {tuple(hidden.shape[-1:])}, got {tuple(control.shape)}; make "
            "it with control_vector(hidden.shape[-1], ...)"
        )
    target = control.detach().to(rows)  # device and type
    norm = torch.linalg.vector_norm(rows.detach(), dim=-1)
    return reduce_tokens((rows - target).square().mean(dim=-1), mask, metrics={"activation_norm": norm})


def rmu_retain_loss(
    hidden: Tensor, frozen_hidden: Tensor, mask: Tensor, *, positions: Tensor | None = None
) -> LossOutput:
    """RMU's retain loss, `||h_t - h_t,frozen||_2^2 / d` for each token (arXiv 2403.03218).

    Zero at the model before unlearning. The paper weighs it with `alpha`, which is the caller's retain weight: 1200
    for Zephyr-7B (with `scale` 6.5 at layer 7); the release's command line defaults to 100 (with `scale` 20). The
    values of the released models are in docs/losses.md. As in [`rmu_forget_loss`] the mean over the width is the
    release's, and the paper's equation has the sum.

    Args:
        hidden (`Tensor`): shape `(B, T, d)`, states of one layer on retain texts.
        frozen_hidden (`Tensor`): shape `(B, T, d)`, the same of the model before unlearning. Detached.
        mask (`Tensor`): shape `(B, T)`, boolean.
        positions (`Tensor`, *optional*): as in the module's docstring.

    Returns:
        [`LossOutput`]: in squared units of the activations.

    Raises:
        TypeError: if the mask is not boolean.
        ValueError: if the shapes do not fit.
    """
    rows, frozen, mask = _masked_pairs(hidden, frozen_hidden, mask, positions)
    return reduce_tokens((rows - frozen).square().mean(dim=-1), mask)


def rerouting_loss(
    hidden: Tensor, frozen_hidden: Tensor, mask: Tensor, *, positions: Tensor | None = None
) -> LossOutput:
    """Representation rerouting, `relu(cos(h_t, h_t,frozen))` for each token (circuit breakers, arXiv 2406.04313).

    1 at the model before unlearning, 0 once the state is orthogonal to what it was or beyond, and then without
    gradient. Where either vector is zero the value is 0 and so is the gradient (the release divides by the norm and
    gives nan). Before the first step the two are parallel, and the gradient is zero but for rounding: an optimizer
    that rescales gradients, as Adam does, gets away from there.

    Args:
        hidden (`Tensor`): shape `(B, T, d)`, states of one layer on texts to break off.
        frozen_hidden (`Tensor`): shape `(B, T, d)`, the same of the model before unlearning. Detached.
        mask (`Tensor`): shape `(B, T)`, boolean.
        positions (`Tensor`, *optional*): as in the module's docstring.

    Returns:
        [`LossOutput`]: without unit, in [0, 1]; metric `cosine`, the mean of the cosine, which may be negative.

    Raises:
        TypeError: if the mask is not boolean.
        ValueError: if the shapes do not fit.
    """
    rows, frozen, mask = _masked_pairs(hidden, frozen_hidden, mask, positions)
    cosine = (F.normalize(rows, dim=-1) * F.normalize(frozen, dim=-1)).sum(dim=-1)
    return reduce_tokens(cosine.relu(), mask, metrics={"cosine": cosine})


def rerouting_retain_loss(
    hidden: Tensor, frozen_hidden: Tensor, mask: Tensor, *, positions: Tensor | None = None
) -> LossOutput:
    """The retain loss of circuit breakers, `||h_t - h_t,frozen||_2` for each token (arXiv 2406.04313).

    A norm and not its square: its gradient has length 1 however small the distance, and is 0 at distance 0. The
    release takes it at every layer and averages over padding too, where it is 0; here the mask says what counts.

    Args:
        hidden (`Tensor`): shape `(B, T, d)`, states of one layer on retain texts.
        frozen_hidden (`Tensor`): shape `(B, T, d)`, the same of the model before unlearning. Detached.
        mask (`Tensor`): shape `(B, T)`, boolean.
        positions (`Tensor`, *optional*): as in the module's docstring.

    Returns:
        [`LossOutput`]: in units of the activations.

    Raises:
        TypeError: if the mask is not boolean.
        ValueError: if the shapes do not fit.
    """
    rows, frozen, mask = _masked_pairs(hidden, frozen_hidden, mask, positions)
    return reduce_tokens(torch.linalg.vector_norm(rows - frozen, dim=-1), mask)


def _masked_rows(hidden: Tensor, mask: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    """The states `(N, d)` under the mask, never in half, and the mask on their device."""
    if mask.dtype != torch.bool:
        # -100 and 0.3 are true as well: labels and weights would pass for masks.
        raise TypeError(f"expected a boolean mask, got {mask.dtype}; pass attention_mask.bool() or labels != -100")
    if hidden.dim() != 3 or hidden.shape[:2] != mask.shape:
        raise ValueError(
            f"expected hidden states of shape (B, T, d) and a mask of shape (B, T), got {tuple(hidden.shape)} and "
            f"{tuple(mask.shape)}; pass the states of one layer and the mask without shifting"
        )
    mask = mask.to(hidden.device)
    return upcast(_gather(hidden, mask, positions)), mask


def _masked_pairs(
    hidden: Tensor, frozen_hidden: Tensor, mask: Tensor, positions: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """As [`_masked_rows`], with the detached states `(N, d)` of the frozen model in the middle."""
    if frozen_hidden.shape != hidden.shape:
        raise ValueError(
            f"the frozen hidden states have shape {tuple(frozen_hidden.shape)}, the hidden states "
            f"{tuple(hidden.shape)}; both must come from the same batch and layer"
        )
    rows, mask = _masked_rows(hidden, mask, positions)
    frozen = _gather(frozen_hidden.detach(), mask.to(frozen_hidden.device), positions)
    return rows, frozen.to(rows), mask  # device and type


def _gather(states: Tensor, mask: Tensor, positions: Tensor | None) -> Tensor:
    """Rows `(N, d)` at the true entries of the mask: positions without value get a gradient of exactly zero."""
    index = mask.flatten().nonzero().squeeze(-1) if positions is None else positions.to(states.device)
    return states.flatten(0, 1).index_select(0, index)
