"""Projected gradient descent of a bounded edit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from tqdm.auto import tqdm

from .changes import Ball, Change, FullChange, LowRankChange
from .objective import Gradients, Terms

Evaluate = Callable[[Mapping[int, Change]], tuple[Terms, Gradients]]
State = dict[int, list[Tensor]]


@dataclass(frozen=True, kw_only=True)
class Descent:
    """
    What a descent has found.

    Args:
        changes (`dict[int, Change]`):
            At the last step.
        best, last (`dict[int, list[Tensor]]`):
            Parameters at the lowest total that was seen, and at the last step.
        best_step (`int`):
            0 for no edit at all.
        totals (`list[float]`):
            The total at each step, from no edit on.
        converged (`bool`):
            Whether the last tenth of the steps won less than 1% of what all steps won, or nothing was left to win.
    """

    changes: dict[int, Change]
    best: State
    last: State
    best_step: int
    totals: list[float]
    converged: bool

    def load(self, state: State) -> None:
        """Puts a state into the changes."""
        for layer, change in self.changes.items():
            change.load(state[layer])


def descend(
    evaluate: Evaluate,
    zeros: Mapping[int, Tensor],
    ball: Ball,
    *,
    rank: int | None,
    steps: int,
    learning_rate: float,
    bar: tqdm[None],
) -> Descent:
    """
    Minimises over the ball from no edit on, with steps of `learning_rate * radius * (1 - t / steps)` along the
    gradient, whatever its size: flat and steep losses need no other options.

    Args:
        evaluate (`Callable`):
            From changes to terms and gradients, the same on every rank.
        zeros (`Mapping[int, Tensor]`):
            A zero matrix `(d, m)` for each layer, on its device.
        ball ([`Ball`]):
            Where the changes stay.
        rank (`int`, *optional*):
            Largest rank. The first step is then the gradient's best approximation, later ones move two factors.
        steps (`int`):
            Number of steps.
        learning_rate (`float`):
            Length of the first step, as a fraction of the radius.
        bar (`tqdm`):
            Is moved and shows the total.

    Raises:
        ValueError: a term or a gradient that is not finite, with its step.
    """
    changes: dict[int, Change] = {layer: FullChange([zero]) for layer, zero in zeros.items()}
    best: State = _state(changes)
    best_step, totals, stuck = 0, [], False
    for step in range(steps + 1):
        terms, gradients = evaluate(changes)
        _check_finite(terms, gradients, step)
        totals.append(terms.total)
        if terms.total < totals[best_step]:
            best, best_step = _state(changes), step
        bar.set_postfix(total=f"{terms.total:.4g}", refresh=False)
        bar.update()
        if step == steps:
            break
        fraction = learning_rate * (1.0 - step / steps)
        if step == 0 and rank is not None:
            changes, gradients = _low_rank(changes, gradients, rank)
            best = {layer: [part * 0.0 for part in change.state()] for layer, change in changes.items()}
            stuck = not _first_step(changes, ball, fraction)
        else:
            stuck = not ball.step(changes, gradients, fraction)
        if stuck:
            break
    return Descent(
        changes=changes,
        best=best,
        last=_state(changes),
        best_step=best_step,
        totals=totals,
        converged=stuck or _settled(totals, steps),
    )


def _low_rank(changes: Mapping[int, Change], gradients: Gradients, rank: int) -> tuple[dict[int, Change], Gradients]:
    nearest: dict[int, Change] = {layer: LowRankChange.nearest(-gradients[layer][0], rank) for layer in changes}
    return nearest, gradients


def _first_step(changes: Mapping[int, Change], ball: Ball, fraction: float) -> bool:
    """Scales the first low-rank changes to the length of a step."""
    moved = False
    for group, radius in zip(ball.groups, ball.radii, strict=True):
        norm = sum(changes[layer].norm() ** 2 for layer in group) ** 0.5
        if norm > 0.0:
            moved = True
            for layer in group:
                changes[layer].scale(fraction * radius / norm)
    ball.project(changes)
    return moved


def _state(changes: Mapping[int, Change]) -> State:
    return {layer: change.state() for layer, change in changes.items()}


def _check_finite(terms: Terms, gradients: Mapping[int, Sequence[Tensor]], step: int) -> None:
    for name in ("region", "retain", "total"):
        value = getattr(terms, name)
        if not math.isfinite(value):
            raise ValueError(
                f"The {name} term is {value} at step {step}; expected a finite number. Check that the model's logits "
                "are finite on these rows, load it in bfloat16 or float32, or lower radius."
            )
    for layer, parts in gradients.items():
        if not all(bool(part.isfinite().all()) for part in parts):
            raise ValueError(
                f"The gradient of block {layer}'s edit is not finite at step {step}, although the loss is. Load the "
                "model in bfloat16 or float32, or lower radius."
            )


def _settled(totals: Sequence[float], steps: int) -> bool:
    late = max(1, steps // 10)
    won = totals[0] - min(totals)
    return min(totals[:-late], default=totals[0]) - min(totals) <= 0.01 * won
