"""The words of an edit before and after: a dot for each, on a logarithmic axis."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from .plots import PANEL, WIDTH
from .svg import INK, MUTED, SUBJECT_COLOURS, plot_style
from .words import WORDINGS, Words

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOWEST = 1e-12
"""Probabilities below are drawn here."""
_MARKERS = {"target": "o", "unlearned": "D", "reference": "^"}
_NAMES = {"target": "target", "unlearned": "edited", "reference": "reference (never saw the data)"}


def word_figure(words: Words) -> Figure | None:
    """
    The probability of each word in each model: a column for each wording of the questions, the wanted probability
    dashed.

    Args:
        words ([`Words`]): what was measured.

    Returns:
        `matplotlib.figure.Figure`, or None if there are no values.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    shown = [wording for wording in WORDINGS if any(words.probabilities.get(wording, {}).values())]
    if not shown:
        return None
    with plot_style():
        figure = Figure(figsize=(WIDTH, 1.55 * PANEL + 0.5), layout="constrained")
        axis = figure.subplots()
        handles, labels, values = [], [], [words.wanted]
        for number, subject in enumerate(_MARKERS):
            x, y = [], []
            for place, wording in enumerate(shown):
                # equal steps from the largest to the smallest, so that dots of a model do not hide one another
                found = sorted(words.probabilities[wording].get(subject, ()), reverse=True)
                found = [min(max(value, LOWEST), 1.0) for value in found if not math.isnan(value)]
                spread = [0.2 * (rank / max(len(found) - 1, 1) - 0.5) for rank in range(len(found))]
                x += [place + 0.28 * (number - 1) + shift for shift in spread]
                y += found
            if y:
                dots = axis.plot(x, y, _MARKERS[subject], ms=4.5, color=SUBJECT_COLOURS[subject], alpha=0.85, mew=0)
                handles.append(dots[0])
                labels.append(_NAMES[subject])
                values += y
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(numticks=8))
        least = f"≤ {LOWEST:g}" if min(values) <= LOWEST else f"{LOWEST:g}"
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}" if value > 1.5 * LOWEST else least))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.set_ylim(min(values) / 6.0, 3.0)
        axis.axhline(words.wanted, color=INK, lw=1.1, dashes=(4, 2.5))
        axis.annotate(
            f"wanted: at most {words.wanted:g}",
            xy=(0.01, words.wanted),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="left",  # there the target is at the top and the edited model begins at the line or below it
            va="bottom",
            fontsize=9,
            color=MUTED,
        )
        axis.set_xticks(range(len(shown)), [WORDINGS[wording] for wording in shown])
        axis.set_xlim(-0.5, len(shown) - 0.5)
        axis.grid(False, axis="x")
        axis.set_title("Probability of each word")
        figure.legend(handles, labels, loc="outside lower center", ncols=3, handletextpad=0.2, columnspacing=1.2)
    return figure
