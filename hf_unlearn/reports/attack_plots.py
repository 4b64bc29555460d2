"""Figures of attacks: curves against the attacker's effort, and success by attack and judge."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from . import formats
from .attack_words import OVER_REFUSAL, attack_words
from .outcomes import AttackOutcome, Curve, JudgeRate, Subject
from .plots import PANEL, WIDTH
from .svg import INK, MUTED, SUBJECT_COLOURS, SUBJECT_DASHES, plot_style

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ORDER: tuple[Subject, ...] = ("target", "unlearned", "control")
COLOURS = {**SUBJECT_COLOURS, "control": SUBJECT_COLOURS["reference"]}
DASHES = {**SUBJECT_DASHES, "control": SUBJECT_DASHES["reference"]}
NAMES = {"target": "target", "unlearned": "unlearned", "control": "control (never saw the data)"}
_MARKERS = {"target": "s", "unlearned": "o", "control": "^"}
_FEW, _MARKED = 7, 12
_TITLE_WIDTH, _LABEL_WIDTH = 54, 42


@dataclass(frozen=True, kw_only=True)
class _Point:
    x: float
    y: float
    low: float
    high: float


def curve_figures(outcome: AttackOutcome) -> list[tuple[str, Figure]]:
    """
    The curves of an attack: one figure for each thing that grows along x, with its label; in it a panel for each
    series, a line for each model.

    Several curves of one model in one panel are seeds: their mean is drawn, and their range as a band. Otherwise the
    band is one standard error to each side.
    """
    figures = []
    for label in dict.fromkeys(curve.x_label for curve in outcome.curves):
        curves = [curve for curve in outcome.curves if curve.x_label == label]
        if any(math.isfinite(y) for curve in curves for y in curve.y):
            figures.append((label, _curve_figure(curves, label)))
    return figures


def judge_figure(outcomes: Sequence[AttackOutcome]) -> Figure | None:
    """
    Success of every attack by every judge: a dot for each model with its standard error; beside it what share of the
    unlearned model's answers refuse, and what share is gibberish. None where nothing was judged.
    """
    from matplotlib.figure import Figure

    rows: list[tuple[str, dict[Subject, JudgeRate]]] = []
    for outcome in outcomes:
        if outcome.attack == OVER_REFUSAL:
            continue
        for judge in dict.fromkeys(rate.judge for rate in outcome.judges if rate.n):
            found = {rate.subject: rate for rate in outcome.judges if rate.judge == judge and rate.n}
            rows.append((f"{attack_words(outcome.attack).title}: {judge}", found))
    if not rows:
        return None
    with plot_style():
        figure = Figure(figsize=(WIDTH, 0.62 * len(rows) + 1.35), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1.35, 1.0))
        for place, (label, found) in enumerate(rows):
            _dots(left, place, found)
            _shares(right, place, found.get("unlearned"))
            left.text(
                0.0, place - 0.36, formats.one_line(label, _LABEL_WIDTH), fontsize=9, color=INK, va="center", ha="left"
            )
        for axis, title in ((left, "Attack success"), (right, "Refused, gibberish")):
            axis.set_title(title)
            axis.set_xlim(-0.03, 1.03)
            axis.set_xticks([0.0, 0.5, 1.0], ["0", "0.5", "1"])
            axis.grid(False, axis="y")
            axis.tick_params(axis="y", length=0, labelleft=False)
        left.set_ylim(len(rows) - 0.55, -0.7)
        handles, names = _judge_legend(rows)
        figure.legend(handles, names, loc="outside lower left", ncols=2, handletextpad=0.3, columnspacing=1.2)
    return figure


def _curve_figure(curves: Sequence[Curve], x_label: str) -> Figure:
    from matplotlib.figure import Figure

    panels = dict.fromkeys((curve.name, curve.y_label) for curve in curves)
    subjects = [subject for subject in ORDER if any(curve.subject == subject for curve in curves)]
    with plot_style():
        figure = Figure(figsize=(WIDTH, PANEL * len(panels) + 0.8), layout="constrained")
        axes = [row[0] for row in figure.subplots(len(panels), 1, sharex=True, squeeze=False)]
        places = sorted({x for curve in curves for x in curve.x if math.isfinite(x)})
        handles: dict[Subject, Artist] = {}
        for axis, (name, y_label) in zip(axes, panels, strict=True):
            shown = [curve for curve in curves if (curve.name, curve.y_label) == (name, y_label)]
            for subject in subjects:
                points = _points([curve for curve in shown if curve.subject == subject])
                if points:
                    handles[subject] = _line(axis, points, subject)
            axis.set_title(_title(y_label, name))
            values = [y for curve in shown for y in curve.y if math.isfinite(y)]
            if values and min(values) >= 0 and max(values) <= 1:
                axis.set_ylim(-0.03, 1.05)
        _x_axis(axes[-1], places, x_label)
        drawn = [subject for subject in subjects if subject in handles]
        labels = [NAMES[subject] for subject in drawn]
        figure.legend([handles[subject] for subject in drawn], labels, loc="outside lower left", ncols=3)
    return figure


def _line(axis: Axes, points: Sequence[_Point], subject: Subject) -> Artist:
    colour, places = COLOURS[subject], [point.x for point in points]
    line = axis.plot(
        places,
        [point.y for point in points],
        color=colour,
        dashes=DASHES[subject] or (None, None),
        lw=2.2 if subject == "unlearned" else 1.7,
        marker=_MARKERS[subject] if len(points) <= _MARKED else None,
        ms=4,
    )[0]
    if any(point.high > point.low for point in points):
        low, high = [point.low for point in points], [point.high for point in points]
        axis.fill_between(places, low, high, color=colour, alpha=0.16, lw=0)
    return line


def _points(curves: Sequence[Curve]) -> list[_Point]:
    found: dict[float, list[tuple[float, float]]] = {}
    for curve in curves:
        errors = curve.standard_error or (0.0,) * len(curve.x)
        for x, y, error in zip(curve.x, curve.y, errors, strict=True):
            if math.isfinite(x) and math.isfinite(y):
                found.setdefault(x, []).append((y, error if math.isfinite(error) else 0.0))
    points = []
    for x, own in sorted(found.items()):
        values = [y for y, _ in own]
        mean = sum(values) / len(values)
        low, high = (min(values), max(values)) if len(own) > 1 else (mean - own[0][1], mean + own[0][1])
        points.append(_Point(x=x, y=mean, low=low, high=high))
    return points


def _x_axis(axis: Axes, places: Sequence[float], label: str) -> None:
    axis.set_xlabel(formats.one_line(label, _TITLE_WIDTH))
    gaps = [later - earlier for earlier, later in pairwise(places)]
    if len(places) <= _FEW and all(gap >= 0.05 * sum(gaps) for gap in gaps):
        axis.set_xticks(places, [f"{x:g}" for x in places])
    if "bit" in label.lower():
        axis.invert_xaxis()  # fewer bits are the stronger attack


def _dots(axis: Axes, place: int, found: Mapping[Subject, JudgeRate]) -> None:
    for number, subject in enumerate(ORDER):
        rate = found.get(subject)
        if rate is None or not math.isfinite(rate.success):
            continue
        y = place + 0.17 * (number - 1) + 0.05
        error = rate.standard_error
        axis.errorbar(
            [rate.success],
            [y],
            xerr=None if error is None or not math.isfinite(error) else [error],
            fmt=_MARKERS[subject],
            ms=5.5 if subject == "unlearned" else 4.5,
            color=COLOURS[subject],
            elinewidth=1.4,
        )


def _shares(axis: Axes, place: int, rate: JudgeRate | None) -> None:
    if rate is None:
        return
    if rate.refusal is not None and math.isfinite(rate.refusal):
        axis.barh(place - 0.1, rate.refusal, height=0.17, color=MUTED)
    if math.isfinite(rate.degenerate):
        axis.barh(place + 0.14, rate.degenerate, height=0.17, facecolor="none", edgecolor=INK, lw=1.0)


def _judge_legend(rows: Sequence[tuple[str, Mapping[Subject, JudgeRate]]]) -> tuple[list[Artist], list[str]]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    subjects = [subject for subject in ORDER if any(subject in found for _, found in rows)]
    handles: list[Artist] = [
        Line2D([], [], ls="", marker=_MARKERS[subject], color=COLOURS[subject], ms=5) for subject in subjects
    ]
    handles += [Patch(color=MUTED), Patch(facecolor="none", edgecolor=INK)]
    return handles, [*(NAMES[subject] for subject in subjects), "refused (unlearned)", "gibberish (unlearned)"]


def _title(y_label: str, name: str) -> str:
    text = name if y_label == "share" else f"{y_label}: {name}" if name else y_label
    return "\n".join(textwrap.wrap(formats.one_line(text[:1].upper() + text[1:], 2 * _TITLE_WIDTH), _TITLE_WIDTH))
