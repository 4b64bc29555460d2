"""TSR and ARR: bounded edits towards a safe region, and away from a harmful one (arXiv 2510.03567).

Shapes: d model width, m inner width of the MLP.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from transformers.utils import logging

from ..plan import EditPlan
from .changes import Change
from .config import RegionConfig
from .descent import Descent
from .objective import Objective, RelaxedObjective
from .relaxed import MixedEmbeddings
from .rows import check_token_ids, region_rows
from .task import Measures, RegionTask, held_still

__all__ = ["RegionConfig", "plan_arr", "plan_tsr"]

logger = logging.get_logger(__name__)


def plan_tsr(
    model: Any,
    rows: Sequence[Mapping[str, Any]],
    *,
    token_ids: Sequence[int] | None = None,
    retain_rows: Sequence[Mapping[str, Any]] | None = None,
    layers: Sequence[int] = (-1,),
    config: RegionConfig | None = None,
    pad_token_id: int,
    accelerator: Any = None,
    description: str | None = None,
) -> EditPlan:
    r"""
    The edit within a ball after which prompts go on safely (towards safer regions, arXiv 2510.03567):

        min_{|Delta| <= radius} mean_x -log sum_{k in K_safe} p_k(x; theta + Delta) + retain_weight * KL

    As written there it shapes the first token of the response only; with responses in the rows instead of
    `token_ids`, the loss is the mean negative log-likelihood of a safe response's tokens.

    Weights are not touched: the plan is applied later.

    Args:
        model (`PreTrainedModel`, or what PEFT or an engine has made of it):
            The model; in evaluation mode and without gradients of its own meanwhile.
        rows (`Sequence[Mapping]`):
            Tokenised prompts, `input_ids` and `labels`, with a safe response (labels) or alone (all labels -100).
        token_ids (`Sequence[int]`, *optional*):
            K_safe: the ids whose total probability as the next token counts. Responses in the rows are then left out.
        retain_rows (`Sequence[Mapping]`, *optional*):
            Rows with responses on which the edited model must stay like the unedited one.
        layers (`Sequence[int]`, *optional*, defaults to `(-1,)`):
            Blocks whose second MLP matrix is edited, 1 to n or -n to -1.
        config ([`RegionConfig`], *optional*):
            The options.
        pad_token_id (`int`):
            Id to pad with.
        accelerator (`Accelerator`, *optional*):
            With several processes, each takes its share of the rows; all get the same plan.
        description (`str`, *optional*):
            Text of a progress bar.

    Returns:
        [`EditPlan`]: method `"tsr"`; measures `loss` and `retain_kl`, each `before` and `after`, in nats, and the
        `totals` of all steps.

    Raises:
        TypeError, ValueError: rows, ids, layers or options that do not fit, or a loss that is not finite.
    """
    task = RegionTask(model, token_ids, retain_rows, layers, config, accelerator, description)
    data = region_rows(rows, task.token_ids)
    with held_still(model):
        objective = Objective(
            task.model, data, task.retain, sign=1.0, cap=math.inf, **task.objective_options(pad_token_id)
        )
        before = _plain_measures(objective, {})
        found = task.descend(objective)
        found.load(found.best)
        after = _plain_measures(objective, found.changes)
    return task.plan("tsr", found, found.best_step, before, after)


def plan_arr(
    model: Any,
    rows: Sequence[Mapping[str, Any]],
    *,
    token_ids: Sequence[int] | None = None,
    retain_rows: Sequence[Mapping[str, Any]] | None = None,
    layers: Sequence[int] = (-1,),
    config: RegionConfig | None = None,
    pad_token_id: int,
    accelerator: Any = None,
    description: str | None = None,
) -> EditPlan:
    r"""
    The edit within a ball after which even adversarial prompts do not go on harmfully (away from risky regions,
    arXiv 2510.03567):

        max_{|Delta| <= radius} mean_x min(loss_cap, min_X l(x, X; theta + Delta)) - retain_weight * KL
        l(x, X; theta) = -log sum_{k in K_harm} p_k(x, X; theta)

    X are `free_positions` positions put into each prompt, each a mixture of input embeddings. The inner minimum is
    approached by projected gradient descent, so that its loss is an upper bound of the true minimum.

    Args:
        rows (`Sequence[Mapping]`):
            As in [`plan_tsr`], with harmful responses, and perhaps `free_at`: the column of the prompt before which
            the free positions go, by default its last token's.
        token_ids (`Sequence[int]`, *optional*):
            K_harm.
        model, retain_rows, layers, config, pad_token_id, accelerator, description:
            As in [`plan_tsr`].

    Returns:
        [`EditPlan`]: method `"arr"`; measures `clean` (the rows without free positions), `relaxed` and `rounded` (the
        likeliest token at each free position) losses without the cap and `retain_kl`, each `before` and `after`, in
        nats, and the `totals` of all steps. After the edit the adversary attacks from where it was and once more from
        its first points, and the lower loss of each row counts.

    Raises:
        TypeError, ValueError: as in [`plan_tsr`]; and free positions outside of a prompt.
    """
    task = RegionTask(model, token_ids, retain_rows, layers, config, accelerator, description)
    options = task.config
    excluded = check_token_ids(options.excluded_token_ids or None, task.vocabulary, "excluded_token_ids")
    if len(excluded) >= task.vocabulary:
        raise ValueError("excluded_token_ids holds the whole vocabulary; leave something to the free positions.")
    clean_data = region_rows(rows, task.token_ids)
    data = region_rows(rows, task.token_ids, free_positions=options.free_positions)
    shared = {"sign": -1.0, "cap": options.loss_cap, **task.objective_options(pad_token_id)}
    with held_still(model):
        clean = Objective(task.model, clean_data, None, **shared)
        objective = RelaxedObjective(
            task.model,
            data,
            task.retain,
            mixing=MixedEmbeddings(task.inner, excluded),
            positions=options.free_positions,
            inner_steps=options.inner_steps,
            attack_steps=options.attack_steps,
            restart_every=options.restart_every,
            length=options.inner_learning_rate,
            random=options.start == "random",
            seed=options.seed,
            **shared,
        )
        objective.harden({}, options.attack_steps, fresh=False)
        before = _adversarial_measures(objective, clean, {})
        found = task.descend(objective)
        step, after = _better_end(objective, clean, found, options.attack_steps)
    if after["total"] > before["total"]:
        logger.warning(
            f"The edit does not lower the harmful region's objective against a fresh attack ({before['total']:.4g} "
            f"before, {after['total']:.4g} after). Raise radius, steps or inner_steps, or lower retain_weight."
        )
    return task.plan("arr", found, step, before, after)


def _plain_measures(objective: Objective, changes: Mapping[int, Change]) -> Measures:
    terms, _ = objective.evaluate(changes, slopes=False)
    return {"loss": terms.region, "retain_kl": terms.retain, "total": terms.total}


def _adversarial_measures(objective: RelaxedObjective, clean: Objective, changes: Mapping[int, Change]) -> Measures:
    """At the adversary's points as they are, which [`RelaxedObjective.harden`] has moved before."""
    terms = objective.at_points(changes)
    return {
        "clean": clean.mean_of_rows(clean.row_losses, changes),
        "relaxed": objective.mean_of_rows(objective.relaxed_losses, changes),
        "rounded": objective.mean_of_rows(objective.rounded_losses, changes),
        "retain_kl": terms.retain,
        "total": terms.total,
    }


def _better_end(
    objective: RelaxedObjective, clean: Objective, found: Descent, attack_steps: int
) -> tuple[int, Measures]:
    """
    The better of the lowest total seen and the last step, under the full attack, loaded into the changes.

    The totals of a min-max descent are not fair among each other: an early one may be low because the adversary had
    not caught up yet.
    """
    ends = {found.best_step: found.best, len(found.totals) - 1: found.last}
    points = list(objective.points)
    measured: dict[int, Measures] = {}
    for step, state in ends.items():
        found.load(state)
        objective.points = list(points)
        objective.harden(found.changes, attack_steps, fresh=True)
        measured[step] = _adversarial_measures(objective, clean, found.changes)
    chosen = min(measured, key=lambda step: measured[step]["total"])
    found.load(ends[chosen])
    return chosen, measured[chosen]
