"""TOFU's evaluation of forget10 in batches grouped by length against a row at a time, and whether its memory grows.

python tests/benchmarks/evaluate.py TOFU_FOLDER [--rows 400] [--epochs 30] [--repeats 1] [--quick]

Scored are the answer, the paraphrases and five wrong answers of every row, and an answer of up to 200 tokens is
generated. Both ways take turns in one run; a first turn of few rows warms up.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timing import peak_bytes, wait

from hf_unlearn.evaluation.session import Session
from hf_unlearn.lab.models import tiny_config, tiny_model
from hf_unlearn.lab.recipe import LabData, LabRecipe
from hf_unlearn.lab.tofu import tofu_data
from hf_unlearn.lab.tokenizer import train_tokenizer
from hf_unlearn.lab.training import sft, train_target
from hf_unlearn.metrics import evenly_spaced, greedy, mean_nll
from hf_unlearn.metrics.generate import padding_id
from hf_unlearn.progress import quiet_libraries
from hf_unlearn.reports.eval_rows import EncodedRows, EvalRows

# at least so many times faster
GOAL = 3.0
WARM_UP_ROWS = 4
MEMORY_ROWS = (100, 400)
# The peak is that of a single batch, and tokens of an answer are decoded one by one: a few of them show it.
MEMORY_TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What one way found, and the seconds of its two halves."""

    losses: np.ndarray
    answers: list[str]
    likelihoods: float
    generation: float


def in_batches(model: Any, tokenizer: Any, rows: EncodedRows, tokens: int) -> Turn:
    """As `hf-unlearn eval` does it: the hash of the weights and the files of finished pieces are included."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        session = Session(model, tokenizer, output_dir=folder)
        losses = session.nll("likelihoods", rows.texts)
        between = time.perf_counter()
        answers = session.answers("answers", rows.prompts, max_new_tokens=tokens)
        ended = time.perf_counter()
    return Turn(losses=losses, answers=answers, likelihoods=between - began, generation=ended - between)


def row_by_row(model: Any, tokenizer: Any, rows: EncodedRows, tokens: int) -> Turn:
    """The same functions on one text and one prompt at a time, in the order of the file."""
    pad = padding_id(tokenizer)
    began = time.perf_counter()
    losses = [mean_nll(model, [text], pad_token_id=pad, batch_size=1)[0] for text in rows.texts]
    between = time.perf_counter()
    answers = [greedy(model, tokenizer, [prompt], max_new_tokens=tokens, batch_size=1)[0] for prompt in rows.prompts]
    ended = time.perf_counter()
    return Turn(losses=np.array(losses), answers=answers, likelihoods=between - began, generation=ended - between)


WAYS: dict[str, Callable[..., Turn]] = {"row by row": row_by_row, "in batches": in_batches}


def lab_model(data: LabData, epochs: float, quick: bool) -> tuple[Any, Any]:
    """The lab's target; or a small model that has seen the forget rows only, trained in a minute."""
    if not quick:
        lab = train_target(data, LabRecipe(epochs=epochs, bf16=True))  # that of `hf-unlearn lab tofu`
        return lab.model, lab.tokenizer
    recipe = LabRecipe(hidden_size=64, num_layers=2, num_heads=4, intermediate_size=192, epochs=epochs)
    tokenizer = train_tokenizer(data.texts(), 2048)
    config = tiny_config(tokenizer, hidden_size=64, num_layers=2, num_heads=4, intermediate_size=192)
    rows = [{"question": row["question"], "answer": row["answer"]} for row in data.forget]
    return sft(tiny_model(config, 0), tokenizer, rows, recipe), tokenizer


def encoded(data: Any, tokenizer: Any, count: int) -> EncodedRows:
    """So many rows of forget10, evenly spaced."""
    part = [data.forget_eval[number] for number in evenly_spaced(len(data.forget_eval), count)]
    # a retain part is required, and is cut off again
    rows = EvalRows({"forget": part, "retain": part[:1]}, None)
    whole = rows.tokenized(tokenizer, max_length=256)
    return replace(whole, texts=whole.texts[: len(rows.parts["forget"].texts)], prompts=whole.prompts[: len(part)])


def main() -> None:
    """Prints the seconds of both ways, their ratio, and the peak memory of few and of many rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder with TOFU's JSON lines")
    parser.add_argument("--rows", type=int, default=400, help="rows of forget10")
    parser.add_argument("--tokens", type=int, default=200, help="longest answer")
    parser.add_argument("--epochs", type=float, default=30, help="of the lab model's training; cached")
    parser.add_argument("--repeats", type=int, default=1, help="turns of each way")
    parser.add_argument("--quick", action="store_true", help="a small model, trained on the forget rows only")
    parser.add_argument("--no_memory", action="store_true", help="leave the memory out")
    arguments = parser.parse_args()
    quiet_libraries()
    data = tofu_data(arguments.folder)
    model, tokenizer = lab_model(data, arguments.epochs, arguments.quick)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device).eval()

    rows = encoded(data, tokenizer, arguments.rows)
    turns: dict[str, list[Turn]] = {name: [] for name in WAYS}
    for way in WAYS.values():
        way(model, tokenizer, encoded(data, tokenizer, WARM_UP_ROWS), arguments.tokens)
    for _ in range(arguments.repeats):
        for name, way in WAYS.items():
            turns[name].append(way(model, tokenizer, rows, arguments.tokens))
            wait(device)
    slow, fast = (turns[name][0] for name in WAYS)
    same = sum(one == other for one, other in zip(fast.answers, slow.answers, strict=True))
    words = sum(len(answer.split()) for answer in fast.answers) / len(fast.answers)
    print(
        f"{len(rows.prompts)} rows, {len(rows.texts)} texts, {model.num_parameters() / 1e6:.1f} M parameters, "
        f"{device}, {torch.get_num_threads()} threads. Likelihoods differ by at most "
        f"{np.abs(fast.losses - slow.losses).max():.1e} nats, {same} of {len(rows.prompts)} answers are equal; "
        f"{words:.0f} words each."
    )
    halves: dict[str, Callable[[Turn], float]] = {
        "likelihoods": lambda turn: turn.likelihoods,
        "answers": lambda turn: turn.generation,
        "both": lambda turn: turn.likelihoods + turn.generation,
    }
    for half, of in halves.items():
        single, batched = (statistics.median(map(of, turns[name])) for name in WAYS)
        goal = f" (goal: at least {GOAL:g})" if half == "both" else ""
        print(f"{half}: {single:.1f} s row by row, {batched:.1f} s in batches, {single / batched:.1f} x{goal}")
    if arguments.no_memory:
        return
    some = encoded(data, tokenizer, MEMORY_ROWS[0])
    peaks = []
    for count in MEMORY_ROWS:
        times = count // MEMORY_ROWS[0]  # the same rows again: others would have another longest one
        many = replace(some, texts=some.texts * times, prompts=some.prompts * times)
        peaks.append(peak_bytes(lambda many=many: in_batches(model, tokenizer, many, MEMORY_TOKENS), model, device))
        print(f"peak memory of {count} rows: {peaks[-1] / 2**20:.1f} MiB, weights included")
    print(f"peak of {MEMORY_ROWS[1]} rows / peak of {MEMORY_ROWS[0]} rows: {peaks[1] / peaks[0]:.3f} (goal: 1)")


if __name__ == "__main__":
    main()
