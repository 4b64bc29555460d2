"""Matplotlib figures as SVG that lives inside a page: its fonts, its light or dark colours, no foreign addresses."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which stays apart under the common colour-vision deficiencies.
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"
SERIES = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)
INK, MUTED, GRID, DANGER = "#1f2328", "#59636e", "#d1d9e0", "#c8102e"
SUBJECT_COLOURS = {"target": VERMILLION, "unlearned": BLUE, "reference": GREEN}
SUBJECT_DASHES = {"target": (1.2, 1.6), "unlearned": (), "reference": (5.0, 2.2)}

# each colour becomes a CSS variable with the colour as its fallback: the page sets the variables for light and dark
_VARIABLES = {
    BLUE: "--plot-blue",
    VERMILLION: "--plot-vermillion",
    GREEN: "--plot-green",
    PURPLE: "--plot-purple",
    ORANGE: "--plot-orange",
    SKY: "--plot-sky",
    INK: "--plot-ink",
    MUTED: "--plot-muted",
    GRID: "--plot-grid",
    DANGER: "--plot-danger",
}
# settings that belong to the process and not to a figure: resetting them would reach outside this context
_NOT_OURS = {"backend", "backend_fallback", "interactive", "toolbar", "timezone", "webagg.open_in_browser"}

_STYLE = {
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.7,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.unicode_minus": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "figure.facecolor": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.fontsize": 9.5,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",
    "svg.hashsalt": "hf-unlearn",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
}


@contextmanager
def plot_style() -> Iterator[None]:
    """The style of our figures, from matplotlib's own defaults: a user's matplotlibrc changes nothing here.

    The user's settings are back afterwards, and pyplot is neither imported nor asked.
    """
    import matplotlib

    style: dict[Any, Any] = {
        key: matplotlib.rcParamsDefault[key] for key in matplotlib.rcParamsDefault if key not in _NOT_OURS
    }
    with matplotlib.rc_context(style | _STYLE):
        yield


def figure_svg(figure: Figure, *, name: str, label: str = "") -> str:
    """`figure` as an `<svg>` element for HTML.

    Args:
        figure (`matplotlib.figure.Figure`): what to draw.
        name (`str`): prefix of every id in it, so that several figures can stand on one page.
        label (`str`, *optional*, defaults to `""`): what a screen reader says; defaults to `name`.

    Returns:
        `str`: the element: without prologue, metadata and name spaces, transparent, its colours CSS variables
        (`--plot-ink`, `--plot-blue`, ...) that fall back to the light theme.
    """
    from html import escape

    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()
    with plot_style():
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # an inline style element would apply to the whole page: its one rule goes to the root as attributes
    text = re.sub(r"<defs>\s*<style[^>]*>[^<]*</style>\s*</defs>", "", text)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
    text = text.replace("xlink:href=", "href=")
    text = re.sub(r'(\sid="|\shref="#|url\(#)', rf"\g<1>{name}-", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(f"{colour};", f"var({variable}, {colour});").replace(
            f'{colour}"', f'var({variable}, {colour})"'
        )
    opening, rest = text.split(">", 1)
    opening = re.sub(r'\s(width|height|version)="[^"]*"', "", opening)
    return f'{opening} stroke-linejoin="round" role="img" aria-label="{escape(label or name)}">{rest.strip()}'
