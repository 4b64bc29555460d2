"""Tokenises, splits and checks the trainer's datasets before any compute is spent."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from ..data import REFUSALS, prepare_dataset
from ..losses import IGNORE_INDEX
from .config import UnlearningConfig

# datasets is untyped for the checker; at run time a Dataset or an IterableDataset
Rows: TypeAlias = Any
MAX_SHARED_EVAL_ROWS = 512
# A model that knows the retain rows recognises an exchanged answer after some tokens and completes it by heart: on the
# TOFU lab model the NLL falls from 7 nats at tokens 2-6 to 1.5 behind token 20. Only the beginning is unseen text.
WRONG_ANSWER_TOKENS = 6


@dataclass(frozen=True, kw_only=True)
class PreparedData:
    """Tokenised rows: `input_ids`, `labels` (and the refusal twin on the forget side where a loss needs it)."""

    forget: Rows
    retain: Mapping[str, Rows] = field(default_factory=dict)
    retain_eval: Mapping[str, Dataset] = field(default_factory=dict)
    forget_eval: Dataset
    holdout: Dataset | None = None
    evaluation: Mapping[str, Dataset] = field(default_factory=dict)


def named_datasets(argument: str, datasets: Any, default_name: str) -> dict[str, Any]:
    """
    One dataset or a dict of several, as a dict.

    Raises:
        ValueError: a name that cannot be part of a metric.
    """
    if datasets is None:
        return {}
    # DatasetDict is a dict of *splits* of one dataset, not of several retain sets
    if isinstance(datasets, dict) and type(datasets) is dict:
        for name in datasets:
            if not isinstance(name, str) or not name or "/" in name:
                raise ValueError(f"{argument} has the name {name!r}; expected a non-empty string without '/'.")
            if name == "forget":
                raise ValueError(f"{argument} has the name 'forget', under which the forget set is logged; rename it.")
        return dict(datasets)
    return {default_name: datasets}


def prepare(
    *,
    forget: Any,
    retain: Any,
    holdout: Any,
    evaluation: Any,
    tokenizer: PreTrainedTokenizerBase,
    args: UnlearningConfig,
    with_refusals: bool,
) -> PreparedData:
    """Tokenises every dataset and holds out a part of each retain set; bad input raises ValueError here."""
    if forget is None:
        raise ValueError("forget_dataset is missing. Pass the rows that the model must forget.")

    def tokenise(dataset: Any, name: str, **kwargs: Any) -> Any:
        return prepare_dataset(
            dataset,
            tokenizer,
            name=name,
            max_length=args.max_length,
            completion_only_loss=args.completion_only_loss,
            assistant_only_loss=args.assistant_only_loss,
            num_proc=args.dataset_num_proc,
            **kwargs,
        )

    forget_rows = tokenise(forget, "forget_dataset", refusals=REFUSALS if with_refusals else None, seed=args.seed)
    train, held_out = {}, {}
    for name, dataset in named_datasets("retain_dataset", retain, "retain").items():
        label = "retain_dataset" if name == "retain" else f"retain_dataset[{name!r}]"
        train[name], held_out[name] = hold_out(tokenise(dataset, label), args.retain_eval_size, args.seed)
    return PreparedData(
        forget=forget_rows,
        retain=train,
        retain_eval=held_out,
        forget_eval=first_rows(numbered(forget_rows), args.forget_eval_size, args.seed),
        holdout=None if holdout is None else first_rows(tokenise(holdout, "holdout_dataset"), 10**9, args.seed),
        evaluation={
            name: first_rows(tokenise(dataset, f"eval_dataset[{name!r}]"), 10**9, args.seed)
            for name, dataset in named_datasets("eval_dataset", evaluation, "").items()
        },
    )


def hold_out(rows: Rows, size: float, seed: int) -> tuple[Rows, Dataset]:
    """
    Splits rows into a training part and an evaluation part; with `size` 0 both are the whole.

    Args:
        rows (`Dataset` or `IterableDataset`):
            Tokenised rows; of a stream the first rows are held out.
        size (`float`):
            Rows (1 or more) or share (below 1, at most 512 rows).
        seed (`int`):
            Seed of the random choice.
    """
    if isinstance(rows, IterableDataset):
        count = int(size) if size >= 1 else (MAX_SHARED_EVAL_ROWS // 4 if size else 0)
        held = list(rows.take(count or MAX_SHARED_EVAL_ROWS // 4))
        return (rows.skip(count) if count else rows), Dataset.from_list(held)
    total = len(rows)
    count = int(size) if size >= 1 else min(MAX_SHARED_EVAL_ROWS, math.ceil(size * total))
    if size >= 1 and count >= total:
        raise ValueError(f"retain_eval_size is {count}, but the retain set has {total} rows; leave some to train on.")
    count = min(count, total - 1)
    if count == 0:
        return rows, first_rows(rows, MAX_SHARED_EVAL_ROWS, seed)
    order = np.random.default_rng(seed).permutation(total)
    return rows.select(sorted(order[count:].tolist())), rows.select(sorted(order[:count].tolist()))


def numbered(rows: Rows) -> Rows:
    """Rows with their number as `index`, the key of what is cached for each; a stream has none."""
    return rows if isinstance(rows, IterableDataset) else rows.add_column("index", list(range(len(rows))))


def order_seed(args: UnlearningConfig) -> int:
    """Seed of the order of the data: `data_seed`, or `seed` without one (0 is a seed too)."""
    return args.seed if args.data_seed is None else args.data_seed


def first_rows(rows: Rows, limit: int, seed: int) -> Dataset:
    """At most `limit` rows as a map-style dataset: a seeded sample of a table, the beginning of a stream."""
    if isinstance(rows, IterableDataset):
        return Dataset.from_list(list(rows.take(min(limit, MAX_SHARED_EVAL_ROWS))))
    if len(rows) <= limit:
        return rows
    return rows.select(sorted(np.random.default_rng(seed).permutation(len(rows))[:limit].tolist()))


def wrong_answers(rows: Dataset, seed: int, limit: int = 512) -> Dataset:
    """
    Questions with the beginning of another row's answer: text the model has not seen, made from rows that it has.

    Args:
        rows (`Dataset`):
            Tokenised rows whose labels mask a prompt.
        seed (`int`):
            Seed of the derangement.
        limit (`int`, *optional*, defaults to `512`):
            At most this many rows.

    Raises:
        ValueError: rows without a prompt, or fewer than two different answers.
    """
    prompts, answers = [], []
    for row in first_rows(rows, limit, seed):
        labels = row["labels"]
        start = next((i for i, label in enumerate(labels) if label != IGNORE_INDEX), len(labels))
        prompts.append(row["input_ids"][:start])
        answer = [token for token, label in zip(row["input_ids"], labels, strict=True) if label != IGNORE_INDEX]
        answers.append(answer[:WRONG_ANSWER_TOKENS])
    if not all(prompts):
        raise ValueError(
            'forget_target="holdout" needs text the model has never seen. The retain rows have no prompt to pair with '
            "a wrong answer: pass a holdout_dataset, or give forget_target as a number."
        )
    order = np.random.default_rng(seed).permutation(len(answers))
    for offset in range(1, len(order)):
        partner = np.roll(order, offset)
        mixed = [
            {"input_ids": prompts[i] + answers[j], "labels": [IGNORE_INDEX] * len(prompts[i]) + answers[j]}
            for i, j in zip(order, partner, strict=True)
            if answers[i] != answers[j]
        ]
        if mixed:
            return Dataset.from_list(mixed)
    raise ValueError(
        'forget_target="holdout" makes wrong answers by exchanging the answers of the retain rows, but they are all '
        "the same. Pass a holdout_dataset, or give forget_target as a number."
    )
