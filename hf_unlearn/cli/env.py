"""`hf-unlearn env`: what a bug report needs to say, and nothing that identifies the machine or its user."""

from __future__ import annotations

import argparse


def run(command: str, arguments: list[str]) -> int:
    """Prints versions and devices."""
    argparse.ArgumentParser(prog="hf-unlearn env", description=__doc__).parse_args(arguments)
    import importlib.metadata
    import os

    import torch

    from ..reports import library_versions

    versions = dict(library_versions())
    for name in ("deepspeed", "bitsandbytes"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    versions["devices"] = ", ".join(gpus) or f"CPU, {os.cpu_count()} cores"
    versions["bf16"] = str(torch.cuda.is_bf16_supported()) if gpus else "not asked (CPU)"
    for name, value in versions.items():
        print(f"- {name}: {value}")
    return 0
