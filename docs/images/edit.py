"""Draws edit.png, one edit in two dimensions: python docs/images/edit.py"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor

from hf_unlearn.editing import Edit, solve_pcr

BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#999999"  # colour-blind safe (Okabe and Ito)


def arrows(axes: Any, start: Tensor, end: Tensor, colour: str, label: str) -> None:
    """One arrow for each output, from where it is to where the edit sends it."""
    for number, (a, b) in enumerate(zip(start.tolist(), end.tolist(), strict=True)):
        axes.annotate(
            "", b, a, arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 1.6, "shrinkA": 0, "shrinkB": 0}
        )
        axes.plot(*b, "o", color=colour, ms=5, label=label if number == 0 else None)


def moved(inputs: Tensor, outputs: Tensor, edit: Edit) -> Tensor:
    """Outputs after the edit."""
    return outputs + (inputs @ edit.lora_a.T) @ edit.lora_b.T


def main() -> None:
    """Left: balls, joint against greedy. Right: a half-space, without and with retain activations."""
    inputs = torch.tensor([[1.0, 0.25], [1.25, 0.85], [0.55, 0.95]], dtype=torch.float64)
    retain = torch.tensor([[-0.9, 0.5], [-0.5, 0.8], [0.3, -0.9], [0.7, -0.6], [-1.0, 0.1]], dtype=torch.float64)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5.2))

    concepts = torch.tensor([[0.85, 0.4], [1.2, 0.7], [0.75, 0.85]], dtype=torch.float64)
    eps = 0.42
    for number, centre in enumerate(concepts.tolist()):
        left.add_patch(plt.Circle(centre, eps, color=GREY, alpha=0.25, lw=0, label=None if number else "forbidden"))
        left.plot(*centre, "x", color="black", ms=7, label=None if number else "concepts c")
    edits = {solver: solve_pcr(inputs, inputs, concepts, eps, solver=solver) for solver in ("joint", "greedy")}
    left.plot(*inputs.T.tolist(), "o", color="black", ms=5, label="outputs W h")
    for (solver, edit), colour in zip(edits.items(), (BLUE, ORANGE), strict=True):
        arrows(left, inputs, moved(inputs, inputs, edit), colour, f"{solver}: cost {edit.certificate.cost:.3f}")
    left.set_title("Balls: one matrix moves all outputs out of all balls")

    # a third coordinate of the inputs, which W does not show, tells the constrained activations from the others
    seen = torch.cat([inputs, torch.full((3, 1), 0.7, dtype=torch.float64)], dim=1)
    kept = torch.cat([retain, torch.tensor([[0.1], [-0.1], [0.0], [0.1], [0.0]], dtype=torch.float64)], dim=1)
    direction, level = torch.tensor([[1.0, 0.6]], dtype=torch.float64), 0.55
    x = torch.linspace(-1.6, 2.2, 2)
    right.fill_between(x, (level - x) / 0.6, 4.0, color=GREY, alpha=0.25, lw=0, label="forbidden: w·o > level")
    right.plot(*inputs.T.tolist(), "o", color="black", ms=5, label="outputs W h")
    right.plot(*retain.T.tolist(), "s", color=GREY, ms=5, label="retain outputs")
    for weighed, colour, name in ((None, ORANGE, "smallest norm"), (kept, BLUE, "retain-weighted")):
        edit = solve_pcr(seen, inputs, direction, level, kind="half_space", retain_inputs=weighed)
        after = moved(kept, retain, edit)
        disturbed = float((after - retain).square().sum(1).mean().sqrt())
        arrows(right, inputs, moved(seen, inputs, edit), colour, f"{name}: retain moves by {disturbed:.2f} (rms)")
        right.plot(*after.T.tolist(), "s", color=colour, ms=5, mfc="none")
    right.set_title("A half-space, without and with retain activations")

    for axes, limits in ((left, (-0.2, 2.1, -0.5, 1.9)), (right, (-1.5, 1.7, -1.6, 1.6))):
        axes.axis(limits)
        axes.set_aspect("equal")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="lower right" if axes is left else "lower left", frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=130)


if __name__ == "__main__":
    main()
