"""PCR on a model: words that are to become unreachable at places of rows, block by block, from capture to factors.

Shapes: K pairs of a place and a token, N places, n tokens or concepts, m inner width of the MLP, d model width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .added import edits_in_force
from .algebra.metric import Metric
from .algebra.solve import Edit, Solver
from .capture import Captured, capture
from .directions import unembedding_directions
from .mlp import mlp_output
from .odds import Odds, Pairs, next_token_odds
from .plan import LayerEdit, matrix_digest
from .search import LevelProblem, search_levels

_FAR = 8.0  # nats below what is allowed from which on a pair is left out until an edit has lifted it
_ROUNDS = 4  # times that pairs are taken in


@dataclass(frozen=True, kw_only=True)
class Run:
    """
    What every forward pass of a plan needs.

    Args:
        model (`Any`):
            The model, or what PEFT or an engine has made of it.
        pad_token_id (`int`):
            Id to pad with.
        batch_size (`int`):
            Rows a forward pass, on each rank.
        accelerator (`Any`):
            With several processes; None with one.
        progress (`bool`):
            Whether progress bars are shown.
    """

    model: Any
    pad_token_id: int
    batch_size: int = 16
    accelerator: Any = None
    progress: bool = False

    def options(self, text: str) -> dict[str, Any]:
        """Arguments that [`capture`] and [`next_token_odds`] share."""
        return {
            "pad_token_id": self.pad_token_id,
            "batch_size": self.batch_size,
            "accelerator": self.accelerator,
            "description": text if self.progress else None,
        }

    def odds(self, rows: Sequence[Mapping[str, Any]], pairs: Pairs, edits: Sequence[LayerEdit] = ()) -> Odds:
        """Log-odds of the pairs with edits in force."""
        with edits_in_force(self.model, tuple(edits)):
            return next_token_odds(self.model, rows, pairs, **self.options("measuring"))

    def at(
        self, rows: Sequence[Mapping[str, Any]], layer: int, positions: Any, edits: Sequence[LayerEdit] = ()
    ) -> Captured:
        """Inputs and outputs of one matrix with edits of earlier blocks in force."""
        with edits_in_force(self.model, tuple(edits)):
            return capture(self.model, rows, [layer], positions=positions, **self.options("reading activations"))[
                layer
            ]


class Places:
    """
    Given tokens of given rows, as positions of [`capture`].

    Args:
        places (`Sequence[tuple[int, int]]`):
            (row, token).
    """

    def __init__(self, places: Sequence[tuple[int, int]]) -> None:
        self.by_row: dict[int, list[int]] = {}
        for row, token in places:
            self.by_row.setdefault(row, []).append(token)

    def __call__(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The mask `(B, T)`."""
        mask = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
        first = batch["attention_mask"].argmax(1).tolist()
        for at, row in enumerate(batch["index"].tolist()):
            for token in self.by_row.get(row, ()):
                mask[at, first[at] + token] = True
        return mask


def retain_metric(captured: Captured | None, *, limit: int, ridge: float, seed: int) -> Metric:
    """
    The metric of the cost from retain activations, at most `limit` of them, drawn by `seed`; without any the plain
    norm of the edit.
    """
    if captured is None:
        return Metric.identity()
    inputs = captured.inputs
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
    ridge: float = 0.01,
    solver: Solver = "joint",
    seed: int = 0,
) -> tuple[list[LayerEdit], Odds]:
    r"""
    Edits under which each pair's token has at most `probability` at its place, by a real forward pass.

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
            Rows whose responses' outputs should stay.
        retain_limit (`int`, *optional*, defaults to `4096`):
            At most so many retain activations.
        ridge (`float`, *optional*, defaults to `0.01`):
            See [`solve_pcr`].
        solver (`str`, *optional*, defaults to `"joint"`):
            `"joint"` or `"greedy"`.
        seed (`int`, *optional*, defaults to `0`):
            Of the choice of retain activations.

    Returns:
        The edits, one for each block, and the log-odds `(K,)` with all of them in force.
    """
    wanted = float(torch.logit(torch.tensor(probability, dtype=torch.float64)))
    weighed = Weighed(rows=retain_rows, limit=retain_limit, ridge=ridge, seed=seed)
    before = after = run.odds(rows, pairs)
    edits = [_nothing(run.model, layer) for layer in layers]
    active = before.values > wanted - _FAR
    for _ in range(_ROUNDS if bool((before.values > wanted).any()) else 0):
        edits = _edits(run, rows, pairs.chosen(active), before.values[active], wanted, layers, weighed, solver)
        after = run.odds(rows, pairs, edits)
        if not bool(((after.values > wanted) & ~active).any()):
            break
        active = active | (after.values > wanted - _FAR / 2)
    return edits, after


@dataclass(frozen=True, kw_only=True)
class Weighed:
    """The retain rows that weigh the cost, at most `limit` of their activations, and the ridge."""

    rows: Sequence[Mapping[str, Any]] | None
    limit: int
    ridge: float
    seed: int

    def metric(self, run: Run, layer: int, edits: Sequence[LayerEdit]) -> Metric:
        """The metric at one block with the edits below in force."""
        kept = None if self.rows is None else run.at(self.rows, layer, "response", edits)
        return retain_metric(kept, limit=self.limit, ridge=self.ridge, seed=self.seed)


def _edits(
    run: Run,
    rows: Sequence[Mapping[str, Any]],
    pairs: Pairs,
    before: Tensor,
    wanted: float,
    layers: Sequence[int],
    weighed: Weighed,
    solver: Solver,
) -> list[LayerEdit]:
    """One edit for each block, for pairs all of which matter."""
    ids, columns = torch.unique(pairs.ids, return_inverse=True)
    places, of_pair = pairs.places()
    directions = unembedding_directions(run.model, ids.tolist())
    edits: list[LayerEdit] = []
    odds = before
    for number, layer in enumerate(layers):
        share = 1.0 / (len(layers) - number)
        # a pair that is low enough may rise up to what is allowed
        target = torch.where(odds > wanted, odds - share * (odds - wanted), wanted)
        read = run.at(rows, layer, Places(places), edits)
        problem = LevelProblem(
            inputs=read.inputs,
            outputs=read.outputs,
            directions=directions,
            places=_rows_of(read, places)[of_pair],
            columns=columns,
            before=odds,
            target=target,
            metric=weighed.metric(run, layer, edits),
            solver=solver,
        )
        found = search_levels(problem, partial(_measured, run, rows, pairs, tuple(edits), layer))
        certificate = {
            **found.edit.certificate.as_dict(),
            "reached": found.reached,
            "search": found.history,
            "largest_log_odds": float(found.odds.max()),
        }
        edits.append(layer_edit(run.model, layer, found.edit, certificate=certificate))
        odds = found.odds
    return edits


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
