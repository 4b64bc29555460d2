"""From a wanted probability to the levels of the constraints: by solving and measuring in turn.

Shapes: K pairs of a place and a token, N places, n distinct tokens, m and d widths of the edited matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from .algebra.metric import Metric
from .algebra.problem import overshoot, rounding_of
from .algebra.solve import Edit, Solver, solve_pcr, weighed

Measure = Callable[[Edit], Tensor]
_ROUNDS = 16
_ABOVE = 1e-6  # nats of log-odds that rounding explains
_NEAR = 0.5  # nats below the target, of the pair that is highest, at which a search ends
_GAIN = 0.01  # share of the cost that another round has to save
_PATIENCE = 6  # rounds after which nothing is given back but by halving between what was enough and what was not
_TIGHT = 1e-6  # nats more than that
_BLIND = 2  # first rounds, whose cost says nothing: slopes are not known yet
_GROWTH = 100.0  # factor of the cost that has to buy a fall of _NEAR
_AIM = 0.05  # nats beyond the target that are aimed at, so that the last step does not stop just short


@dataclass(frozen=True, kw_only=True)
class LevelProblem:
    """
    Pairs that are to lose log-odds, at one matrix.

    Args:
        inputs, outputs (`Tensor`):
            `(N, m)` and `(N, d)` of the matrix at the places.
        directions (`Tensor`):
            `(n, d)`, one for each distinct token.
        places, columns (`Tensor`):
            `(K,)`, of each pair: its place in `inputs` and its token in `directions`.
        before, target (`Tensor`):
            `(K,)` float64, log-odds as they are and the most that is allowed.
        metric ([`Metric`]):
            Of the cost.
        solver (`str`):
            `"joint"` or `"greedy"`.
    """

    inputs: Tensor
    outputs: Tensor
    directions: Tensor
    places: Tensor
    columns: Tensor
    before: Tensor
    target: Tensor
    metric: Metric
    solver: Solver = "joint"

    def solve(self, shifts: Tensor) -> Edit:
        """
        The cheapest edit that moves each pair's `w^T o` down by at least its shift `(K,)`; below 0 it may rise by so
        much, and -inf leaves it free.

        Raises:
            ValueError: the shifts contradict each other.
        """
        level = (self.outputs.double()[self.places] * self.directions.double()[self.columns]).sum(1)
        eps = torch.full((len(self.inputs), len(self.directions)), torch.inf, dtype=torch.float64)
        bound = ~torch.isneginf(shifts)
        eps[self.places[bound], self.columns[bound]] = (level - shifts)[bound]
        edit = solve_pcr(
            self.inputs,
            self.outputs,
            self.directions,
            eps,
            retain_inputs=self.metric,
            kind="half_space",
            solver=self.solver,
            solved=self._solved,
            weigh=False,
        )
        if edit.certificate.conflict:
            raise ValueError(
                f"No edit of this matrix brings all pairs down: {len(edit.certificate.conflict)} contradict each "
                "other (the same activation under opposite demands). Choose another layer, or fewer words."
            )
        return edit

    @cached_property
    def _solved(self) -> Tensor:
        """`C^-1 h` of all places, which every round needs."""
        return self.metric.solve(self.inputs.detach().cpu())

    def tightness(self, shifts: Tensor) -> Tensor:
        """`(K,)`: how far beyond its shift a pair that binds is moved: what the solver adds for rounding."""
        at, along = self.outputs.double()[self.places], self.directions.double()[self.columns]
        size = torch.linalg.vector_norm(at, dim=1) * torch.linalg.vector_norm(along, dim=1)
        level = torch.nan_to_num((at * along).sum(1) - shifts, posinf=0.0).abs()
        return 2.0 * overshoot(size + level, rounding_of(self.inputs.dtype)) + _TIGHT

    def moves(self, edit: Edit) -> Tensor:
        """`(K,)`: how far an edit moves each pair's `w^T o` down."""
        moved = (self.inputs.double() @ edit.lora_a.double().T) @ edit.lora_b.double().T
        return -(moved[self.places] * self.directions.double()[self.columns]).sum(1)


@dataclass(frozen=True, kw_only=True)
class Found:
    """
    The cheapest edit under which every pair is low enough, as measured; or the lowest that was found.

    Args:
        edit ([`Edit`]):
            The edit.
        odds (`Tensor`):
            `(K,)`, measured log-odds with the edit in force.
        reached (`bool`):
            Whether all are at or below their targets.
        history (`list[dict]`):
            Of each round: cost, and the largest excess over the target in nats.
    """

    edit: Edit
    odds: Tensor
    reached: bool
    history: list[dict[str, float]] = field(default_factory=list)


def search_levels(problem: LevelProblem, measure: Measure, *, slack: float = 0.0, max_rounds: int = _ROUNDS) -> Found:
    r"""
    Shifts, one for each pair, at which measured log-odds meet their targets.

    The log-odds of a token are nearly linear in the shift along its direction (its probability is not: a token that
    is nearly certain stays so for a while), so that each round adds to the move m_k that the last edit made what is
    left, over the slope: $s_k \leftarrow m_k + (q_k' - q^*_k) / \sigma$, with $\sigma$ the fall over the move of that
    pair of the same place that had farthest to go. A pair that starts low enough is left free until another edit
    lifts it: where a likely token falls, all others rise. What a pair has to spare is given back. Where that goes
    beyond, and after some rounds, what is between shifts that were enough and shifts that were not is halved. A search
    ends where no pair that binds has anything to spare, or nothing more is saved, or where edits cost a hundredfold
    and log-odds do not follow: the final norm bounds them, and no edit of this matrix reaches the target.

    Args:
        problem ([`LevelProblem`]):
            The pairs.
        measure (`Callable`):
            Log-odds `(K,)` of the pairs by a real forward pass with an edit in force.
        slack (`float`, *optional*, defaults to `0.0`):
            Nats by which a pair may miss its target: where another block goes on with what is left, the last tenths of
            a nat are not worth what they cost.
        max_rounds (`int`, *optional*, defaults to 16):
            Edits that are tried.
    """
    wanted = problem.before - problem.target
    shifts = torch.where(wanted > 0, wanted, -torch.inf)
    best: Found | None = None
    low: Tensor | None = None  # shifts that were not enough, and shifts that were
    high: Tensor | None = None
    bought = (torch.inf, torch.inf)  # cost and excess of the last round that was worth its cost
    history: list[dict[str, float]] = []
    for number in range(max_rounds):
        edit = problem.solve(shifts)
        odds = measure(edit)
        excess = odds - problem.target
        cost, worst = edit.certificate.cost, float(excess.max())
        history.append({"cost": cost, "excess": worst})
        reached = worst <= max(slack, _ABOVE)
        if not reached and high is None and number >= _BLIND:
            if worst > bought[1] - _NEAR and cost > _GROWTH * bought[0]:
                break  # the final norm bounds log-odds: a larger edit would only ruin the model
            bought = (cost, worst) if worst <= bought[1] - _NEAR else bought
        least = best.edit.certificate.cost if best is not None and best.reached else torch.inf
        far = reached and cost > least  # a step that went beyond an edit that is enough
        saves_little = (1.0 - _GAIN) * least < cost <= least
        stands = number > _PATIENCE and abs(cost - history[-2]["cost"]) < _GAIN * cost  # halving has come to an end
        if _is_better(reached, cost, worst, best, problem):
            best = Found(edit=edit, odds=odds, reached=reached)
            high = shifts if reached else high
        low = low if reached else shifts
        moves, fall = problem.moves(edit), problem.before - odds
        binds = moves <= shifts + problem.tightness(shifts)  # the others are moved by these
        spare = binds & (excess < -_NEAR)
        if edit.certificate.rank == 0 or (reached and (saves_little or stands or not bool(spare.any()))):
            break
        if (far or number >= _PATIENCE) and low is not None and high is not None:  # to and fro, where log-odds bend
            free = torch.isneginf(low) | torch.isneginf(high)
            shifts = torch.where(free, torch.maximum(low, high), (low + high) / 2.0)
            continue
        slopes = _slopes(problem, moves, fall)
        bound = ~torch.isneginf(shifts) | (excess > 0)
        # what a pair has to spare is given back by halves: pairs of one place lift each other
        give = 0.5 if number < _PATIENCE else 0.0
        beyond = _AIM if number < _PATIENCE else _AIM + max(worst, 0.0)  # pairs that push each other up
        change = torch.where(excess < -_AIM, give * excess, excess + beyond)
        shifts = torch.where(bound, moves + change / slopes, -torch.inf)
    assert best is not None, "the first round makes one"
    return Found(edit=weighed(best.edit, problem.metric), odds=best.odds, reached=best.reached, history=history)


def _slopes(problem: LevelProblem, moves: Tensor, fall: Tensor) -> Tensor:
    """`(K,)`: nats of log-odds for a unit of a move, one number a place; the median of all where nothing has moved."""
    wanted = problem.before - problem.target
    own = torch.where((moves > 1e-9) & (fall > 0.1), fall / moves.clamp(min=1e-9), torch.nan)
    count = int(problem.places.max()) + 1
    farthest = torch.full((count,), -torch.inf, dtype=torch.float64).scatter_reduce(
        0, problem.places, torch.where(torch.isnan(own), -torch.inf, wanted), "amax"
    )
    leads = (wanted == farthest[problem.places]) & (wanted > 0) & ~torch.isnan(own)
    if not bool(leads.any()):
        return torch.ones_like(moves)
    usual = float(own[leads].median())
    of_place = torch.full((count,), usual, dtype=torch.float64)
    of_place[problem.places[leads]] = own[leads].clamp(usual / 8.0, usual * 8.0)
    return of_place[problem.places]


def _is_better(reached: bool, cost: float, excess: float, best: Found | None, problem: LevelProblem) -> bool:
    if best is None or reached != best.reached:
        return best is None or reached
    if reached:
        return cost < best.edit.certificate.cost
    return excess < float((best.odds - problem.target).max())
