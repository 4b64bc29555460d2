"""TSR and ARR by the options of an [`EditConfig`]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from ..losses import IGNORE_INDEX
from .concepts import Concept, find_occurrences
from .config import EditConfig
from .edit_rows import Row
from .levels import first_tokens
from .passes import Run
from .plan import LayerEdit
from .regions.config import RadiusUnit, RegionConfig
from .regions.plans import plan_arr, plan_tsr


def plan_regions(
    run: Run,
    tokenizer: Any,
    rows: Sequence[Row],
    concepts: Sequence[Concept],
    retain_rows: Sequence[Row] | None,
    layers: Sequence[int],
    config: EditConfig,
) -> tuple[list[LayerEdit], dict[str, Any]]:
    """
    The edits of TSR or ARR and what they measure: with words their first tokens are the region, without words the
    responses of the rows are. Where responses say the words, ARR's prompts go up to there.

    Args:
        run ([`Run`]):
            Model and forward passes.
        tokenizer (`PreTrainedTokenizerBase`):
            The model's tokenizer.
        rows (`Sequence[Row]`), concepts (`Sequence[Concept]`), retain_rows (`Sequence[Row]`, *optional*):
            Tokenised rows, words, and rows that are to stay as they are.
        layers (`Sequence[int]`), config ([`EditConfig`]):
            Blocks from 1, and the options.
    """
    given: dict[str, Any] = {} if config.learning_rate is None else {"learning_rate": config.learning_rate}
    options = RegionConfig(
        radius=config.radius,
        radius_unit=cast(RadiusUnit, config.radius_unit),
        rank=config.rank,
        steps=config.steps,
        retain_weight=config.retain_weight,
        free_positions=config.free_positions,
        batch_size=config.batch_size,
        seed=config.seed,
        **given,
    )
    if config.method == "arr":
        rows = before_words(tokenizer, rows, concepts)
    plan = (plan_tsr if config.method == "tsr" else plan_arr)(
        run.model,
        rows,
        token_ids=first_tokens(concepts) or None,
        retain_rows=retain_rows,
        layers=layers,
        config=options,
        pad_token_id=run.pad_token_id,
        accelerator=run.accelerator,
        description=config.method.upper() if run.progress else None,
    )
    return list(plan.edits), {config.method: plan.measures}


def before_words(tokenizer: Any, rows: Sequence[Row], concepts: Sequence[Concept]) -> list[Row]:
    """A prompt for each occurrence of a word in a response, up to just before it; the rows as they are without any."""
    found = [one for one in find_occurrences(tokenizer, rows, concepts) if one.start > 0]
    if not found:
        return list(rows)
    return [
        {"input_ids": rows[one.row]["input_ids"][: one.start], "labels": [IGNORE_INDEX] * one.start} for one in found
    ]
