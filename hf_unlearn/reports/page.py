"""What every page shares: the template environment, and figures as inline SVG."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup
    from matplotlib.figure import Figure

ANSWERS = {"yes": ("✓", "Yes"), "partly": ("~", "Partly"), "no": ("✕", "No"), "unknown": ("?", "Unknown")}
"""Sign and word of each answer: never colour alone."""


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A figure on the page: its anchor, title, what to see in it, and its SVG or why there is none."""

    name: str
    title: str
    caption: str
    svg: Markup | None


def page_environment() -> Environment:
    """The environment of the HTML templates: everything is escaped, and a missing value is an error."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("hf_unlearn.reports", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breakable"] = breakable
    return environment


def breakable(name: str) -> Markup:
    """The name of a run or a setting, escaped, with places where a line may break: behind `_`, `-`, `/` and `.`."""
    from markupsafe import Markup, escape

    pieces = re.split(r"(?<=[_\-/.])(?=\w)", name)
    return Markup("<wbr>").join(escape(piece) for piece in pieces)


def make_plot(name: str, title: str, caption: str, figure: Figure | None, *, label: str = "") -> Plot:
    """
    A figure for the page.

    Args:
        name (`str`): its anchor, in letters, digits and dashes.
        title (`str`): heading. caption (`str`): what to see in it.
        figure (`matplotlib.figure.Figure`, *optional*): what to draw; None where nothing was recorded.
        label (`str`, *optional*, defaults to `""`): what a screen reader says; defaults to the title.
    """
    from markupsafe import Markup

    from .svg import figure_svg

    # matplotlib escapes the texts in its SVG (a test holds it to that), so the element may stand as it is
    svg = None if figure is None else Markup(figure_svg(figure, name=f"plot-{name}", label=label or title))
    return Plot(name=name, title=title, caption=caption, svg=svg)
