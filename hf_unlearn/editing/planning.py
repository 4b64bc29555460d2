"""From words, rows and a model to a plan; the model is left as it was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from accelerate.utils import extract_model_from_parallel
from transformers.utils import logging

from ..attacks.refusal import attack_succeeds
from ..losses import IGNORE_INDEX
from ..metrics.generate import padding_id
from ..probes.taps import resolve_layer
from ..reports.versions import library_versions
from .algebra.solve import Solver
from .concepts import Concept, find_occurrences, text_concepts, word_concepts
from .config import EditConfig
from .directions import Source
from .distinct import SaidText
from .edit_rows import Row, check_sized, edit_rows, named_places, prompt_of, word_pairs
from .levels import plan_by_level, plan_points_by_probability
from .measures import Judge, edited_answers, measure_edits
from .odds import Demands, Pairs
from .passes import Run
from .pcr import plan_by_probability
from .plan import EditPlan, LayerEdit
from .plan_regions import plan_regions
from .variants import with_variants
from .weighing import retain_weights

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

logger = logging.get_logger(__name__)

_HELD_OUT = 200  # retain rows beside those that are weighed, to measure on


@dataclass(frozen=True, kw_only=True)
class _Task:
    """Everything that is decided before the first edit is tried."""

    run: Run
    tokenizer: Any
    config: EditConfig
    concepts: list[Concept]
    rows: list[Row]
    retain: list[Row] | None
    held_out: list[Row] | None
    layers: list[int]
    bos_token_id: int | None


def plan_edit(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Any,
    config: EditConfig | None = None,
    *,
    retain_dataset: Any = None,
    attack_dataset: Any = None,
    judge: Judge = attack_succeeds,
    measure: bool = True,
    accelerator: Any = None,
    progress: bool = True,
) -> EditPlan:
    """
    Plans the edit that a config asks for. The model is left untouched: edits are tried by hooks, which are gone
    afterwards whatever happens.

    Args:
        model (`PreTrainedModel`, or what PEFT or an engine has made of it):
            The model.
        tokenizer (`PreTrainedTokenizerBase`):
            Its tokenizer.
        dataset (`Dataset` or `list[dict]`):
            Rows that say the words (question-answer, prompt-completion, conversational, text or tokenised), or prompts
            alone.
        config ([`EditConfig`], *optional*):
            The options.
        retain_dataset (`Dataset` or `list[dict]`, *optional*):
            Rows whose answers should stay; without them the edit is the smallest in norm.
        attack_dataset (`Dataset` or `list[dict]`, *optional*):
            Jailbreak prompts, only measured on.
        judge (`Callable[[str, str], bool]`, *optional*):
            Whether an answer to a prompt is a success of the attack; by default one that does not refuse.
        measure (`bool`, *optional*, defaults to `True`):
            Whether to generate and measure before and after; without it `measures` says how the plan was made only.
        accelerator (`Accelerator`, *optional*):
            With several processes; every one makes the same plan.
        progress (`bool`, *optional*, defaults to `True`):
            Whether progress bars are shown.

    Returns:
        [`EditPlan`]: with `measures`, before and after: `constrained` (the largest probability at all places that the
            edit was made for), `reach` (probability, perplexity and rank of the words where
        the rows say them), `said` (rows whose greedy answer says a word), `sampled` (sampled answers that do),
        `retain_probability` (of retain rows that the edit was not fitted to, where there are any), `attack` (successes
        and refusals).

    Raises:
        ValueError: no words, words that no row says, layers that cannot be edited, or constraints that contradict each
            other.
    """
    task = _task(model, tokenizer, dataset, config or EditConfig(), retain_dataset, accelerator, progress)
    demands = None
    if task.config.method != "pcr":
        edits, extra = plan_regions(
            task.run, tokenizer, task.rows, task.concepts, task.retain, task.layers, task.config
        )
    else:
        edits, extra, demands = _plan_pcr(task)
    plan = EditPlan(
        method=task.config.method,
        edits=tuple(edits),
        settings=task.config.as_settings(),
        versions=library_versions(),
        demands=demands,
    )
    return plan.with_measures(**extra, **(_measure(task, edits, attack_dataset, judge, plan) if measure else {}))


def verify_plan(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Any,
    config: EditConfig,
    plan: EditPlan,
    *,
    retain_dataset: Any = None,
    attack_dataset: Any = None,
    judge: Judge = attack_succeeds,
    accelerator: Any = None,
    progress: bool = True,
) -> dict[str, Any]:
    """
    The measures of [`plan_edit`] with `after` taken from `model` as it is, the plan applied to it: by what its weights
    have become, not by what was planned. `before` is the plan's. `constrained` is measured while the plan still has
    its `demands`, which are in no file.

    Args:
        model, tokenizer, dataset, config, retain_dataset, attack_dataset, judge, accelerator, progress:
            As in [`plan_edit`]; the model has the edit in it.
        plan ([`EditPlan`]):
            What was applied.
    """
    task = _task(model, tokenizer, dataset, config, retain_dataset, accelerator, progress)
    return _measure(task, None, attack_dataset, judge, plan)


def _measure(
    task: _Task,
    edits: Sequence[LayerEdit] | None,
    attack_dataset: Any,
    judge: Judge,
    plan: EditPlan,
) -> dict[str, Any]:
    """With edits in force, or None of a model that has the plan in it: what was before is then the plan's."""
    attacks = None
    if attack_dataset is not None:
        attacks = edit_rows(attack_dataset, task.tokenizer, name="attack", max_length=task.config.max_length)
    found = measure_edits(
        task.run,
        task.tokenizer,
        task.rows,
        task.concepts,
        edits,
        max_new_tokens=task.config.max_new_tokens,
        samples=task.config.samples,
        seed=task.config.seed,
        retain_rows=task.held_out or task.retain,
        attack_rows=attacks,
        judge=judge,
        demands=plan.demands,
        known=None if edits is not None else plan.measures,
    )
    if task.retain is not None:
        found["retain_probability"]["held_out"] = task.held_out is not None
    return found


def _task(
    model: Any, tokenizer: Any, dataset: Any, config: EditConfig, retain_dataset: Any, accelerator: Any, progress: bool
) -> _Task:
    model = extract_model_from_parallel(model, keep_torch_compile=False)  # what DDP has put around it
    words, texts = config.all_words(), config.all_texts()
    if not words and not texts and config.method == "pcr":
        raise ValueError("There are no words to make unreachable; set words or words_file.")
    if texts and not words and config.positions == "occurrence":
        raise ValueError("texts are said nowhere; set positions to 'last_prompt', 'response' or 'all'.")
    concepts = [*(word_concepts(tokenizer, words) if words else []), *text_concepts(tokenizer, texts)]
    layers = sorted({_number(model, layer) for layer in config.layers or [-1]})
    rows = edit_rows(dataset, tokenizer, name="edit", max_length=config.max_length)
    retain = held_out = None
    if retain_dataset is None and config.weigh_retain:
        raise ValueError("weigh_retain weighs retain activations, and there are none; give retain_dataset.")
    if retain_dataset is None:
        logger.warning(
            "There is no retain_dataset: the edit will be the smallest in norm, and what it does to other answers is "
            "neither weighed nor measured."
        )
    else:
        check_sized(retain_dataset, "retain")
        order = np.random.default_rng(config.seed).permutation(len(retain_dataset))
        chosen = order[: config.retain_examples + _HELD_OUT].tolist()
        few = (
            retain_dataset.select(chosen) if hasattr(retain_dataset, "select") else [retain_dataset[i] for i in chosen]
        )
        every = edit_rows(few, tokenizer, name="retain", max_length=config.max_length)
        retain, held_out = every[: config.retain_examples], every[config.retain_examples :] or None
    run = Run(
        model=model,
        pad_token_id=padding_id(tokenizer),
        batch_size=config.batch_size,
        accelerator=accelerator,
        progress=progress,
    )
    return _Task(
        run=run,
        tokenizer=tokenizer,
        config=config,
        concepts=concepts,
        rows=rows,
        retain=retain,
        held_out=held_out,
        layers=layers,
        bos_token_id=model.config.get_text_config().bos_token_id,
    )


def _number(model: Any, layer: int) -> int:
    number = resolve_layer(model, layer)
    assert isinstance(number, int), "a number stays one"
    return number


def _plan_pcr(task: _Task) -> tuple[list[LayerEdit], dict[str, Any], Demands | None]:
    """Edits, how many rows each round of generation added, and what was asked of the edits."""
    config, tokenizer = task.config, task.tokenizer
    special = sorted({*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder})
    known = min(len(tokenizer), task.run.model.config.get_text_config().vocab_size)
    vary = partial(with_variants, protected=special, others=known, seed=config.seed)
    by_name = config.positions != "occurrence"
    by_odds = config.source == "unembedding" and config.searches
    distinct = config.token == "distinct" and by_odds and not by_name
    kept = SaidText(task.retain or []) if distinct else None
    both = {one.concept for one in find_occurrences(tokenizer, task.retain or [], task.concepts)}
    if both:
        logger.warning(
            f"Retain rows say {len(both)} of the {len(task.concepts)} words themselves: there, what is to stay and "
            "what is to go contradict each other."
        )
    copied = not by_name or (config.positions == "last_prompt" and config.searches)  # other places would be too many

    def asked(said: Sequence[Row], copies: int) -> tuple[list[Row], Pairs, Sequence[tuple[int, int]]]:
        """Rows with copies, their pairs, and places by name."""
        named = vary(task.rows, count=copies if copied else 0) if by_name else []
        rows = vary(said, count=copies) if said else []
        pairs = Pairs.of([])
        if said:
            pairs = word_pairs(
                tokenizer, rows, task.concepts, "occurrence", task.bos_token_id, kept, config.tokens_per_word
            )
        if not by_name:
            return rows, pairs, ()
        # places of the rows themselves, and those where generated answers say a word
        at_names = word_pairs(tokenizer, named, task.concepts, config.positions, task.bos_token_id)
        places = named_places(named, config.positions, task.bos_token_id)
        return [*named, *rows], at_names.and_then(pairs, len(named)), places

    said, added = ([] if by_name else list(task.rows)), list[int]()
    weights = None
    if config.weigh_retain:
        assert task.retain is not None, "checked before anything is computed"
        weights = retain_weights(task.run, task.retain, _solve(task, *asked(said, 0)))
    while True:
        rows, pairs, places = asked(said, config.variants)
        edits = _solve(task, rows, pairs, places, weights)
        if len(added) >= config.generation_rounds:
            break
        answers = _answers(task, edits)
        fresh = [row for row in answers if find_occurrences(tokenizer, [row], task.concepts) and row not in said]
        added.append(len(fresh))
        if not fresh:
            break
        said += fresh
    demands = Demands(rows=rows, pairs=pairs) if config.searches and len(pairs) else None
    return edits, {"rows_added_by_generation": added, "pairs": len(pairs)}, demands


def _solve(
    task: _Task, rows: Sequence[Row], pairs: Pairs, named: Sequence[tuple[int, int]], weights: Tensor | None = None
) -> list[LayerEdit]:
    config = task.config
    shared: dict[str, Any] = {
        "layers": task.layers,
        "retain_rows": task.retain,
        "retain_limit": config.retain_positions,
        "ridge": config.ridge,
        "solver": cast(Solver, config.solver),
        "seed": config.seed,
    }
    source = cast(Source, config.source)
    if source == "unembedding" and not config.has_level:
        shared["retain_weights"] = weights
        return plan_by_probability(task.run, rows, pairs, probability=config.probability, **shared)[0]
    places = sorted({*pairs.places()[0], *named})  # texts have places and no tokens
    at_level = partial(
        plan_by_level, task.run, rows, task.concepts, places, source=source, soft_margin=config.soft_margin, **shared
    )
    if config.has_level:
        return at_level(eps=config.eps, eps_percentile=config.eps_percentile)
    return plan_points_by_probability(
        task.run, rows, task.concepts, pairs, probability=config.probability, source=source, **shared
    )


def _answers(task: _Task, edits: Sequence[LayerEdit]) -> list[Row]:
    """Rows with the model's own answers in place of the responses."""
    asked = [row for row in task.rows if prompt_of(row)]  # text alone has nothing to answer
    if not asked:
        return []
    texts = edited_answers(task.run, task.tokenizer, asked, edits, max_new_tokens=task.config.max_new_tokens)
    rows = []
    for row, text in zip(asked, texts, strict=True):
        prompt = prompt_of(row)
        said = task.tokenizer.decode(row["input_ids"][len(prompt) :])
        space = said[: len(said) - len(said.lstrip())]  # generated text comes without the space that it began with
        ids = task.tokenizer(space + text, add_special_tokens=False)["input_ids"]
        rows.append({"input_ids": prompt + ids, "labels": [IGNORE_INDEX] * len(prompt) + ids})
    return rows
