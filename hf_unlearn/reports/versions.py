"""Versions of everything that can change a number in a report."""

from __future__ import annotations

import platform
from importlib import metadata

LIBRARIES = ("hf_unlearn", "torch", "transformers", "trl", "peft", "accelerate", "datasets")


def library_versions() -> dict[str, str]:
    """Versions of the libraries, of Python and of the operating system.

    Read from the installed distributions, so nothing heavy is imported. The name of the machine is left out: results
    are meant to be published.

    Returns:
        `dict[str, str]`: one entry for each of `hf_unlearn`, `torch`, `transformers`, `trl`, `peft`, `accelerate`,
        `datasets` ("not installed" where absent), `python` and `platform`.
    """
    versions = {name: _version(name) for name in LIBRARIES}
    versions["python"] = platform.python_version()
    versions["platform"] = f"{platform.system()} {platform.machine()}".strip()
    return versions


def _version(name: str) -> str:
    if name == "hf_unlearn":
        # the source tree is also used without being installed, where no distribution metadata exist
        from .._version import __version__

        return __version__
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
