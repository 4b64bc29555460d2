"""Peak memory of a part of a run: on an accelerator what was allocated, else the process's resident set."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from types import TracebackType

_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


class PeakMemory:
    """
    A context manager; afterwards `bytes` is the peak within it.

    On a GPU it is the peak of allocated memory. On a CPU it is the peak resident set of the process, all it held
    before included; on systems without `/proc` the peak of the whole run so far.
    """

    bytes: int = 0

    def __enter__(self) -> PeakMemory:
        import torch

        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        elif _REFS.exists():
            _REFS.write_text("5")  # resets the high-water mark of the resident set
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        import torch

        if torch.cuda.is_available():
            self.bytes = torch.cuda.max_memory_allocated()
            return
        if _STATUS.exists():
            for line in _STATUS.read_text().splitlines():
                if line.startswith("VmHWM:"):
                    self.bytes = 1024 * int(line.split()[1])
                    return
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self.bytes = peak if sys.platform == "darwin" else 1024 * peak
