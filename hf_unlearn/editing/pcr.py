"""PCR on a model: words that are to become unreachable at places of rows, block by block, from capture to factors.

Shapes: K pairs of a place and a token, N places, n tokens or concepts, m inner width of the MLP, d model width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from .algebra.metric import Metric
from .algebra.solve import Edit, Solver
from .capture import Captured
from .directions import final_norm, unembedding_directions
from .mlp import mlp_output
from .odds import Pairs
from .passes import Places, Run
from .plan import LayerEdit, matrix_digest
from .search import Found, LevelProblem, search_levels
from .shortcut import LastBlock
from .weighing import drawn

logger = logging.get_logger(__name__)

_FAR = 8.0  # nats below what is allowed from which on a pair is left out until an edit has lifted it
_FEW = 20_000  # pairs up to which all of them are watched from the start
_ROUNDS = 4  # times that pairs are taken in
_ROUNDING = 1e-4  # nats of log-odds that another batch may differ by
_SLACK = 1.5  # nats that a block may leave to the next beyond its share
_CLOSE = 0.1  # nats above what is allowed that are told but not refused


def retain_metric(
    captured: Captured | None, *, limit: int, ridge: float, seed: int, weights: Tensor | None = None
) -> Metric:
    """
    The metric of the cost from retain activations, each with its weight `(N,)` where there are weights, at most
    `limit` of them, drawn by `seed` (see [`drawn`]); without any the plain norm of the edit.
    """
    if captured is None:
        return Metric.identity()
    inputs = captured.inputs
    if weights is not None:
        chosen, own = drawn(weights, limit, seed)
        return Metric.from_retain(inputs[chosen] * own.sqrt().to(inputs.dtype)[:, None], ridge)
    if len(inputs) > limit:
        chosen = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))[:limit]
        inputs = inputs[chosen.sort().values]
    return Metric.from_retain(inputs, ridge)


def plan_by_probability(
    run: Run,
    rows: Sequence[Mapping[str, Any]],
    pairs: Pairs,
    *,
    probability: float,
    layers: Sequence[int],
    retain_rows: Sequence[Mapping[str, Any]] | None = None,
    retain_limit: int = 4096,
    retain_weights: Tensor | None = None,
    ridge: float = 0.01,
    solver: Solver = "joint",
    seed: int = 0,
) -> tuple[list[LayerEdit], Tensor]:
    r"""
    Edits under which each pair's token has at most `probability` (its share of that) at its place, by a real forward
    pass.

    Blocks are edited in ascending order, each on what it sees with the edits of the blocks below in force, and takes
    an equal share of the log-odds that are left. Constraints are half-spaces $w^\top (W + \Delta) h \le \tau$ along
    the tokens' output rows; the levels come from [`search_levels`].

    Args:
        run ([`Run`]):
            Model and forward passes.
        rows (`Sequence[Mapping]`):
            Tokenised rows.
        pairs ([`Pairs`]):
            Places and next tokens.
        probability (`float`):
            The most that is allowed.
        layers (`Sequence[int]`):
            Blocks, from 1, ascending.
        retain_rows (`Sequence[Mapping]`, *optional*):
            Rows whose responses should stay: the outputs that predict them.
        retain_limit (`int`, *optional*, defaults to `4096`):
            At most so many retain activations.
        retain_weights (`Tensor`, *optional*):
            `(N,)`, of each of them before some are drawn, see [`retain_weights`].
        ridge (`float`, *optional*, defaults to `0.01`):
            See [`solve_pcr`].
        solver (`str`, *optional*, defaults to `"joint"`):
            `"joint"` or `"greedy"`.
        seed (`int`, *optional*, defaults to `0`):
            Of the choice of retain activations.

    Returns:
        The edits, one for each block, and the log-odds `(K,)` with all of them in force.

    Raises:
        ValueError: no edit that reaches the probability is found.
    """
    wanted = pairs.limits(probability)
    weighed = Weighed(rows=retain_rows, limit=retain_limit, weights=retain_weights, ridge=ridge, seed=seed)
    if len(pairs) <= _FEW:
        edits, after = _edits(run, rows, pairs, None, wanted, layers, weighed, solver)
    else:
        before = after = run.odds(rows, pairs).values
        active = before > wanted - _FAR
        for _ in range(_ROUNDS):
            edits, _ = _edits(run, rows, pairs.chosen(active), before[active], wanted[active], layers, weighed, solver)
            after = run.odds(rows, pairs, edits).values
            if not bool(((after > wanted) & ~active).any()):
                break
            active = active | (after > wanted - _FAR / 2)
    highest = float((after - wanted).max())
    largest = float(pairs.bounds(after).max())
    if highest > _CLOSE:
        raise ValueError(
            f"No edit of blocks {list(layers)} was found under which every word has at most a probability of "
            f"{probability:g}: the lowest leaves one of them {largest:.2g}. Allow that "
            "(probability=...), choose more blocks (layers=...), or ask for fewer words."
        )
    if highest > _ROUNDING:
        logger.warning(
            f"A word has a probability of {largest:.4g} at one of its places, a little above {probability:g}."
        )
    return edits, after


@dataclass(frozen=True, kw_only=True)
class Weighed:
    """The retain rows that weigh the cost, at most `limit` of their activations, their weights, and the ridge."""

    rows: Sequence[Mapping[str, Any]] | None
    limit: int
    weights: Tensor | None
    ridge: float
    seed: int

    def metric(self, run: Run, layer: int, edits: Sequence[LayerEdit]) -> Metric:
        """The metric at one block with the edits below in force."""
        kept = None if self.rows is None else run.at(self.rows, layer, "predicting", edits)
        return retain_metric(kept, limit=self.limit, ridge=self.ridge, seed=self.seed, weights=self.weights)


def _edits(
    run: Run,
    rows: Sequence[Mapping[str, Any]],
    pairs: Pairs,
    before: Tensor | None,
    wanted: Tensor,
    layers: Sequence[int],
    weighed: Weighed,
    solver: Solver,
) -> tuple[list[LayerEdit], Tensor]:
    """
    One edit for each block, for pairs all of which matter, and their log-odds with all in force; `wanted` `(K,)` are
    the log-odds they may have, `before` is measured where it is not given.
    """
    ids, columns = torch.unique(pairs.ids, return_inverse=True)
    places, of_pair = pairs.places()
    directions = unembedding_directions(run.model, ids.tolist())
    edits: list[LayerEdit] = []
    odds = before
    for number, layer in enumerate(layers):
        share = 1.0 / (len(layers) - number)
        quick = LastBlock.fits(run, layer)
        read = run.at(rows, layer, Places(places), edits, also=final_norm(run.model) if quick else None)
        at = _rows_of(read, places)[of_pair]
        view = LastBlock(run, pairs, read, at) if quick else None
        if odds is None:
            odds = run.odds(rows, pairs).values if view is None else view.odds()
        if number == 0 and not bool((odds > wanted).any()):
            return [_nothing(run.model, layer) for layer in layers], odds
        # a pair that is low enough may rise up to what is allowed
        target = torch.where(odds > wanted, odds - share * (odds - wanted), wanted)
        problem = LevelProblem(
            inputs=read.inputs,
            outputs=read.outputs,
            directions=directions,
            places=at,
            columns=columns,
            before=odds,
            target=target,
            metric=weighed.metric(run, layer, edits),
            solver=solver,
        )
        slack = 0.0 if layer == layers[-1] else _SLACK
        found = _search(problem, view, partial(_measured, run, rows, pairs, tuple(edits), layer), slack)
        certificate = {
            **found.edit.certificate.as_dict(),
            "reached": found.reached,
            "search": found.history,
            "largest_log_odds": float(found.odds.max()),
        }
        edits.append(layer_edit(run.model, layer, found.edit, certificate=certificate))
        odds = found.odds
    assert odds is not None, "there is a block"
    return edits, odds


def _search(problem: LevelProblem, view: LastBlock | None, real: Callable[[Edit], Tensor], slack: float) -> Found:
    """The search, with the last block's shortcut where the model agrees with it on what came out."""
    if view is not None:
        found = search_levels(problem, view.odds, slack=slack)
        odds = real(found.edit)
        if view.agrees(found.odds, odds):
            return replace(found, odds=odds)
    return search_levels(problem, real, slack=slack)


def _measured(
    run: Run,
    rows: Sequence[Mapping[str, Any]],
    pairs: Pairs,
    below: Sequence[LayerEdit],
    layer: int,
    edit: Edit,
) -> Tensor:
    return run.odds(rows, pairs, [*below, layer_edit(run.model, layer, edit, digest="")]).values


def _nothing(model: Any, layer: int) -> LayerEdit:
    """The edit of a block where nothing has to be done: rank 0."""
    at = mlp_output(model, layer)
    return LayerEdit(
        layer=at.layer,
        path=at.path,
        lora_a=torch.zeros(0, at.in_features),
        lora_b=torch.zeros(at.out_features, 0),
        transposed=at.transposed,
        digest=matrix_digest(at),
        certificate={"reached": True, "rank": 0, "cost": 0.0},
    )


def layer_edit(
    model: Any, layer: int, edit: Edit, *, digest: str | None = None, certificate: dict[str, Any] | None = None
) -> LayerEdit:
    """A solver's result as the edit of a block; the digest is read off the model when it is not given."""
    at = mlp_output(model, layer)
    return LayerEdit(
        layer=at.layer,
        path=at.path,
        lora_a=edit.lora_a.float().cpu(),
        lora_b=edit.lora_b.float().cpu(),
        transposed=at.transposed,
        digest=matrix_digest(at) if digest is None else digest,
        certificate=edit.certificate.as_dict() if certificate is None else certificate,
    )


def _rows_of(read: Captured, places: Sequence[tuple[int, int]]) -> Tensor:
    """`(places,)`: where each place is among the captured activations."""
    at = {place: number for number, place in enumerate(zip(read.rows.tolist(), read.tokens.tolist(), strict=True))}
    missing = [place for place in places if place not in at]
    if missing:
        raise ValueError(
            f"No activation was read at token {missing[0][1]} of row {missing[0][0]}: it is padding or a BOS token, "
            "which is never constrained."
        )
    return torch.tensor([at[place] for place in places], dtype=torch.int64)
