"""What retain activations weigh: not alike, but by what moving them costs the answers that they belong to.

Shapes: N retain activations, K tokens of retain responses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .odds import Pairs
from .passes import Run
from .plan import LayerEdit


def retain_weights(run: Run, rows: Sequence[Mapping[str, Any]], edits: Sequence[LayerEdit]) -> Tensor:
    r"""
    Weights of the activations that predict retain responses, by what a first plan does to them.

    The cost of an edit takes all outputs as equally sensitive, $\sum_i \|\Delta h_i\|^2$. They are not: most tokens
    of an answer stay whatever happens, and a few, such as a name that begins like a forbidden one, are lost at once.
    A plan that exists shows which: with $d_i$ the loss that it adds to retained token i, in nats, and $u_i = \sum_l
    \|\Delta_l h_i^l\|^2$ how far it moves the outputs before it, over all edited blocks,

    $$w_i = \frac12 + \frac12 \frac{\kappa_i}{\bar\kappa}, \qquad \kappa_i = \frac{\max(d_i, 0)}{u_i + \bar u},$$

    so that $\sum_i w_i \|\Delta h_i\|^2$ agrees with the loss near that plan (a step of majorise-minimise with secant
    curvatures), and half of the old cost remains for what that plan has not touched. Bars are means. The mean of the
    weights is 1.

    Args:
        run ([`Run`]):
            Model and forward passes.
        rows (`Sequence[Mapping]`):
            Tokenised retain rows.
        edits (`Sequence[LayerEdit]`):
            The first plan.

    Returns:
        `(N,)` float64, in the order in which [`capture`] reads `"predicting"` tokens; all 1 where nothing is lost.
    """
    moved: Tensor | float = 0.0
    for number, edit in enumerate(edits):
        read = run.at(rows, edit.layer, "predicting", edits[:number])
        inner = read.inputs.double() @ edit.lora_a.double().T
        moved = moved + ((inner @ (edit.lora_b.double().T @ edit.lora_b.double())) * inner).sum(1)
    assert isinstance(moved, Tensor), "there is a block"
    places = zip(read.rows.tolist(), read.tokens.tolist(), strict=True)
    pairs = Pairs.of([(row, token, int(rows[row]["input_ids"][token + 1])) for row, token in places])
    lost = (run.odds(rows, pairs).log_probs() - run.odds(rows, pairs, edits).log_probs()).clamp(min=0.0)
    if not (bool((lost > 0).any()) and bool((moved > 0).any())):
        return torch.ones_like(lost)
    curvature = lost / (moved + moved.mean())
    return 0.5 + 0.5 * curvature / curvature.mean()


def drawn(weights: Tensor, limit: int, seed: int) -> tuple[Tensor, Tensor]:
    r"""
    At most `limit` of weighed activations, the heavy ones first of all: each is taken with the probability $\pi_i =
    \min(1, c w_i)$, c such that `limit` are taken (systematic sampling in a random order), and then weighs $w_i /
    \pi_i$ times the share of activations that are taken, so that a mean over what is taken is, on average, the mean
    over all.

    Args:
        weights (`Tensor`):
            `(N,)` float64, not negative.
        limit (`int`):
            The most that are taken.
        seed (`int`):
            Of the draw.

    Returns:
        Indices `(n,)`, ascending, and their weights `(n,)`.
    """
    count = len(weights)
    if count <= limit:
        return torch.arange(count), weights
    falling = weights.sort(descending=True).values
    rest = falling.sum() - torch.cat([falling.new_zeros(1), falling.cumsum(0)[:-1]])  # from each of them on
    certain = next(k for k in range(limit + 1) if k == limit or falling[k] * (limit - k) <= rest[k])
    scale = (limit - certain) / rest[certain] if certain < limit and rest[certain] > 0 else torch.zeros(())
    chance = (weights * scale).clamp(max=1.0)
    if certain:
        chance[weights >= falling[certain - 1]] = 1.0
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(count, generator=generator)
    ends = chance[order].cumsum(0)
    first = torch.rand((), generator=generator, dtype=torch.float64)
    taken = (ends - first).ceil().diff(prepend=(-first).ceil()[None]) > 0
    chosen = order[taken].sort().values
    return chosen, weights[chosen] / chance[chosen] * (len(chosen) / count)
