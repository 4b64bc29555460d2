"""Several runs in one plane: forgetting against utility, with error bars, each point labelled where it lies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import formats
from .compare import Comparison, Run
from .doubts import score_of
from .glossary import metric
from .plots import WIDTH
from .schema import Subject
from .stays import most_returned
from .svg import INK, MUTED, SERIES, SUBJECT_COLOURS, plot_style
from .verdict import INDISTINGUISHABLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.backend_bases import RendererBase
    from matplotlib.figure import Figure

FORGET = "forget_probability"
UTILITIES = ("model_utility", "retain_probability")
_MARKERS = "oDsv^PX*"
_LONGEST = 26
_OFFSETS = ((7, 0), (7, 9), (7, -9), (0, 11), (0, -11), (-7, 0), (-7, 9), (-7, -9), (7, 20), (7, -20), (-7, 20))
"""Places of a label around its point, in points, the best first."""


@dataclass(frozen=True, kw_only=True)
class Dot:
    """A labelled point with standard errors; `subject` for target and reference, which are no runs."""

    label: str
    x: float
    y: float
    x_error: float | None = None
    y_error: float | None = None
    subject: Subject | None = None


def utility_of(runs: Sequence[Run]) -> str:
    """The score that stands for utility: the first of `UTILITIES` that all runs have, else the last."""
    return next(
        (name for name in UTILITIES if all(score_of(run.results.unlearned, name) is not None for run in runs)),
        UTILITIES[-1],
    )


def scatter_figure(comparison: Comparison, forget: str = FORGET, utility: str | None = None) -> Figure | None:
    """
    A forget score against a utility score, with target and reference where all runs share them.

    Args:
        comparison ([`Comparison`]): the runs.
        forget (`str`, *optional*, defaults to `"forget_probability"`): score on the x axis.
        utility (`str`, *optional*): score on the y axis; by default model utility where all runs have it, else the
            retain probability.

    Returns:
        `matplotlib.figure.Figure`, or None where fewer than two runs have both scores.
    """
    utility = utility or utility_of(comparison.runs)
    dots = []
    for run in comparison.runs:
        scores = run.results.unlearned
        x, y = score_of(scores, forget), score_of(scores, utility)
        if x is not None and y is not None:
            errors = scores.standard_error
            dots.append(Dot(label=run.name, x=x, y=y, x_error=errors.get(forget), y_error=errors.get(utility)))
    if len(dots) < 2:
        return None
    if not comparison.warnings:
        first = comparison.runs[0].results
        for subject, model in first.scores().items():
            x, y = score_of(model, forget), score_of(model, utility)
            if subject != "unlearned" and x is not None and y is not None:
                dots.append(Dot(label=subject, x=x, y=y, subject=subject))
    return _figure(dots, metric(forget).label, metric(utility).label)


def quality_figure(comparison: Comparison, utility: str | None = None) -> Figure | None:
    """Forget quality, as log10 of its p-value, against utility; None where fewer than two runs have both."""
    utility = utility or utility_of(comparison.runs)
    dots = []
    for run in comparison.runs:
        x, y = run.results.forget_quality_log10, score_of(run.results.unlearned, utility)
        if x is not None and math.isfinite(x) and y is not None:
            error = run.results.unlearned.standard_error.get(utility)
            dots.append(Dot(label=run.name, x=x, y=y, y_error=error))
    if len(dots) < 2:
        return None
    line = (math.log10(INDISTINGUISHABLE), f"p = {INDISTINGUISHABLE:g}")
    return _figure(dots, "Forget quality, log10 of the p-value", metric(utility).label, line=line)


def returned_figure(comparison: Comparison, utility: str | None = None) -> Figure | None:
    """What relearning brings back against utility; None where fewer than two runs were relearned."""
    utility = utility or utility_of(comparison.runs)
    dots = []
    for run in comparison.runs:
        found, y = most_returned(run.results, "relearn"), score_of(run.results.unlearned, utility)
        if found is not None and y is not None:
            error = run.results.unlearned.standard_error.get(utility)
            dots.append(Dot(label=run.name, x=found.share, y=y, y_error=error))
    return None if len(dots) < 2 else _figure(dots, "Share brought back by relearning", metric(utility).label)


def _figure(dots: Sequence[Dot], x_label: str, y_label: str, line: tuple[float, str] | None = None) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with plot_style():
        figure = Figure(figsize=(WIDTH, 3.7), layout="constrained")
        canvas = FigureCanvasAgg(figure)
        axis = figure.subplots()
        number = 0
        for dot in dots:
            colour = SERIES[number % len(SERIES)]
            marker = _MARKERS[number % len(_MARKERS)]
            if dot.subject:
                colour, marker = SUBJECT_COLOURS[dot.subject], "|" if dot.subject == "target" else "_"
            number += 0 if dot.subject else 1
            axis.errorbar(
                [dot.x],
                [dot.y],
                xerr=_error(dot.x_error),
                yerr=_error(dot.y_error),
                fmt=marker,
                ms=11 if dot.subject else 7,
                mew=2.6 if dot.subject else 0.8,
                color=colour,
                elinewidth=1.2,
            )
        axis.margins(0.16)
        axis.set_xlabel(x_label)
        axis.set_title(y_label)
        if line is not None:
            axis.axvline(line[0], color=INK, lw=1.1, dashes=(4, 2.5))
            axis.annotate(
                line[1],
                xy=(line[0], 0.01),
                xycoords=("data", "axes fraction"),
                xytext=(-3, 0),
                textcoords="offset points",
                ha="right",
                fontsize=9,
                color=MUTED,
            )
        figure.draw_without_rendering()  # the labels are placed by what is there
        _label(figure, axis, dots, canvas.get_renderer())
    return figure


def _label(figure: Figure, axis: Axes, dots: Sequence[Dot], renderer: RendererBase) -> None:
    """Each point's name at the first of some places around it that covers the least of points and other names."""
    from matplotlib.transforms import Bbox

    scale = figure.dpi / 72
    points = [axis.transData.transform((dot.x, dot.y)) for dot in dots]
    taken = [Bbox.from_bounds(x - 5 * scale, y - 5 * scale, 10 * scale, 10 * scale) for x, y in points]
    inside = axis.get_window_extent(renderer)
    for dot in dots:
        best, least = None, math.inf
        for place, (dx, dy) in enumerate(_OFFSETS):
            text = axis.annotate(
                formats.one_line(dot.label, _LONGEST),
                xy=(dot.x, dot.y),
                xytext=(dx, dy),
                textcoords="offset points",
                ha="left" if dx > 0 else "right" if dx < 0 else "center",
                va="center",
                fontsize=9,
                color=MUTED if dot.subject else INK,
            )
            text.set_in_layout(False)
            box = text.get_window_extent(renderer)
            covered = sum(_overlap(box, other) for other in taken)
            outside = box.width * box.height - _overlap(box, inside)
            cost = covered + 3 * outside + 0.01 * place
            if cost < least:
                if best is not None:
                    best.remove()
                best, least = text, cost
            else:
                text.remove()
        if best is not None:
            taken.append(best.get_window_extent(renderer))


def _overlap(one: object, other: object) -> float:
    from matplotlib.transforms import Bbox, BboxBase

    assert isinstance(one, BboxBase)
    assert isinstance(other, BboxBase)
    shared = Bbox.intersection(one, other)
    return 0.0 if shared is None else float(shared.width * shared.height)


def _error(value: float | None) -> list[float] | None:
    return None if value is None or not math.isfinite(value) else [value]
