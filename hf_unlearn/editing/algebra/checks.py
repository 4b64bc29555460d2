"""What a caller of the solvers may hand in, and what it is told otherwise."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .problem import KINDS, Kind


def check_matrix(name: str, value: Tensor, shape: str, width: int | None = None, rows: int | None = None) -> None:
    """
    Raises:
        TypeError: not a floating-point tensor. ValueError: not a non-empty matrix of that width and number of rows, or
            not finite.
    """
    if not isinstance(value, Tensor) or not value.is_floating_point():
        given = f"{value.dtype} tensor" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"expected {name} to be a floating-point tensor of shape {shape}, got a {given}; convert it.")
    fits = value.dim() == 2 and value.numel() > 0
    fits = fits and width in (None, value.shape[-1]) and rows in (None, value.shape[0])
    if not fits:
        wanted = shape
        if width is not None or rows is not None:
            wanted += f" = ({rows if rows is not None else 'any'}, {width if width is not None else 'any'})"
        raise ValueError(
            f"expected {name} of shape {wanted} with at least one row, got {tuple(value.shape)}; one row is one "
            "activation, one output or one concept."
        )
    if not bool(torch.isfinite(value).all()):
        row = int((~torch.isfinite(value)).any(1).nonzero()[0])
        raise ValueError(
            f"expected {name} to be finite, got nan or inf in row {row}; leave that row out, or find out where its "
            "activation overflows."
        )


def check_problem(
    inputs: Tensor, outputs: Tensor, concepts: Tensor, retain_inputs: Tensor | None, kind: Kind, eps: float | Tensor
) -> Tensor:
    """`eps` as a float64 tensor `(N, n)` on the CPU, after all tensors have been checked against each other."""
    if kind not in KINDS:
        raise ValueError(f"expected kind to be one of {', '.join(KINDS)}, got {kind!r}.")
    check_matrix("inputs", inputs, "(N, m)")
    check_matrix("outputs", outputs, "(N, d)", rows=len(inputs))
    check_matrix("concepts", concepts, "(n, d)", width=outputs.shape[1])
    if retain_inputs is not None:
        check_matrix("retain_inputs", retain_inputs, "(T, m)", width=inputs.shape[1])
    wanted = torch.as_tensor(eps, dtype=torch.float64, device="cpu").detach()  # not through float32
    shape = (len(inputs), len(concepts))
    if wanted.shape not in ((), shape[1:], shape):
        raise ValueError(
            f"expected eps to be a number or a tensor of shape (n,) = ({len(concepts)},) or (N, n) = {shape}, got "
            f"{tuple(wanted.shape)}; give one value for each concept, or for each pair."
        )
    wanted = wanted.expand(shape).clone()
    unbound = wanted == math.inf
    if bool(torch.isnan(wanted).any() | torch.isneginf(wanted).any() | (unbound.any() & (kind == "ball"))):
        raise ValueError(
            f"expected eps to be finite (or inf for pairs of kind='half_space' that are not constrained), got "
            f"{eps.tolist() if isinstance(eps, Tensor) else eps}."
        )
    if kind == "ball" and bool((wanted < 0).any()):
        raise ValueError(
            f"expected eps to be a distance, 0 or more, got {float(wanted.min())}; only kind='half_space' takes "
            "levels of either sign."
        )
    if kind == "half_space" and bool((concepts == 0).all(1).any()):
        row = int((concepts == 0).all(1).nonzero()[0])
        raise ValueError(
            f"expected concepts of half-spaces to be directions, got the zero vector in row {row}; leave it out."
        )
    return wanted


def check_options(ridge: float, soft_margin: float | None, max_rounds: int | None, tolerance: float) -> None:
    """Raises ValueError for numbers that no solver can use."""
    for name, value in (("ridge", ridge), ("tolerance", tolerance), ("soft_margin", soft_margin)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"expected {name} to be a finite number above 0, got {value}.")
    if max_rounds is not None and max_rounds < 1:
        raise ValueError(f"expected max_rounds to be at least 1, got {max_rounds}.")
