"""The layout stays what CONTRIBUTING.md says: levels, file sizes, cheap imports, one version, nothing private."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "hf_unlearn"
FILES = sorted(PACKAGE.rglob("*.py"))

# A module may import its own level and those below. Longest prefix wins.
LEVELS = {
    "_version": 0,
    "progress": 0,
    "losses": 1,
    "constraint": 1,
    "duals": 1,
    "solver": 1,
    "geometry": 1,
    "editing": 4,
    "editing.algebra": 1,
    "metrics": 1,
    "data": 2,
    "probes": 2,
    "trainers": 3,
    "metrics.harness": 4,
    "metrics.likelihood": 4,
    "metrics.multiple_choice": 4,
    "metrics.muse": 4,
    "metrics.token_scores": 4,
    "metrics.generate": 4,
    "metrics.runner": 4,
    "attacks": 4,
    "evaluation": 4,
    "reports": 4,
    "lab": 5,
    "cli": 6,
}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def level(name: str) -> int:
    while name and name not in LEVELS:
        name = name.rpartition(".")[0]
    return LEVELS[name] if name else 7


def imports_of(path: Path) -> set[str]:
    """Names of this package's modules that a file imports anywhere but under TYPE_CHECKING."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    package = ["hf_unlearn", *path.relative_to(PACKAGE).parent.parts]
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped or not isinstance(node, ast.ImportFrom):
            continue
        if node.level:
            base = package[: len(package) - node.level + 1]
            full = ".".join([*base, node.module] if node.module else base)
        else:
            full = node.module or ""
        if full == "hf_unlearn":
            found |= {alias.name for alias in node.names}
        elif full.startswith("hf_unlearn."):
            found.add(full.removeprefix("hf_unlearn."))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_file_grows_beyond_one_idea(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= 400, f"{path} has {lines} lines; split it"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_only_point_downwards(path: Path) -> None:
    name = module_name(path)
    upwards = {other for other in imports_of(path) if level(other) > level(name) and level(other) < 7}
    assert not upwards, f"{name} (level {level(name)}) imports {sorted(upwards)}"


def test_level_check_sees_relative_and_absolute_imports() -> None:
    assert "duals" in imports_of(PACKAGE / "trainers" / "primal_dual.py")
    assert any(name.startswith("metrics") for name in imports_of(PACKAGE / "lab" / "evaluate.py"))


@pytest.mark.parametrize("name", ["losses", "duals", "solver", "geometry", "metrics.functional"])
def test_mathematics_needs_no_trainer(name: str) -> None:
    code = (
        f"import sys, hf_unlearn.{name}; "
        "print([m for m in ('transformers', 'trl', 'peft', 'datasets', 'accelerate') if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert shown.stdout.strip() == "[]"


def test_import_is_lazy_and_fast() -> None:
    code = (
        "import sys, time; start = time.perf_counter(); import hf_unlearn; spent = time.perf_counter() - start; "
        "print(spent, [m for m in ('torch', 'transformers', 'trl', 'deepspeed', 'matplotlib') if m in sys.modules])"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
        for _ in range(3)
    ]
    assert all(run.rstrip().endswith("[]") for run in runs), runs
    assert min(float(run.split()[0]) for run in runs) < 0.5


def test_trainers_do_not_import_deepspeed() -> None:
    code = "import sys; from hf_unlearn import PrimalDualTrainer; print('deepspeed' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert shown.stdout.strip() == "False"


def test_public_names_exist_and_are_listed() -> None:
    import hf_unlearn

    assert set(hf_unlearn.__all__) <= set(dir(hf_unlearn))
    for name in hf_unlearn.__all__:
        assert getattr(hf_unlearn, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = hf_unlearn.nonsense


def test_version_is_stated_once() -> None:
    from hf_unlearn import __version__

    stated = [path for path in FILES if f'"{__version__}"' in path.read_text(encoding="utf-8")]
    assert [path.name for path in stated] == ["_version.py"]
    assert f'version = "{__version__}"' not in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_command_line_starts_quickly_and_names_its_commands() -> None:
    start = time.perf_counter()
    shown = subprocess.run(
        [sys.executable, "-m", "hf_unlearn.cli.main", "--help"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert time.perf_counter() - start < 5
    for command in ("quickstart", "primal-dual", "unlearn", "sft", "lab", "env"):
        assert command in shown.stdout


def test_no_pickle_and_no_remote_code_by_default() -> None:
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert "import pickle" not in text, path
        assert "torch.load(" not in text, path
        assert "trust_remote_code=True" not in text, path
        assert "yaml.load(" not in text, path
