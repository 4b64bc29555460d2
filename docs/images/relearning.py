"""Draws relearning.png from tables of the lab: python docs/images/relearning.py RUN/table.json [RUN/table.json ...]"""

from __future__ import annotations

import sys
from pathlib import Path

from hf_unlearn.reports.recovery_plot import save_recovery_plot

if __name__ == "__main__":
    save_recovery_plot(sys.argv[1:], Path(__file__).with_suffix(".png"))
