"""Metrics of unlearning. Importing this package loads numpy only; scipy and rouge-score load at their first use."""

from __future__ import annotations

from hf_unlearn.metrics.functional import *  # noqa: F403
from hf_unlearn.metrics.functional import __all__ as __all__
