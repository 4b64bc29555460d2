"""Evaluations that many tests look at, made once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tofu_kit import ANSWER, build, parts, tokenizer

from hf_unlearn.evaluation.tofu import run_tofu
from hf_unlearn.evaluation.tofu_files import TofuEvaluation


@pytest.fixture(scope="session")
def reference_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The evaluation of a retain-only model, as a folder."""
    folder = tmp_path_factory.mktemp("reference")
    run_tofu(build(1), tokenizer(), **parts(), output_dir=folder, max_new_tokens=ANSWER, resamples=50)
    return folder


@pytest.fixture(scope="session")
def compared_folder(reference_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The evaluation of another model against it."""
    folder = tmp_path_factory.mktemp("compared")
    arguments = {**parts(), "reference": reference_folder, "max_new_tokens": ANSWER, "resamples": 200}
    run_tofu(build(0), tokenizer(), **arguments, output_dir=folder, settings={"dataset": "a small world"})
    return folder


@pytest.fixture(scope="session")
def reference(reference_folder: Path) -> TofuEvaluation:
    return TofuEvaluation.load(reference_folder)


@pytest.fixture(scope="session")
def compared(compared_folder: Path) -> TofuEvaluation:
    return TofuEvaluation.load(compared_folder)


@pytest.fixture
def untouched(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model that no test may run."""
    model = build()
    monkeypatch.setattr(model, "forward", lambda *args, **kwargs: pytest.fail("computed before the input was checked"))
    return model
