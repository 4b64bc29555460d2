"""What an optimiser of a bounded weight edit moves: full matrices or two factors, and the ball they stay in.

Shapes: d model width, m inner width of the MLP, r rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class Change(ABC):
    """
    The change of one matrix, `Delta` `(d, m)`, as tensors that gather gradients.

    Args:
        parameters (`Sequence[Tensor]`):
            The tensors that are moved, float32.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = [parameter.detach().float().clone().requires_grad_() for parameter in parameters]

    @abstractmethod
    def added(self, inputs: Tensor) -> Tensor:
        """`Delta h` `(..., d)` of inputs `(..., m)`, differentiable."""

    @abstractmethod
    def factors(self) -> tuple[Tensor, Tensor]:
        """`lora_a` `(r, m)` and `lora_b` `(d, r)` on the CPU, with `Delta = lora_b lora_a`."""

    @abstractmethod
    def norm(self) -> float:
        """Frobenius norm of Delta."""

    @abstractmethod
    def speed(self, gradients: Sequence[Tensor]) -> float:
        """Frobenius norm of the change of Delta, to first order, when its parameters move along the gradients."""

    @abstractmethod
    def scale(self, factor: float) -> None:
        """Multiplies Delta."""

    def move(self, gradients: Sequence[Tensor], length: float) -> None:
        """Moves the parameters by `length` times the negative gradients."""
        with torch.no_grad():
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.sub_(gradient, alpha=length)

    def state(self) -> list[Tensor]:
        """A copy of the parameters."""
        return [parameter.detach().clone() for parameter in self.parameters]

    def load(self, state: Sequence[Tensor]) -> None:
        """Goes back to a copy."""
        with torch.no_grad():
            for parameter, value in zip(self.parameters, state, strict=True):
                parameter.copy_(value)


class FullChange(Change):
    """Delta itself. Starts where its one parameter `(d, m)` is."""

    def added(self, inputs: Tensor) -> Tensor:
        """As in [`Change`]."""
        return inputs @ self.parameters[0].to(inputs.device).T

    def factors(self) -> tuple[Tensor, Tensor]:
        """As in [`Change`]; r is d, and the second factor the identity."""
        delta = self.parameters[0].detach().cpu().clone()
        return delta, torch.eye(len(delta))

    def norm(self) -> float:
        """As in [`Change`]."""
        return float(self.parameters[0].detach().double().norm())

    def speed(self, gradients: Sequence[Tensor]) -> float:
        """As in [`Change`]."""
        return float(gradients[0].double().norm())

    def scale(self, factor: float) -> None:
        """As in [`Change`]."""
        with torch.no_grad():
            self.parameters[0].mul_(factor)


class LowRankChange(Change):
    """`Delta = B A`; the parameters are B `(d, r)` and A `(r, m)`, balanced: `B^T B = A A^T` is diagonal."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        super().__init__(parameters)
        self.balance()

    @classmethod
    def nearest(cls, matrix: Tensor, rank: int) -> LowRankChange:
        """
        The nearest matrix of that rank to `matrix` `(d, m)`: its leading singular vectors, exact.

        A product of two zero factors has no gradient, so that a descent starts from its first step, the gradient's
        best approximation.
        """
        wide = matrix.detach().double()
        _, vectors = torch.linalg.eigh(wide @ wide.T)
        left = vectors[:, -rank:]
        return cls([left, left.T @ wide])

    def added(self, inputs: Tensor) -> Tensor:
        """As in [`Change`]."""
        b, a = self.parameters
        return (inputs @ a.to(inputs.device).T) @ b.to(inputs.device).T

    def factors(self) -> tuple[Tensor, Tensor]:
        """As in [`Change`]."""
        b, a = self.state()
        return a.cpu(), b.cpu()

    def norm(self) -> float:
        """As in [`Change`]."""
        b, a = self.state()
        return _product_norm(b, a)

    def speed(self, gradients: Sequence[Tensor]) -> float:
        """As in [`Change`]: the norm of `dB A + B dA`."""
        b, a = self.state()
        along_b, along_a = gradients
        return _product_norm(torch.cat([along_b, b], dim=1), torch.cat([a, along_a]))

    def scale(self, factor: float) -> None:
        """As in [`Change`]."""
        with torch.no_grad():
            for parameter in self.parameters:
                parameter.mul_(factor**0.5)

    def move(self, gradients: Sequence[Tensor], length: float) -> None:
        """As in [`Change`], and balances the factors again, which leaves their product as it is."""
        super().move(gradients, length)
        self.balance()

    @torch.no_grad()
    def balance(self) -> None:
        """Shares the singular values between the factors, so that neither is moved much more than the other."""
        b, a = (parameter.double() for parameter in self.parameters)
        q_b, r_b = torch.linalg.qr(b)
        q_a, r_a = torch.linalg.qr(a.T)
        u, s, v = torch.linalg.svd(r_b @ r_a.T)
        root = s.sqrt()
        self.load([(q_b @ u) * root, (q_a @ v.T * root).T])


def _product_norm(b: Tensor, a: Tensor) -> float:
    """`|B A|_F` without the product."""
    b, a = b.double(), a.double()
    return float(((b.T @ b) * (a @ a.T)).sum().clamp(min=0.0).sqrt())


class Ball:
    """
    The set `|Delta_l| <= radius_l` for each matrix, or jointly `sum |Delta_l|^2 <= sum radius_l^2`.

    Args:
        radii (`Mapping[int, float]`):
            Frobenius norms by matrix, absolute.
        joint (`bool`):
            Whether all matrices share one ball.
    """

    def __init__(self, radii: Mapping[int, float], joint: bool) -> None:
        self.groups = [list(radii)] if joint else [[key] for key in radii]
        self.radii = [sum(radii[key] ** 2 for key in group) ** 0.5 for group in self.groups]

    def radius_of(self, key: int) -> float:
        """Radius of the ball that this matrix is in."""
        return next(radius for group, radius in zip(self.groups, self.radii, strict=True) if key in group)

    def project(self, changes: Mapping[int, Change]) -> None:
        """
        The nearest point of the set to the changes: those outside are scaled down. For a given rank it is the nearest
        point too, since scaling keeps singular vectors and their order.
        """
        for group, radius in zip(self.groups, self.radii, strict=True):
            norm = sum(changes[key].norm() ** 2 for key in group) ** 0.5
            if norm > radius:
                for key in group:
                    changes[key].scale(radius / norm)

    def step(self, changes: Mapping[int, Change], gradients: Mapping[int, Sequence[Tensor]], fraction: float) -> bool:
        """
        Moves each ball's changes against their gradients by `fraction` of its radius, and projects; whether any moved.
        """
        moved = False
        for group, radius in zip(self.groups, self.radii, strict=True):
            speed = sum(changes[key].speed(gradients[key]) ** 2 for key in group) ** 0.5
            if speed == 0.0:
                continue
            moved = True
            for key in group:
                changes[key].move(gradients[key], fraction * radius / speed)
        self.project(changes)
        return moved
