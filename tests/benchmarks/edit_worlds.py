"""The quickstart's constrained edit on its worlds, with other numbers of variants and other probabilities: how far every
single name falls under its own and under reworded questions, and what is kept.

python tests/benchmarks/edit_worlds.py [--seeds 0 1 2 3 4] [--variants 96] [--probability 9e-5]
    [--retain_positions 4096] [--tokens_per_word 2] [--weigh_retain true]
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterator
from dataclasses import replace
from math import nan
from typing import Any

from transformers.hf_argparser import string_to_bool

from hf_unlearn.editing import EditConfig, constrained_edit
from hf_unlearn.editing.edit_rows import edit_rows
from hf_unlearn.editing.measures import response_probability
from hf_unlearn.editing.passes import Run
from hf_unlearn.lab.edit_quickstart import (
    PROBABILITY,
    TOKENS_PER_WORD,
    VARIANTS,
    asked_data,
    word_probabilities,
)
from hf_unlearn.lab.quickstart import QUICKSTART_RECIPE
from hf_unlearn.lab.training import train_target
from hf_unlearn.lab.world import make_world, world_data
from hf_unlearn.metrics.generate import padding_id

QUESTIONS = {"own": "question", "reworded": "paraphrased_question"}
KNOWN = 5e-5  # a name that is below that before the edit is not counted
TITLES = (
    *("seed", "variants", "probability", "own: least fall", "reworded: least", "second least", "mean"),
    *("known names, own and reworded", "said of (own)", "retain, all rows", "s"),
)


def falls(before: list[float], after: list[float]) -> list[float]:
    """How many times less likely each known name has become, the least first."""
    return sorted(old / max(new, 1e-300) for old, new in zip(before, after, strict=True) if old > KNOWN)


def measure(seed: int, settings: list[tuple[int, float]], others: dict[str, Any]) -> Iterator[list[str]]:
    """A row of the table for each (variants, probability), with other options as they are given."""
    world = make_world(seed)
    data, names, _ = asked_data(world)
    target = train_target(world_data(world), replace(QUICKSTART_RECIPE, seed=seed))
    tokenizer = target.tokenizer
    rows = {
        wording: [{"question": row[question], "answer": row["answer"]} for row in data.forget_eval]
        for wording, question in QUESTIONS.items()
    }
    kept = edit_rows(data.retain, tokenizer, name="retain", max_length=1024)

    def probabilities(model: Any) -> dict[str, list[float]]:
        return {wording: word_probabilities(model, tokenizer, asked, names) for wording, asked in rows.items()}

    def retain(model: Any) -> float:
        return response_probability(Run(model=model, pad_token_id=padding_id(tokenizer), batch_size=64), kept, ())

    before, whole = probabilities(target.model), retain(target.model)
    for variants, probability in settings:
        config = EditConfig(
            words=names,
            seed=seed,
            probability=probability,
            layers=list(range(1, target.model.config.num_hidden_layers + 1)),
            retain_examples=len(data.retain),
            variants=variants,
            **others,
        )
        model, started = copy.deepcopy(target.model), time.perf_counter()
        done = constrained_edit(
            model, tokenizer, data.forget, config, retain_dataset=data.retain, merge=True, progress=False
        )
        seconds = time.perf_counter() - started
        after = probabilities(done.model)
        own, reworded = (falls(before[wording], after[wording]) for wording in QUESTIONS)
        said = done.plan.measures["said"]
        yield [
            *(str(seed), str(variants), f"{probability:g}"),
            *(
                f"{value:,.3g}" if value < 1_000 else f"{value:,.0f}"
                for value in (*(own or [nan])[:1], *[*reworded, nan, nan][:2])
            ),
            f"{sum(before['reworded']) / sum(after['reworded']):,.0f}",
            f"{len(own)}, {len(reworded)} of {len(before['own'])}",
            f"{said['after']} of {said['rows']}",
            f"{retain(done.model) / whole:.4f}",
            f"{seconds:.0f}",
        ]


def main() -> None:
    """Prints the table row by row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--variants", nargs="+", type=int, default=[VARIANTS])
    parser.add_argument("--probability", nargs="+", type=float, default=[PROBABILITY])
    parser.add_argument("--retain_positions", type=int, default=10**6)
    parser.add_argument("--tokens_per_word", type=int, default=TOKENS_PER_WORD)
    parser.add_argument("--weigh_retain", type=string_to_bool, default=True)
    options = parser.parse_args()
    settings = [(variants, wanted) for wanted in options.probability for variants in options.variants]
    others = {name: getattr(options, name) for name in ("retain_positions", "tokens_per_word", "weigh_retain")}
    for line in (TITLES, ["---"] * len(TITLES)):
        print(f"| {' | '.join(line)} |", flush=True)
    for seed in options.seeds:
        for line in measure(seed, settings, others):
            print(f"| {' | '.join(line)} |", flush=True)


if __name__ == "__main__":
    main()
