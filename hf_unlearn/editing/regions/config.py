"""Options of the bounded edits TSR and ARR."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

RadiusUnit = Literal["relative", "absolute"]
Start = Literal["uniform", "random"]
ARR_ONLY = (
    "seed",
    "loss_cap",
    "free_positions",
    "start",
    "inner_steps",
    "attack_steps",
    "restart_every",
    "inner_learning_rate",
    "excluded_token_ids",
)
"""Options that [`plan_tsr`] does not look at."""


@dataclass(frozen=True, kw_only=True)
class RegionConfig:
    """
    Options of [`plan_tsr`] and [`plan_arr`] (arXiv 2510.03567). The paper gives no numbers for these two methods; the
    defaults are ours.

    Args:
        radius (`float`, *optional*, defaults to `0.1`):
            Largest Frobenius norm of the edit of a matrix.
        radius_unit (`Literal["relative", "absolute"]`, *optional*, defaults to `"relative"`):
            Whether the radius is a fraction of the matrix's own norm.
        joint_radius (`bool`, *optional*, defaults to `False`):
            One ball for all matrices together, of the radius `sqrt(sum of squares)` of theirs (`"relative"`), or of
            `radius` itself (`"absolute"`).
        rank (`int`, *optional*):
            Largest rank of the edit; without it, any.
        steps (`int`, *optional*, defaults to `100`):
            Steps of projected gradient descent on the edit, each over all rows.
        learning_rate (`float`, *optional*, defaults to `0.2`):
            Length of the first step as a fraction of the radius; it falls linearly to 0.
        retain_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the retain term, the mean KL divergence from the unedited model in nats a token.
        batch_size (`int`, *optional*, defaults to `8`):
            Rows a forward pass, on each rank; changes nothing but memory.
        seed (`int`, *optional*, defaults to `0`):
            Of the random starts of ARR's prompts; nothing else is random.
        loss_cap (`float`, *optional*, defaults to `10.0`):
            ARR: nats above which a prompt's loss is not raised any further. Its own loss has no bound.
        free_positions (`int`, *optional*, defaults to `4`):
            ARR: adversarial positions put into each prompt.
        start (`Literal["uniform", "random"]`, *optional*, defaults to `"uniform"`):
            ARR: first point of each free position, the middle of the simplex or one drawn evenly from it.
        inner_steps (`int`, *optional*, defaults to `4`):
            ARR: steps of the adversary for each step of the edit, from where it was.
        attack_steps (`int`, *optional*, defaults to `50`):
            ARR: steps of the adversary before the first step, at its restarts, and when the result is measured.
        restart_every (`int`, *optional*, defaults to `10`):
            ARR: steps of the edit from one restart of the adversary to the next. It then attacks from its first points
            as well, and keeps what is better for each prompt.
        inner_learning_rate (`float`, *optional*, defaults to `1.0`):
            ARR: Euclidean length of the adversary's first step at each free position (the simplex has diameter 1.41);
            halved wherever it does not help.
        excluded_token_ids (`tuple[int, ...]`, *optional*, defaults to `()`):
            ARR: tokens that no free position may hold, like special tokens.

    Raises:
        ValueError: an option out of its range.
    """

    radius: float = 0.1
    radius_unit: RadiusUnit = "relative"
    joint_radius: bool = False
    rank: int | None = None
    steps: int = 100
    learning_rate: float = 0.2
    retain_weight: float = 1.0
    batch_size: int = 8
    seed: int = 0
    loss_cap: float = 10.0
    free_positions: int = 4
    start: Start = "uniform"
    inner_steps: int = 4
    attack_steps: int = 50
    restart_every: int = 10
    inner_learning_rate: float = 1.0
    excluded_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("radius", "learning_rate", "loss_cap", "inner_learning_rate"):
            _check(name, getattr(self, name), _number(getattr(self, name)) > 0, "a finite number above 0")
        _check("retain_weight", self.retain_weight, _number(self.retain_weight) >= 0, "a finite number, at least 0")
        for name in ("steps", "batch_size", "free_positions", "attack_steps", "restart_every"):
            _check(name, getattr(self, name), _whole(getattr(self, name)) >= 1, "a whole number, at least 1")
        _check("inner_steps", self.inner_steps, _whole(self.inner_steps) >= 0, "a whole number, at least 0")
        _check("seed", self.seed, _whole(self.seed) >= 0, "a whole number, at least 0")
        known = self.rank is None or _whole(self.rank) >= 1
        _check("rank", self.rank, known, "None for any rank, or a whole number, at least 1")
        _check(
            "radius_unit", self.radius_unit, self.radius_unit in ("relative", "absolute"), "'relative' or 'absolute'"
        )
        _check("start", self.start, self.start in ("uniform", "random"), "'uniform' or 'random'")
        object.__setattr__(self, "excluded_token_ids", tuple(self.excluded_token_ids))


def _check(name: str, given: Any, good: bool, expected: str) -> None:
    if not good:
        raise ValueError(f"{name} is {given!r}; expected {expected}.")


def _number(value: Any) -> float:
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else -1.0


def _whole(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else -1
