"""PRISM's step against NPO with a retain loss and a reference that is not cached; and what training a probe takes.

python tests/benchmarks/smooth.py [--repeats N]
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from steps import Shape, batch, build
from timing import peak_bytes, seconds
from torch import Tensor

from hf_unlearn.geometry import LocalSpace, ascended, combine
from hf_unlearn.probes import ProbeConfig, RobustProbe, hidden_states, pool, train_probe
from hf_unlearn.trainers.forward import ModelForward
from hf_unlearn.trainers.objective import ForgetBatch, ForgetObjective, retain_loss

SHAPE = Shape(
    name="d512-L8-V32k",
    vocabulary=32_000,
    hidden=512,
    intermediate=1_376,
    layers=8,
    heads=8,
    kv_heads=8,
    rows=8,
    tokens=128,
)
LAYER = 6
# What is allowed: time against NPO with an uncached reference, tensors of the gradients' size beside plain
# training's, and with LoRA memory as a share of the model.
ALLOWED = {"time": 1.4, "gradients": 2.0, "lora": 0.01}


def forms(model: Any, frozen: Any, parts: list[dict[str, Tensor]]) -> dict[str, Callable[[], Any]]:
    """Steps without their optimizer: plain NPO (cached and not) and PRISM, gradients left where an optimizer looks."""
    forward, reference = ModelForward(model), ModelForward(frozen)
    forget, retain = parts
    width = model.config.get_text_config().hidden_size
    probe = RobustProbe(width, layer=LAYER, pooling="response_mean").freeze()

    @torch.no_grad()
    def logps() -> Tensor:
        (scores,) = reference(frozen, [forget])
        return scores.row_sums(scores.log_probs())

    cached = logps()

    def npo(ref_logps: Callable[[], Tensor]) -> None:
        model.zero_grad(set_to_none=True)
        known = ref_logps()
        scores = forward(model, parts)
        loss = ForgetObjective(name="npo")(ForgetBatch(scores=scores[0], ref_logps=known)).loss
        (loss + retain_loss("nll", scores[1], None).loss).backward()

    def forget_loss() -> Tensor:
        with hidden_states(model, [LAYER]) as taken:
            (scores,) = forward(model, [forget])
        loss = ForgetObjective(name="npo")(ForgetBatch(scores=scores, ref_logps=cached)).loss
        features = pool(taken[LAYER], forget["labels"], forget["attention_mask"], "response_mean")
        return loss - 0.05 * probe.log_prob_retain(features).mean()

    def prism() -> None:
        space = LocalSpace(model)
        gradient: Any = space.gradient([forget_loss])
        with ascended(space, gradient, 0.01):
            gradient = None
            gradient = space.gradient([forget_loss])
        kept = space.gradient([lambda: retain_loss("nll", forward(model, [retain])[0], None).loss])
        space.assign(combine(space, gradient, kept, forget_weight=1.0, retain_weight=1.0).gradient)

    return {"npo, uncached reference": lambda: npo(logps), "npo": lambda: npo(lambda: cached), "prism": prism}


def measure(repeats: int, *, lora: bool, device: str = "cpu") -> dict[str, Any]:
    """Median seconds, peak bytes, and the ratios that are limited."""
    model, frozen = (build(SHAPE, torch.float32, device, lora=lora and i == 0) for i in range(2))
    frozen.requires_grad_(False)
    steps = forms(model, frozen, batch(SHAPE, device))
    times = seconds(steps, repeats, device)
    # A short batch: with a long one PRISM's smaller forward passes (forget and retain rows by turns) hide what it keeps.
    # The reference model is not counted: the profiler has not seen it being made.
    short = forms(model, frozen, batch(dataclasses.replace(SHAPE, rows=1, tokens=16), device))
    peaks = {name: peak_bytes(function, model, device) for name, function in short.items()}
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    extra = peaks["prism"] - peaks["npo"]
    return {
        "lora": lora,
        "seconds": times,
        "peaks": peaks,
        "time": times["prism"] / times["npo, uncached reference"],
        "time_cached": times["prism"] / times["npo"],
        "gradients": extra / trained,
        "share_of_model": extra / whole,
    }


def probe_seconds(width: int = 192, rows: int = 400) -> float:
    """Training the probe of one layer on 400 + 400 examples, at the lab model's width and with the lab's settings."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(2 * rows) % 2
    features = torch.randn(2 * rows, width, generator=generator) + 0.2 * labels.unsqueeze(-1)
    started = time.perf_counter()
    train_probe(features, labels, ProbeConfig(epochs=100, learning_rate=1e-3, standardize=True, patience=100))
    return time.perf_counter() - started


def show(console: Console, repeats: int) -> list[dict[str, Any]]:
    """Measures, prints a table, returns what was measured."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = [measure(repeats, lora=lora, device=device) for lora in (False, True)]
    table = Table(title=f"PRISM, {SHAPE.name}, float32, {device}: beside NPO + retain with an uncached reference")
    for column in ("trained", "npo s", "npo cached s", "prism s", "time", "allowed", "extra / gradient", "/ model"):
        table.add_column(column, justify="left" if column == "trained" else "right")
    for row in found:
        table.add_row(
            "LoRA" if row["lora"] else "all",
            *(f"{row['seconds'][name]:.2f}" for name in ("npo, uncached reference", "npo", "prism")),
            f"{row['time']:.2f}",
            str(ALLOWED["time"]),
            f"{row['gradients']:.2f}",
            f"{row['share_of_model']:.2%}",
        )
    console.print(table)
    spent = probe_seconds()
    console.print(f"probe of one layer, 400 + 400 examples, 100 epochs: {spent:.1f} s (at most 60)", highlight=False)
    return [*found, {"probe_seconds": spent}]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    show(Console(width=130), parser.parse_args().repeats)
