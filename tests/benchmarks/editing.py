"""Joint PCR at the shapes of Llama-3-8B's down_proj: seconds, peak resident memory, and the ratio to the greedy solver.

The activations share a strong common direction, as those of a language model do; eps is set so that about the wanted
number of (activation, concept) pairs is violated.

python tests/benchmarks/editing.py [--inner M] [--width D] [--activations N] [--concepts n] [--violated K] [--retain T]
    [--joint-only] [--threads P]
"""

from __future__ import annotations

import argparse
import resource
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_unlearn.editing import Certificate, solve_pcr

MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """Sizes of one synthetic problem."""

    inner: int = 14_336
    width: int = 4_096
    activations: int = 256
    concepts: int = 100
    violated: int = 500
    retain: int = 0


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One problem solved both ways."""

    violated: int
    joint: Certificate
    greedy: Certificate | None
    peak_mib: float
    """Largest resident set of the process up to the end of the joint solver, in MiB."""
    before_mib: float
    """The same just before it."""


def peak_mib() -> float:
    """Largest resident set of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MIB


def problem(shapes: Shapes, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, float, Tensor | None]:
    """Inputs `(N, m)`, outputs `(N, d)`, concepts `(n, d)`, eps and retain inputs `(T, m)`, float32."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    common = normal(shapes.inner)
    inputs = 0.5 * common + normal(shapes.activations, shapes.inner)
    shared = normal(shapes.width)
    # outputs are given, so that no (d, m) weight is needed; of one length, so that no few of them have all the pairs
    apart = (inputs - 0.5 * common)[:, : shapes.width] + 0.5 * normal(shapes.activations, shapes.width)
    outputs = shared + shapes.width**0.5 * torch.nn.functional.normalize(apart, dim=1)
    concepts = shared + normal(shapes.concepts, shapes.width)
    distances = torch.cdist(outputs.double(), concepts.double()).flatten().sort().values
    eps = float(distances[min(shapes.violated, len(distances) - 1)])
    retain = 0.5 * common + normal(shapes.retain, shapes.inner) if shapes.retain else None
    return inputs, outputs, concepts, eps, retain


def run(shapes: Shapes, *, greedy: bool = True) -> Measured:
    """Solves one problem with the joint solver, then with the greedy one."""
    inputs, outputs, concepts, eps, retain = problem(shapes)
    violated = int((torch.cdist(outputs.double(), concepts.double()) < eps).sum())
    before = peak_mib()
    joint = solve_pcr(inputs, outputs, concepts, eps, retain_inputs=retain).certificate
    peak = peak_mib()
    other = None
    if greedy:
        other = solve_pcr(inputs, outputs, concepts, eps, retain_inputs=retain, solver="greedy").certificate
    return Measured(violated=violated, joint=joint, greedy=other, peak_mib=peak, before_mib=before)


def lines(found: Measured) -> list[str]:
    """The result, a line each."""
    joint, greedy = found.joint, found.greedy
    shown = [
        f"violated pairs: {found.violated}",
        f"joint: {joint.seconds:.2f} s, {joint.rounds} rounds, rank {joint.rank}, cost {joint.cost:.6g}, "
        f"gap {joint.gap:.1e}, KKT residual {joint.kkt_residual:.1e}, smallest margin {joint.smallest_margin:+.1e}, "
        f"feasible {joint.feasible}",
        f"peak resident set: {found.peak_mib:.0f} MiB ({found.before_mib:.0f} MiB before the solver)",
    ]
    if greedy is not None:
        shown.append(
            f"greedy: {greedy.seconds:.2f} s, {greedy.rounds} repairs, cost {greedy.cost:.6g}, "
            f"feasible {greedy.feasible}, cycled {greedy.cycled}"
        )
        shown.append(
            f"greedy / joint: {greedy.seconds / joint.seconds:.2f} in time, {greedy.cost / joint.cost:.4f} in cost, "
            f"{(greedy.cost / joint.cost) ** 0.5:.4f} in norm"
        )
    return shown


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in vars(Shapes()).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--joint-only", action="store_true", help="leave out the greedy solver")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = vars(parser.parse_args())
    torch.set_num_threads(options.pop("threads"))
    joint_only = options.pop("joint_only")
    print("\n".join(lines(run(Shapes(**options), greedy=not joint_only))))
