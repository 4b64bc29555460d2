"""How numbers are written, the same in the terminal, in model cards and on the page."""

from __future__ import annotations

import json
import math
import re
from typing import Any

MISSING = "–"
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f\ud800-\udfff]+")


def score(value: float | None) -> str:
    """A score, three digits after the point; small ones in scientific form so that 1e-5 is not shown as 0."""
    if value is None or math.isnan(value):
        return MISSING
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if value == 0 or 0.001 <= abs(value) < 1e4:
        return f"{value:.3f}"
    return f"{value:.1e}"


def with_error(value: float | None, standard_error: float | None) -> str:
    """A score with its standard error where that is known."""
    if standard_error is None or not math.isfinite(standard_error):
        return score(value)
    return f"{score(value)} ± {score(standard_error)}"


def p_value(value: float | None, log10: float | None = None) -> str:
    """A p-value: two digits; below the smallest float its power of ten."""
    if value is None or math.isnan(value):
        return MISSING
    if value == 0:
        return f"1e{log10:.0f}" if log10 is not None and math.isfinite(log10) else "0"
    return f"{value:.2f}" if value >= 0.01 else f"{value:.1e}"


def loss(value: float | None) -> str:
    """A loss, limit or multiplier: four significant digits."""
    if value is None or math.isnan(value):
        return MISSING
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    return f"{value:.4g}"


def duration(seconds: float | None) -> str:
    """Seconds in the unit a reader would use."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    if whole < 7200:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def percent(value: float | None) -> str:
    """A fraction in per cent."""
    return MISSING if value is None or not math.isfinite(value) else f"{100 * value:.1f}%"


def one_line(text: str, length: int) -> str:
    """A name for a figure, which cannot draw control characters and lone surrogates; cut where it is longer."""
    text = " ".join(_UNPRINTABLE.sub(" ", text).split())
    return text if len(text) <= length else f"{text[: length - 1]}…"


def plain_words(name: str) -> str:
    """A key as words: `real_authors_probability` becomes "Real authors probability"."""
    words = name.replace("_", " ").replace("/", " / ").strip()
    return words[:1].upper() + words[1:]


def plain_setting(value: Any) -> str:
    """A setting as text: strings as they are, everything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
