"""The curves of a run: forget loss, retain losses against eps, dual variables, truth ratios."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from . import formats
from .schema import SUBJECTS, ConstraintOutcome
from .series import History, names_under, series
from .svg import DANGER, INK, MUTED, SERIES, SUBJECT_COLOURS, SUBJECT_DASHES, plot_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

    from .words import Words

WIDTH, PANEL = 4.8, 2.0
"""Inches: text of 10 points in a figure this wide is readable at the width of a phone."""
LOG_FROM = 30.0
"""Ratio of the largest to the smallest value from which an axis is logarithmic."""

Constraints = Sequence[ConstraintOutcome | Mapping[str, Any]]


def forget_figure(history: History, *, forget_level: float | None = None) -> Figure | None:
    """What is minimised ("loss/forget") and the mean NLL of forget examples ("forget_nll"), against steps.

    Args:
        history (`Sequence[Mapping]`): the trainer's log dicts.
        forget_level (`float`, *optional*): NLL in nats at which forgetting stops, drawn as a line.

    Returns:
        `matplotlib.figure.Figure`, or None if neither was logged.
    """
    panels = [("Forget loss", "loss/forget"), ("NLL of forget answers (nats per token)", "forget_nll")]
    panels = [(title, key) for title, key in panels if series(history, key)[0]]
    if not panels:
        return None
    with plot_style():
        figure, axes = _panels(len(panels))
        for axis, (title, key) in zip(axes, panels, strict=True):
            steps, values = series(history, key)
            _curve(axis, steps, values, SERIES[0])
            axis.set_title(title)
            if key == "forget_nll" and forget_level is not None and math.isfinite(forget_level):
                _level(axis, forget_level, f"forget level {formats.loss(forget_level)}", INK, side="left")
                low, high = axis.get_ylim()
                axis.set_ylim(low, max(high, forget_level + 0.18 * (forget_level - low)))  # room for the label
            elif key == "loss/forget":
                _log_if_wide(axis, values)
        axes[-1].set_xlabel("optimizer step")
    return figure


def constraint_figure(history: History, constraints: Constraints = ()) -> Figure | None:
    """Each retain loss against its limit: one panel a constraint, eps dashed, the infeasible side shaded.

    Args:
        history (`Sequence[Mapping]`): the trainer's log dicts, with "loss/retain/<name>" and perhaps "eps/<name>".
        constraints (`Sequence[ConstraintOutcome]`, *optional*): gives eps where the log has none.

    Returns:
        `matplotlib.figure.Figure`, or None if no retain loss was logged.
    """
    limits = _limits(constraints)
    names = [n for n in names_under(history, "loss/retain", limits) if series(history, f"loss/retain/{n}")[0]]
    if not names:
        return None
    with plot_style():
        figure, axes = _panels(len(names))
        for position, (axis, name) in enumerate(zip(axes, names, strict=True)):
            steps, values = series(history, f"loss/retain/{name}")
            _curve(axis, steps, values, SERIES[position % len(SERIES)])
            axis.set_title(f"Loss on {_short(name).strip()}")
            eps_steps, eps_values = series(history, f"eps/{name}")
            eps = eps_values[-1] if eps_values else limits.get(name, math.nan)
            limited = [eps] if math.isfinite(eps) else []
            _log_if_wide(axis, values + limited)
            if not limited:
                continue
            low, high = axis.get_ylim()
            high = max(high, eps * 1.15 if eps > 0 else eps + 0.1 * (high - low))
            low = min(low, eps * 0.87 if eps > 0 else low)
            if len(set(eps_values)) > 1:
                axis.step(eps_steps, eps_values, where="post", color=INK, lw=1.1, dashes=(4, 2.5))
                axis.fill_between(eps_steps, eps_values, high, step="post", color=DANGER, alpha=0.1, lw=0)
            else:
                _level(axis, eps, f"eps {formats.loss(eps)}", INK)
                axis.axhspan(eps, high, color=DANGER, alpha=0.1, lw=0, zorder=0)
            axis.set_ylim(low, high)
        axes[-1].set_xlabel("optimizer step")
    return figure


def dual_figure(history: History, constraints: Constraints = ()) -> Figure | None:
    """The dual variable of each constraint against steps, or None if none was logged."""
    names = names_under(history, "dual", _limits(constraints))
    names = [name for name in names if series(history, f"dual/{name}")[0]]
    if not names:
        return None
    dashes: tuple[tuple[float, ...], ...] = ((), (5, 2.2), (1.2, 1.6), (7, 2, 1.5, 2))
    with plot_style():
        figure, (axis,) = _panels(1, height=2.4)
        handles = []
        for position, name in enumerate(names):
            steps, values = series(history, f"dual/{name}")
            style = dashes[position % len(dashes)] if len(names) > 1 else ()
            handles.append(_curve(axis, steps, values, SERIES[position % len(SERIES)], style))
        low, high = axis.get_ylim()
        axis.set_ylim(min(0.0, low), high)
        axis.set_title("Dual variable (price of the constraint)")
        axis.set_xlabel("optimizer step")
        if len(names) > 1:
            axis.legend(handles, [_short(name) for name in names], loc="best")
    return figure


def truth_ratio_figure(truth_ratios: Mapping[str, Iterable[float]]) -> Figure | None:
    """Empirical distribution functions of the forget rows' truth ratios for each model.

    Args:
        truth_ratios (`Mapping[str, Iterable[float]]`): truth ratio of each row for "target", "unlearned" and
            "reference", unitless and positive; not finite or not positive ones are drawn at the edge.

    Returns:
        `matplotlib.figure.Figure`, or None if there are no values.
    """
    samples = {name: [v for v in truth_ratios.get(name, ()) if not math.isnan(v)] for name in SUBJECTS}
    inside = [v for values in samples.values() for v in values if 0 < v < math.inf]
    if not inside:
        return None
    low, high = min(inside), max(inside)
    with plot_style():
        figure, (axis,) = _panels(1, height=2.9)
        if high / low > LOG_FROM:
            axis.set_xscale("log")
            _plain_ticks(axis.xaxis)
        handles, labels = [], []
        for name, values in samples.items():
            if not values:
                continue
            ordered = sorted(min(max(value, low), high) for value in values)
            shares = [(index + 1) / len(ordered) for index in range(len(ordered))]
            handles.append(
                axis.step(
                    [low, *ordered, high],
                    [0.0, *shares, 1.0],
                    where="post",
                    color=SUBJECT_COLOURS[name],
                    dashes=SUBJECT_DASHES[name] or (None, None),
                    lw=2.2 if name == "unlearned" else 1.7,
                )[0]
            )
            labels.append(name)
        axis.set_ylim(0, 1.02)
        axis.set_title("Share of forget rows with a truth ratio below x")
        axis.set_xlabel("truth ratio (wrong answers / right answer)")
        axis.legend(handles, labels, loc="lower right")
    return figure


def save_plots(
    history: History,
    constraints: Constraints,
    out_dir: str | os.PathLike[str],
    *,
    forget_level: float | None = None,
    truth_ratios: Mapping[str, Iterable[float]] | None = None,
    words: Words | None = None,
) -> list[Path]:
    """Draw what can be drawn into PNG files: forget_loss, retain_loss, dual, truth_ratio, words.

    Args:
        history (`Sequence[Mapping]`): the trainer's log dicts, as in `trainer.state.log_history`.
        constraints (`Sequence[ConstraintOutcome]`): the constraints, or dicts with `name` and `eps`.
        out_dir (`str` or `os.PathLike`): the folder; it is made.
        forget_level (`float`, *optional*): NLL in nats at which forgetting stops.
        truth_ratios (`Mapping[str, Iterable[float]]`, *optional*): see [`truth_ratio_figure`].
        words ([`Words`], *optional*): see [`word_figure`].

    Returns:
        `list[Path]`: the files written; figures without data are left out.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from .word_plot import word_figure

    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    builders: dict[str, Callable[[], Figure | None]] = {
        "forget_loss": lambda: forget_figure(history, forget_level=forget_level),
        "retain_loss": lambda: constraint_figure(history, constraints),
        "dual": lambda: dual_figure(history, constraints),
        "truth_ratio": lambda: truth_ratio_figure(truth_ratios or {}),
        "words": lambda: None if words is None else word_figure(words),
    }
    paths = []
    for name, build in builders.items():
        figure = build()
        if figure is None:
            continue
        path = folder / f"{name}.png"
        with plot_style():
            FigureCanvasAgg(figure)
            # an opaque ground: these files are also looked at in dark viewers, where ink on nothing is invisible
            figure.savefig(path, dpi=160, facecolor="white")
        paths.append(path)
    return paths


def _panels(count: int, height: float = PANEL) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height * count + 0.45), layout="constrained")
    axes = figure.subplots(count, 1, sharex=True, squeeze=False)
    return figure, [row[0] for row in axes]


def _curve(axis: Axes, steps: list[float], values: list[float], colour: str, dashes: tuple[float, ...] = ()) -> Any:
    # a single point has no line, so it gets a marker
    marker = "o" if len(steps) == 1 else None
    line = axis.plot(steps, values, color=colour, marker=marker, ms=4, dashes=dashes or (None, None))[0]
    axis.margins(x=0.01)
    return line


def _level(axis: Axes, value: float, label: str, colour: str, side: Literal["left", "right"] = "right") -> None:
    axis.axhline(value, color=colour, lw=1.1, dashes=(4, 2.5))
    axis.annotate(
        label,
        xy=(0.99 if side == "right" else 0.01, value),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        ha=side,
        va="bottom",
        fontsize=9,
        color=MUTED,
    )


def _log_if_wide(axis: Axes, values: Sequence[float]) -> None:
    if values and min(values) > 0 and max(values) / min(values) > LOG_FROM:
        axis.set_yscale("log")
        _plain_ticks(axis.yaxis)


def _plain_ticks(axis: Axis) -> None:
    # the default labels of logarithmic axes are mathematics, which would be drawn as paths or as raw source
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(numticks=6))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _limits(constraints: Constraints) -> dict[str, float]:
    rows = [(c["name"], c.get("eps")) if isinstance(c, Mapping) else (c.name, c.eps) for c in constraints]
    return {str(name): math.nan if eps is None else float(eps) for name, eps in rows}


def _short(name: str) -> str:
    # matplotlib leaves labels that begin with an underscore out of legends
    text = formats.one_line(name, 40)
    return f" {text}" if text.startswith("_") else text
