"""`make bench`: ratios against named baselines, alternating in one run; medians of seconds, peaks of memory.

python tests/benchmarks/bench.py [--data TOFU_FOLDER] [--skip-leak] [--repeats N] [--output FILE.json]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import leak
import padding
import smooth
import torch
from rich.console import Console
from rich.table import Table
from steps import ISSUE, LLAMA_1B, LLAMA_8B, Shape, batch, build, model_flops, steps
from timing import peak_bytes, seconds

SHAPES = {shape.name: shape for shape in (ISSUE, LLAMA_1B, LLAMA_8B)}
# (what, against what, highest ratio that is allowed for seconds and for memory)
RATIOS = (
    ("primal-dual, fused", "primal-dual, plain", 0.5, 0.35),
    ("primal-dual, fused", "primal-dual, whole logits", None, None),
    ("npo, fused", "npo, plain", None, None),
    ("sft, fused", "sft, plain", None, None),
    ("primal-dual, fused", "sft, fused", 1.10, None),
    ("npo, fused", "sft, fused", 1.15, None),
)
FORMS = tuple(dict.fromkeys(name for form, baseline, *_ in RATIOS for name in (form, baseline)))


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """Copies of all gradients."""
    return {name: value.grad.detach().clone() for name, value in model.named_parameters() if value.grad is not None}


def agreement(model: Any, forms: dict[str, Callable[[], Any]], name: str) -> dict[str, float]:
    """Relative difference of the loss, and of the gradients by norm, between the fused and the plain form."""
    want = forms[f"{name}, plain"]()
    wanted = gradients(model)
    got = forms[f"{name}, fused"]()
    found = gradients(model)
    norm = max(float(value.norm()) for value in wanted.values())
    worst = max(float((found[key] - value).norm()) for key, value in wanted.items())
    return {"loss": abs(float(got - want)) / abs(float(want)), "gradients": worst / norm}


def bench_shape(
    shape: Shape, repeats: int, device: str, console: Console, *, lora: bool = False, peak_tflops: float | None = None
) -> dict[str, Any]:
    """All forms on one shape."""
    dtype = "bfloat16" if device == "cuda" else "float32"
    model = build(shape, getattr(torch, dtype), device, lora=lora)
    forms = {name: step for name, step in steps(model, batch(shape, device)).items() if name in FORMS}
    same = {name: agreement(model, forms, name) for name in ("primal-dual", "npo", "sft")}
    times = seconds(forms, repeats, device)
    peaks = {name: peak_bytes(function, model, device) for name, function in forms.items()}
    tokens = 2 * shape.rows * shape.tokens
    flops = model_flops(model, shape, lora=lora)
    name_of = f"{shape.name}{' LoRA' if lora else ''}"
    table = Table(title=f"{name_of}, {dtype}, {tokens} tokens a step, half of them masked, {device}")
    for column in ("form", "seconds", "tokens/s", "peak MiB", "model TFLOP/s", "utilisation"):
        table.add_column(column, justify="left" if column == "form" else "right")
    for name in forms:
        rate = flops / times[name] / 1e12
        used = "" if peak_tflops is None else f"{100 * rate / peak_tflops:.0f}%"
        row = (f"{times[name]:.3f}", f"{tokens / times[name]:.0f}", f"{peaks[name] / 2**20:.0f}", f"{rate:.2f}", used)
        table.add_row(name, *row)
    console.print(table)
    ratios = Table(title="ratios")
    for column in ("form", "baseline", "time", "allowed", "peak memory", "allowed"):
        ratios.add_column(column, justify="left" if column in ("form", "baseline") else "right")
    rows = []
    for form, baseline, time_limit, memory_limit in RATIOS:
        ratio, memory = times[form] / times[baseline], peaks[form] / peaks[baseline]
        shown = [f"{ratio:.2f}", str(time_limit or ""), f"{memory:.2f}", str(memory_limit or "")]
        ratios.add_row(form, baseline, *shown)
        rows.append({"form": form, "baseline": baseline, "time": ratio, "memory": memory})
    console.print(ratios)
    for name, differences in same.items():
        console.print(f"{name}: fused against plain: {differences}")
    return {"shape": name_of, "flops": flops, "seconds": times, "peaks": peaks, "ratios": rows, "agreement": same}


def bench_leak(console: Console) -> dict[str, Any]:
    """The slope of the memory held over 1,000 steps."""
    slopes = leak.measure()
    for line in leak.lines(slopes):
        console.print(line)
    return leak.as_rows(slopes)


def bench_padding(folder: Path, console: Console) -> dict[str, Any]:
    """Padding of TOFU's batches, in random order and grouped by length."""
    found = padding.measure(folder)
    for line in padding.lines(found):
        console.print(line)
    return {"allowed": padding.ALLOWED, "shares": found}


def main() -> None:
    """Runs what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="TOFU folder, for the padding of real rows")
    parser.add_argument("--skip-leak", action="store_true", help="leave out the 1,000 steps that look for a leak")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("outputs/bench.json"))
    parser.add_argument("--shape", choices=list(SHAPES), nargs="+", help="default: the small one, on a GPU 1B and 8B")
    parser.add_argument("--lora", action="store_true", help="train an adapter only (on a GPU both are measured)")
    parser.add_argument("--peak-tflops", type=float, help="the device's peak in this precision, for utilisation")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    console = Console(width=130)
    chosen = arguments.shape or ([LLAMA_1B.name, LLAMA_8B.name] if device == "cuda" else [ISSUE.name])
    adapters = (False, True) if device == "cuda" and not arguments.lora else (arguments.lora,)
    results: list[dict[str, Any]] = [
        bench_shape(SHAPES[name], arguments.repeats, device, console, lora=lora, peak_tflops=arguments.peak_tflops)
        for name in chosen
        for lora in adapters
    ]
    results.append({"prism": smooth.show(console, arguments.repeats)})
    if not arguments.skip_leak:
        results.append({"leak": bench_leak(console)})
    if arguments.data is not None:
        results.append({"padding": bench_padding(arguments.data, console)})
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=2), encoding="utf-8")
    console.print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
