"""Models that know invented people and models that never saw some of them, trained once for all attacks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from small_models import AttackLab, make_lab


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Matrices this small are faster on one thread, and their sums then always run in one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def attack_lab() -> AttackLab:
    return make_lab()
