"""The documentation keeps step with the code: config fields and their defaults, class docstrings, internal links."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import inspect
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import TrainingArguments

from hf_unlearn.editing import EditConfig
from hf_unlearn.trainers import PrimalDualConfig, PrismConfig, UnlearningConfig

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("**/*.md"))
MARKDOWN = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
CONFIGS = (UnlearningConfig, PrimalDualConfig, PrismConfig, EditConfig)

ROW = re.compile(r"^\| `(\w+)` \| `(.+?)` \| (.+) \|$", re.MULTILINE)
ENTRY = re.compile(r"^\s*(\w+) \(`[^)]+?\*optional\*(?:, defaults to `([^`]+)`)?\):$", re.MULTILINE)
LINK = re.compile(r"(?<!!)\[[^\]]+\]\(([^)\s]+)\)")


def defaults(config: type) -> dict[str, Any]:
    return {field.name: field.default for field in dataclasses.fields(config)} if config is not object else {}


def own_fields(config: type) -> dict[str, Any]:
    """Fields of a config that its parent lacks, with their defaults."""
    parent = defaults(config.__mro__[1])
    return {name: default for name, default in defaults(config).items() if name not in parent}


def changed_defaults(config: type) -> dict[str, Any]:
    """Fields of the parent that a config declares again to change their default."""
    inherited = set(inspect.get_annotations(config)) & set(defaults(config.__mro__[1]))
    return {name: value for name, value in defaults(config).items() if name in inherited}


@cache
def index_rows(config: type) -> dict[str, tuple[str, str]]:
    """Field to (default, source) in the section of a config in docs/paper_index.md."""
    text = (DOCS / "paper_index.md").read_text(encoding="utf-8")
    section = text.split(f"\n## {config.__name__}\n")[1].split("\n## ")[0]
    rows = ROW.findall(section)
    assert len({name for name, _, _ in rows}) == len(rows), f"a field of {config.__name__} is listed twice"
    return {name: (default, source) for name, default, source in rows}


@pytest.mark.parametrize("config", CONFIGS)
def test_every_new_field_and_changed_default_has_a_row_with_a_source_in_the_paper_index(config: type) -> None:
    expected = {**own_fields(config), **changed_defaults(config)}
    rows = index_rows(config)
    assert set(rows) == set(expected), "docs/paper_index.md and the dataclass list different fields"
    for name, value in expected.items():
        default, source = rows[name]
        assert ast.literal_eval(default) == value, f"{name}: the page says {default}, the dataclass has {value!r}"
        assert source.strip(), f"{name} has no source"


def test_no_field_beyond_training_arguments_is_missing_from_the_paper_index() -> None:
    known = {name for config in CONFIGS for name in index_rows(config)}
    assert set(defaults(PrismConfig)) - set(defaults(TrainingArguments)) <= known


@pytest.mark.parametrize("config", CONFIGS)
def test_every_new_field_is_in_the_class_docstring_with_its_default(config: type) -> None:
    assert config.__doc__ is not None
    entries = dict(ENTRY.findall(config.__doc__))
    for name, value in own_fields(config).items():
        assert name in entries, f"{config.__name__}.{name} has no entry in the class docstring"
        documented = ast.literal_eval(entries[name]) if entries[name] else None
        assert documented == value, f"{name}: the docstring says {documented!r}, the dataclass has {value!r}"
    for name in changed_defaults(config):
        assert re.search(rf"\b{name}\b", config.__doc__) or name in (
            # said in words: "evaluation and a checkpoint every epoch", "the best feasible checkpoint"
            "eval_strategy",
            "save_strategy",
            "metric_for_best_model",
            "greater_is_better",
        ), f"{config.__name__} changes the default of {name} without saying so"


@pytest.mark.parametrize("config", CONFIGS)
def test_every_new_field_has_a_help_text(config: type) -> None:
    for field in dataclasses.fields(config):
        if field.name in own_fields(config) or field.name in changed_defaults(config):
            assert field.metadata.get("help"), f"{config.__name__}.{field.name} has no help text"


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.+)$", without_code(page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: page.name)
def test_internal_links_resolve(page: Path) -> None:
    for target in LINK.findall(without_code(page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        assert linked.exists(), f"{page.name} links to {target}, which is not there"
        if anchor:
            assert anchor in anchors(linked), f"{page.name} links to {target}, which has no such heading"


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: page.name)
def test_files_named_in_the_text_exist(page: Path) -> None:
    text = without_code(page.read_text(encoding="utf-8"))
    for name in re.findall(r"`((?:recipes|tests|docs)/[\w./-]+)`", text):
        assert (ROOT / name).exists(), f"{page.name} names {name}, which is not there"


def test_navigation_lists_every_page_once() -> None:
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]

    def files(node: Any) -> list[str]:
        if isinstance(node, str):
            return [node]
        return [name for child in (node.values() if isinstance(node, dict) else node) for name in files(child)]

    assert sorted(files(navigation)) == sorted(str(page.relative_to(DOCS)) for page in PAGES)


def test_every_forget_loss_is_on_the_losses_page() -> None:
    text = (DOCS / "losses.md").read_text(encoding="utf-8")
    choices = next(f for f in dataclasses.fields(UnlearningConfig) if f.name == "forget_loss").metadata["choices"]
    missing = [name for name in choices if f"| `{name}` |" not in text]
    assert not missing


def test_licence_is_the_unmodified_apache_2_text() -> None:
    text = (ROOT / "LICENSE").read_bytes()
    assert hashlib.sha256(text).hexdigest() == "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
