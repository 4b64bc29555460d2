"""PCR at given levels: distances from points, or levels along directions, as numbers or by what benign text does.

Shapes: N places, n concepts, m inner width of the MLP, d model width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .algebra.certificate import true_margins
from .algebra.problem import Kind
from .algebra.solve import Solver, solve_pcr
from .capture import Captured
from .concepts import Concept
from .directions import Source, embedding_points, unembedding_directions
from .odds import Pairs
from .passes import Places, Run
from .pcr import layer_edit, retain_metric
from .plan import LayerEdit
from .positions import Occurrences

_LARGEST_SCALE = 64.0
_HALVINGS = 5


def kind_of(source: Source) -> Kind:
    """Directions bound half-spaces, points are left by balls."""
    return "half_space" if source == "unembedding" else "ball"


def concept_tensor(
    run: Run,
    concepts: Sequence[Concept],
    source: Source,
    *,
    layer: int,
    rows: Sequence[Mapping[str, Any]],
    edits: Sequence[LayerEdit] = (),
) -> Tensor:
    """
    Concepts `(n, d)` in the space of one block's output: a direction for each first token, or a point for each word.

    Args:
        run ([`Run`]):
            Model and forward passes.
        concepts (`Sequence[Concept]`):
            The words.
        source (`Source`):
            See [`Source`].
        layer (`int`):
            The block.
        rows (`Sequence[Mapping]`):
            For `"activation"`: rows that say the words, in prompts or responses.
        edits (`Sequence[LayerEdit]`, *optional*):
            Edits of blocks below, in force.

    Raises:
        ValueError: a word that no row says (`"activation"`).
    """
    if source == "unembedding":
        return unembedding_directions(run.model, first_tokens(concepts))
    if source == "embedding":
        return torch.stack([embedding_points(run.model, concept.spellings[0]).mean(0) for concept in concepts])
    found = []
    for concept in concepts:
        if concept.examples:
            texts = [{"input_ids": list(ids), "labels": list(ids)} for ids in concept.examples]
            found.append(run.at(texts, layer, "all", edits).outputs.mean(0))
            continue
        try:
            said = run.at(rows, layer, Occurrences(concept.spellings), edits)
        except ValueError as error:
            raise ValueError(
                f"No row says {concept.text!r}, so its activation is not known; give rows that do, or another source."
            ) from error
        found.append(said.outputs.mean(0))
    return torch.stack(found)


def first_tokens(concepts: Sequence[Concept]) -> list[int]:
    """The distinct first tokens of all words, ascending."""
    return sorted({token for concept in concepts for token in concept.first})


def calibrate_eps(outputs: Tensor, concepts: Tensor, kind: Kind, percentile: float) -> Tensor:
    """
    Levels `(n,)` from benign activations: the distance from a point below which `percentile` of them are, or the level
    along a direction above which `percentile` of them are. A fixed number is a cliff: in many dimensions nearly all
    distances are alike.

    Args:
        outputs (`Tensor`):
            `(T, d)`, of retain rows.
        concepts (`Tensor`):
            `(n, d)`.
        kind (`str`):
            `"ball"` or `"half_space"`.
        percentile (`float`):
            Between 0 and 100.
    """
    zero = torch.zeros(len(concepts), dtype=torch.float64)
    values = true_margins(outputs.double(), concepts.double(), zero, kind)  # distances, or minus the products
    level = torch.from_numpy(np.quantile(values.numpy(), percentile / 100.0, axis=0))  # torch's takes 16M numbers
    return level if kind == "ball" else -level


def plan_by_level(
    run: Run,
    rows: Sequence[Mapping[str, Any]],
    concepts: Sequence[Concept],
    places: Sequence[tuple[int, int]],
    *,
    source: Source,
    layers: Sequence[int],
    eps: float | None = None,
    eps_percentile: float | None = None,
    scale: float = 1.0,
    retain_rows: Sequence[Mapping[str, Any]] | None = None,
    retain_limit: int = 4096,
    ridge: float = 0.01,
    solver: Solver = "joint",
    soft_margin: float | None = None,
    seed: int = 0,
) -> list[LayerEdit]:
    """
    Edits under which the outputs at all places keep away from all concepts, as in the paper: block after block in
    ascending order, each on what it sees with the edits below in force, so that earlier guarantees stay exact.

    Args:
        run ([`Run`]):
            Model and forward passes.
        rows (`Sequence[Mapping]`), concepts (`Sequence[Concept]`), places (`Sequence[tuple[int, int]]`):
            Tokenised rows, words, and the tokens (row, token) that are constrained.
        source (`Source`), layers (`Sequence[int]`):
            What words are, and the blocks from 1, ascending.
        eps (`float`, *optional*), eps_percentile (`float`, *optional*):
            Levels as they are, or see [`calibrate_eps`]; one of them.
        scale (`float`, *optional*, defaults to `1.0`):
            Factor on distances.
        retain_rows, retain_limit, ridge, solver, soft_margin, seed:
            As in [`plan_by_probability`] and [`solve_pcr`].

    Raises:
        ValueError: constraints that contradict each other, or a percentile without retain rows.
    """
    if eps_percentile is not None and retain_rows is None:
        raise ValueError("eps_percentile is measured on retain rows; give retain_dataset, or eps as a number.")
    kind = kind_of(source)
    edits: list[LayerEdit] = []
    for layer in layers:
        read = run.at(rows, layer, Places(places), edits)
        kept = None if retain_rows is None else run.at(retain_rows, layer, "predicting", edits)
        named = concept_tensor(run, concepts, source, layer=layer, rows=rows, edits=edits)
        edit = solve_pcr(
            read.inputs,
            read.outputs,
            named,
            scale * _level(kept, named, kind, eps, eps_percentile),
            retain_inputs=retain_metric(kept, limit=retain_limit, ridge=ridge, seed=seed),
            solver=solver,
            kind=kind,
            soft_margin=soft_margin,
        )
        if edit.certificate.conflict:
            raise ValueError(
                f"No edit of block {layer} satisfies all constraints: {len(edit.certificate.conflict)} pairs of an "
                f"activation and a concept contradict each other, e.g. {list(edit.certificate.conflict[:3])}. Lower "
                "the level, or allow a soft_margin."
            )
        edits.append(layer_edit(run.model, layer, edit))
    return edits


def _level(kept: Captured | None, named: Tensor, kind: Kind, eps: float | None, percentile: float | None) -> Tensor:
    if eps is not None:
        return torch.full((len(named),), eps, dtype=torch.float64)
    assert kept is not None, "checked before anything is computed"
    assert percentile is not None, "one of the two is given"
    return calibrate_eps(kept.outputs, named, kind, percentile)


def plan_points_by_probability(
    run: Run,
    rows: Sequence[Mapping[str, Any]],
    concepts: Sequence[Concept],
    pairs: Pairs,
    *,
    probability: float,
    **options: Any,
) -> list[LayerEdit]:
    """
    The nearest points may be kept at, for each word to have at most `probability` at its places by a real forward
    pass: one factor on all distances, doubled until it is enough and then halved between what is and what is not.

    Args:
        run, rows, concepts:
            As in [`plan_by_level`].
        pairs ([`Pairs`]):
            Places and next tokens.
        probability (`float`):
            The most that is allowed.
        options:
            Of [`plan_by_level`], without the level; the distances that are scaled are those below which one in a
            hundred retain activations is.

    Raises:
        ValueError: no distance is enough, or there are no retain rows to measure distances on.
    """
    wanted = float(torch.logit(torch.tensor(probability, dtype=torch.float64)))
    places = pairs.places()[0]

    def attempt(scale: float) -> tuple[list[LayerEdit], float]:
        edits = plan_by_level(run, rows, concepts, places, eps_percentile=1.0, scale=scale, **options)
        return edits, float(run.odds(rows, pairs, edits).values.max())

    low, high = 0.0, 1.0
    edits, highest = attempt(high)
    while highest > wanted:
        if high >= _LARGEST_SCALE:
            raise ValueError(
                f"Keeping {high:g} times the usual distance from the words' points still leaves one of them a "
                f"probability of {float(torch.sigmoid(torch.tensor(highest))):.2g}, above {probability:g}: outputs of "
                f"blocks {list(options['layers'])} do not decide on words by these points. Use source='unembedding', "
                "the last block, or eps."
            )
        low, high = high, 2.0 * high
        edits, highest = attempt(high)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2.0
        tried, found = attempt(middle)
        if found <= wanted:
            high, edits = middle, tried
        else:
            low = middle
    return edits
