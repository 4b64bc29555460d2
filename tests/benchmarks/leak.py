"""Does a long run leak? 1,000 short primal-dual steps on a tiny model, and the slope of the memory it holds.

Before each sample the collector runs and malloc gives freed pages back: what stays is held by somebody. Without that
(`--as-it-comes`) the resident set also has what the allocator keeps of freed blocks, which creeps up as batches of
changing widths fragment the heap, and cycles that wait for the collector.

python tests/benchmarks/leak.py [--steps N] [--as-it-comes] [--plain]
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import math
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_unlearn.data import pad_rows, prepare_dataset
from hf_unlearn.lab.models import tiny_config, tiny_model
from hf_unlearn.lab.tokenizer import train_tokenizer
from hf_unlearn.lab.world import make_world
from hf_unlearn.trainers import PrimalDualConfig, PrimalDualTrainer

MIB = 2**20
WARM_UP = 200  # steps before the first sample: lazy imports and the allocator's arenas come into being
EVERY = 5  # steps between samples
POOL = 10  # samples whose mean is one point of the line: what differs between batches is no growth


@dataclass(frozen=True, kw_only=True)
class Slope:
    """Least-squares slope in MiB per 1,000 steps, its standard error, and the last sample in MiB."""

    slope: float
    error: float
    samples: int
    last: float

    @property
    def interval(self) -> tuple[float, float]:
        """95% interval."""
        return self.slope - 1.96 * self.error, self.slope + 1.96 * self.error

    def __str__(self) -> str:
        low, high = self.interval
        verdict = "above zero" if low > 0 else "not above zero"
        return (
            f"{self.slope:+.3f} MiB per 1,000 steps, 95% interval {low:+.3f} to {high:+.3f} "
            f"({self.samples} samples, {self.last:.1f} MiB at the end): {verdict}"
        )


def least_squares(steps: ArrayLike, values: ArrayLike) -> tuple[float, float]:
    """
    Slope of `values` over `steps` and its standard error.

    Memory stays where it is until it moves, for good: a series of jumps, whose residuals around a line are no noise
    (Granger and Newbold, Journal of Econometrics 1974: the usual error then finds a slope in a random walk). So the
    slope is written as what it is of the jumps, `sum_j c_j d_j`, and the error is that of such a sum by Newey and
    West (Econometrica 1987), over the root of the number of samples: a page or two that are taken and kept are no
    slope, a page every 100 steps is.
    """
    x = np.asarray(steps, dtype=np.float64)
    y = np.asarray(values, dtype=np.float64)
    x = x - x.mean()
    size = float(x @ x)
    slope = float(x @ y) / size
    weights = np.cumsum(x[::-1])[::-1][1:] / size  # of each jump: every later sample has it
    scores = weights * (np.diff(y) - slope * np.diff(x))
    lags = math.isqrt(len(x))
    variance = scores @ scores
    for lag in range(1, lags + 1):
        variance += 2.0 * (1.0 - lag / (lags + 1)) * (scores[lag:] @ scores[:-lag])
    return slope, math.sqrt(max(float(variance), 0.0))


def pooled(values: ArrayLike) -> np.ndarray:
    """Means of [`POOL`] samples each; what is left over at the end is not used."""
    whole = np.asarray(values, dtype=np.float64)
    return whole[: len(whole) // POOL * POOL].reshape(-1, POOL).mean(axis=1)


def resident_bytes() -> int:
    """The process's resident set now."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmRSS:"):
            return 1024 * int(line.split()[1])
    raise OSError("/proc/self/status has no VmRSS")


class _MallInfo(ctypes.Structure):
    """What glibc's mallinfo2 returns."""

    _names = (
        "arena",
        "ordblks",
        "smblks",
        "hblks",
        "hblkhd",
        "usmblks",
        "fsmblks",
        "uordblks",
        "fordblks",
        "keepcost",
    )
    _fields_ = tuple((name, ctypes.c_size_t) for name in _names)


_libc = ctypes.CDLL("libc.so.6")  # once: every such object makes classes of its own
_libc.mallinfo2.restype = _MallInfo


def give_back() -> None:
    """Collects cycles, and returns to the system what malloc holds of freed memory."""
    gc.collect()
    _libc.malloc_trim(0)


def bytes_in_use() -> int:
    """Bytes that malloc has handed out and nobody has freed (glibc 2.33 or later)."""
    info = _libc.mallinfo2()
    return info.uordblks + info.hblkhd


SOURCES = {"resident set": resident_bytes, "in use": bytes_in_use}


class Memory(TrainerCallback):
    """Samples memory while a run goes on."""

    def __init__(self, steps: int, *, as_it_comes: bool = False) -> None:
        self.as_it_comes = as_it_comes
        # Full from the start: samples in a growing list would be a leak of the measurement's own.
        self.steps = np.ones(steps // EVERY)
        self.values = {name: np.ones(steps // EVERY) for name in SOURCES}
        self._taken = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One sample of each."""
        if state.global_step > WARM_UP and state.global_step % EVERY == 0:
            if not self.as_it_comes:
                give_back()
            self.steps[self._taken] = state.global_step
            for name, source in SOURCES.items():
                self.values[name][self._taken] = source() / MIB
            self._taken += 1

    def slopes(self) -> dict[str, Slope]:
        """A line through each."""
        found = {}
        for name, values in self.values.items():
            slope, error = least_squares(pooled(self.steps), pooled(values))
            found[name] = Slope(slope=1_000 * slope, error=1_000 * error, samples=len(values), last=float(values[-1]))
        return found


def _arguments(folder: str, steps: int) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "max_steps": WARM_UP + steps,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-4,
        "save_strategy": "no",
        "logging_steps": 10 * (WARM_UP + steps),  # every entry of the log history stays, as it should
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }


def measure(steps: int = 1_000, *, as_it_comes: bool = False, plain: bool = False) -> dict[str, Slope]:
    """
    Trains for `steps` after the warm-up and fits a line through each of [`SOURCES`]; `plain`: transformers' Trainer on
    the same model and rows, as the baseline.
    """
    world = make_world(seed=0, num_authors=10, questions_per_author=4)
    rows = world.full.select_columns(["question", "answer"])
    tokenizer = train_tokenizer((text for row in rows for text in row.values()), 600)
    model = tiny_model(tiny_config(tokenizer, hidden_size=32, num_layers=2, num_heads=4, max_positions=128), seed=1)
    samples = Memory(steps, as_it_comes=as_it_comes)
    with tempfile.TemporaryDirectory() as folder:
        shared = _arguments(folder, steps)
        if plain:
            known = prepare_dataset(rows.select(range(33)), tokenizer, name="rows", max_length=128)
            Trainer(
                model=model,
                args=TrainingArguments(per_device_train_batch_size=6, remove_unused_columns=False, **shared),
                train_dataset=known.select_columns(["input_ids", "labels"]),
                data_collator=lambda rows: dict(pad_rows(rows, pad_token_id=tokenizer.pad_token_id)),
                callbacks=[samples],
            ).train()
            return samples.slopes()
        args = PrimalDualConfig(
            per_device_train_batch_size=2,
            max_length=128,
            eval_strategy="no",
            load_best_model_at_end=False,
            **shared,
        )
        trainer = PrimalDualTrainer(
            model=model,
            args=args,
            forget_dataset=rows.select(range(10)),
            retain_dataset={"people": rows.select(range(10, 26)), "facts": rows.select(range(26, 33))},
            holdout_dataset=world.holdout.select_columns(["question", "answer"]),
            processing_class=tokenizer,
            callbacks=[samples],
        )
        trainer.train()
    return samples.slopes()


def lines(slopes: Mapping[str, Slope]) -> list[str]:
    """The slopes, a line each."""
    return [f"memory, {name}: {slope}" for name, slope in slopes.items()]


def as_rows(slopes: Mapping[str, Slope]) -> dict[str, Any]:
    """For the JSON that `make bench` writes."""
    return {name: {**asdict(slope), "interval": slope.interval} for name, slope in slopes.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1_000)
    parser.add_argument("--as-it-comes", action="store_true", help="sample without giving memory back first")
    parser.add_argument("--plain", action="store_true", help="the baseline: transformers' Trainer")
    options = parser.parse_args()
    print("\n".join(lines(measure(options.steps, as_it_comes=options.as_it_comes, plain=options.plain))))
