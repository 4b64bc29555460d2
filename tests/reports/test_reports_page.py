from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.patches import Rectangle

from hf_unlearn.reports import (
    Results,
    constraint_figure,
    dual_figure,
    forget_figure,
    render_report,
    save_plots,
    truth_ratio_figure,
    write_report,
)
from hf_unlearn.reports.series import series
from hf_unlearn.reports.svg import figure_svg

VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """Elements, attributes and text of a page; fails on elements that are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes the wrong element"

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def ids(self) -> list[str]:
        return [value for _, name, value in self.attributes if name == "id"]


@pytest.fixture
def text(plain_page: str) -> str:
    return plain_page


def test_hostile_generations_stay_text(text: str) -> None:
    page = Page(text)
    assert not {"script", "img", "iframe", "object", "link", "base", "form"} & set(page.tags)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert "<script>alert('x')</script><img src=https://evil.example/a.png onerror=alert(1)>" in "".join(page.text)
    assert "{{ 7 * 7 }} &amp;" in "".join(page.text)


@pytest.mark.parametrize("field", ["method", "model", "dataset"])
def test_every_name_is_escaped(sample: dict[str, Any], field: str) -> None:
    hostile = "</style><script>x</script>\"'$\\frac{1}$ _"
    sample[field] = hostile
    sample["constraints"][0]["name"] = hostile
    sample["absent"] = {hostile: hostile}
    sample["settings"][hostile] = hostile
    sample["versions"][hostile] = hostile
    sample["seconds"][hostile] = 1.0
    sample["target"][hostile] = 0.5
    sample["history"] = [{"step": s, f"loss/retain/{hostile}": 0.1, f"dual/{hostile}": 1.0} for s in (1, 2)]
    page = Page(render_report(sample))
    assert "script" not in page.tags
    assert page.tags.count("svg") == 3
    assert page.tags.count("style") == 1


def test_the_page_loads_nothing(text: str) -> None:
    page = Page(text)
    assert "default-src 'none'; style-src 'unsafe-inline'" in [
        v for _, name, v in page.attributes if name == "content"
    ]
    for _, name, value in page.attributes:
        if name in {"src", "srcset", "href", "xlink:href", "action", "data", "poster"}:
            assert value.startswith("#"), f"{name}={value}"
    urls = re.findall(r"url\(([^)]*)\)", text)
    assert urls
    assert all(url.strip("\"'").startswith("#") for url in urls)
    assert "@import" not in text
    assert set(re.findall(r"https?://[^\s\"'<&]*", text)) <= {"https://evil.example/a.png"}  # quoted as text


def test_every_figure_and_section_is_present(text: str) -> None:
    page = Page(text)
    for section in ("verdict", "scores", "constraints", "plots", "generations", "reading", "reproduce"):
        assert section in page.ids()
    for figure in ("forget", "retain", "dual", "truth-ratio"):
        assert figure in page.ids()
        assert f"plot-{figure}-figure_1" in page.ids()
    assert page.tags.count("svg") == 4
    assert "Nothing was recorded" not in text
    words = " ".join(" ".join(page.text).split())
    for expected in ("relearning", "forget level 5.4", "eps 0.022", "3 min 14 s", "0.991", "transformers", "lmf"):
        assert expected in words


def test_ids_are_unique_and_references_are_met(text: str) -> None:
    page = Page(text)
    assert len(page.ids()) == len(set(page.ids()))
    used = {value for _, name, value in page.attributes if name == "href"} | set(re.findall(r"url\((#[^)]*)\)", text))
    assert {reference[1:] for reference in used} <= set(page.ids())


def test_figures_follow_the_theme_of_the_page(text: str) -> None:
    drawn = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
    assert "var(--plot-ink, #1f2328)" in drawn
    bare = set(re.findall(r"#[0-9a-f]{6}", re.sub(r"var\(--[\w-]+, #[0-9a-f]{6}\)", "", drawn)))
    assert bare == set(), f"colours that ignore the dark theme: {bare}"
    assert "mathdefault" not in drawn


def test_the_page_is_the_same_each_time(sample: dict[str, Any], text: str) -> None:
    assert render_report(Results.from_dict(sample)) == text


def test_a_bare_run_has_a_page_that_says_what_is_missing(sample: dict[str, Any], tmp_path: Path) -> None:
    four = ("forget_probability", "forget_rouge", "retain_probability", "retain_rouge")
    bare = {
        "method": "gradient ascent",
        "target": {name: sample["target"][name] for name in four},
        "unlearned": {name: float("nan") for name in four},
        "reference": None,
        "forget_quality": None,
        "seconds": {"total": 0.0},
        "versions": {},
    }
    text = write_report(tmp_path / "out" / "report.html", bare).read_text(encoding="utf-8")
    page = Page(text)
    assert text.count("Nothing was recorded for this figure.") == 4
    assert "No generations were recorded." in text
    assert "This run had no constraints." in text
    assert "svg" not in page.tags
    assert "nan" not in re.sub(r"<style>.*?</style>", "", text, flags=re.DOTALL).lower().split()


def test_folded_generations_are_still_on_the_page(sample: dict[str, Any], text: str) -> None:
    assert "<summary>2 more</summary>" in text
    for row in sample["generations"]:
        assert row["question"].replace("'", "&#39;") in text


def test_plots_are_saved_without_touching_the_users_matplotlib(sample: dict[str, Any], tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"font.size": 99, "text.usetex": True}):
        paths = save_plots(
            sample["history"],
            sample["constraints"],
            tmp_path / "plots",
            forget_level=5.4,
            truth_ratios=sample["truth_ratios"],
        )
        assert matplotlib.rcParams["font.size"] == 99
    assert dict(matplotlib.rcParams) == before
    assert [path.name for path in paths] == ["forget_loss.png", "retain_loss.png", "dual.png", "truth_ratio.png"]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in paths)
    assert save_plots([], [], tmp_path / "none") == []


def test_pyplot_is_not_imported() -> None:
    code = "import sys; from hf_unlearn.reports import save_plots; import tempfile;"
    code += "save_plots([{'step': 1, 'loss/forget': 1.0}], [], tempfile.mkdtemp());"
    code += "print('matplotlib.pyplot' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_retain_figure_has_one_panel_a_constraint_and_shades_the_infeasible_side(sample: dict[str, Any]) -> None:
    figure = constraint_figure(sample["history"], sample["constraints"])
    assert figure is not None
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["Loss on retain", "Loss on world_facts"]
    for axis, constraint in zip(figure.axes, sample["constraints"], strict=True):
        (level,) = [line for line in axis.lines if line.is_dashed()]
        assert set(np.asarray(level.get_ydata())) == {constraint["eps"]}
        (shade,) = axis.patches
        assert isinstance(shade, Rectangle)
        assert shade.get_y() == pytest.approx(constraint["eps"])
        assert shade.get_y() + shade.get_height() == pytest.approx(axis.get_ylim()[1])


def test_eps_of_the_log_wins_over_the_final_one() -> None:
    history = [{"step": s, "loss/retain/a": 0.1, "eps/a": 0.3 - 0.05 * s} for s in (1, 2, 3)]
    figure = constraint_figure(history, [{"name": "a", "eps": 9.0}])
    assert figure is not None
    assert np.asarray(figure.axes[0].lines[1].get_ydata()).tolist() == pytest.approx([0.25, 0.2, 0.15])


@pytest.mark.parametrize("values", [[], [float("nan")], [0.0], [0.0, float("inf"), 1.0], [1.0], [1e-30, 1e30]])
def test_odd_truth_ratios_do_not_break_the_figure(values: list[float]) -> None:
    figure = truth_ratio_figure({"unlearned": values, "reference": values})
    if figure is not None:
        assert figure_svg(figure, name="x").startswith("<svg")


def test_odd_histories_do_not_break_the_figures() -> None:
    odd: list[dict[str, Any]] = [
        {"step": 3, "loss/forget": 1.0, "dual/_a": 0.0, "loss/retain/_a": -1.0},
        {"step": 3, "loss/forget": 2.0},
        {"step": 1, "loss/forget": float("nan"), "dual/_a": None, "forget_nll": "x"},
        {"loss/forget": 0.5},
    ]
    assert series(odd, "loss/forget") == ([3.0], [0.5])
    for figure in (forget_figure(odd, forget_level=float("inf")), constraint_figure(odd), dual_figure(odd)):
        assert figure is not None
        assert "</svg>" in figure_svg(figure, name="x")
