"""The pages opened in headless Chromium: no errors, no requests, every figure drawn, nothing wider than a phone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attacked
import pytest
from browser import Browser, find_chromium

from hf_unlearn.reports import Results
from hf_unlearn.reports.compare import compare
from hf_unlearn.reports.compare_page import write_comparison
from hf_unlearn.reports.schema import write_text

PHONE, DESK = 390, 1280
FIGURES = {"plain": 4, "attacked": 8, "compared": 3}
LOOK = r"""(() => {
  const figures = [...document.querySelectorAll('figure')].map(figure => {
    const svg = figure.querySelector('svg');
    const box = svg ? svg.getBoundingClientRect() : {width: 0, height: 0};
    return {
      name: figure.id, width: box.width, height: box.height, label: svg ? svg.getAttribute('aria-label') : '',
      drawn: svg ? svg.querySelectorAll('path, use').length : 0, said: svg ? svg.querySelectorAll('text').length : 0,
      title: figure.querySelector('h3').textContent,
    };
  });
  return {
    figures, width: document.documentElement.scrollWidth, view: innerWidth, text: document.body.textContent,
    foreign: document.querySelectorAll('script, img, iframe, link, object').length,
    ground: getComputedStyle(document.body).backgroundColor, ink: getComputedStyle(document.body).color,
    plot: getComputedStyle(document.documentElement).getPropertyValue('--plot-ink'),
    cut: [...document.querySelectorAll('h1, h2, h3, p, figcaption, .badge, summary')]
      .filter(own => own.getBoundingClientRect().right > document.documentElement.clientWidth + 1).map(own => own.textContent),
    squeezed: [...document.querySelectorAll('th, td, p, h3')].filter(own => {
      const box = own.getBoundingClientRect();  // letters below one another
      return own.textContent.trim().length > 3 && box.width > 0 && box.width < 24;
    }).map(own => own.textContent),
    torn: [...document.querySelectorAll('th, td.num')].flatMap(own => {
      const texts = document.createTreeWalker(own, NodeFilter.SHOW_TEXT), found = [];
      while (texts.nextNode()) {
        // a word of up to 12 letters, or a number with its exponent, on two lines
        for (const word of texts.currentNode.data.matchAll(/\d[\d.]*(?:e-?\d+)?|[A-Za-z0-9]+/g)) {
          const range = document.createRange();
          range.setStart(texts.currentNode, word.index);
          range.setEnd(texts.currentNode, word.index + word[0].length);
          const lines = new Set([...range.getClientRects()].map(box => Math.round(box.top)));
          if (word[0].length <= 12 && lines.size > 1) found.push(word[0]);
        }
      }
      return found;
    }),
  };
})()"""


def chromium() -> str:
    """The browser; without one a test is skipped, and fails where it must not be."""
    program = find_chromium()
    if program is None:
        reason = "no Chromium was found (apt-get install chromium, or name one in CHROMIUM)"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return program


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(chromium(), tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture(scope="module")
def pages(
    sample_factory: Callable[[], dict[str, Any]],
    plain_page: str,
    attacked_page: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    plain = sample_factory()
    full = {**plain, "attacks": attacked.all_attacks(), "evaluations": attacked.all_evaluations()}
    other = {**full, "method": "<script>alert('method')</script>", "settings": {"learning_rate": 1e-5}}
    other["unlearned"] = {**plain["unlearned"], "forget_probability": 0.2, "standard_error": {"model_utility": 0.02}}
    names = ["primal_dual", "primal_dual", "<script>alert('x')</script> with a name of the longest kind, no end_of_it"]
    runs = [Results.from_dict(values) for values in (full, other, {**other, "forget_quality": 1e-9})]
    return {
        "plain": write_text(folder / "plain.html", plain_page),
        "attacked": write_text(folder / "attacked.html", attacked_page),
        "compared": write_comparison(folder, compare(runs, names))[-1],
    }


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, DESK], ids=["phone", "desk"])
@pytest.mark.parametrize("name", list(FIGURES))
def test_the_page_shows_every_figure_and_asks_for_nothing(
    browser: Browser, pages: dict[str, Path], name: str, width: int, dark: bool
) -> None:
    browser.open(pages[name], width=width, dark=dark)
    seen = browser.evaluate(LOOK)
    assert browser.errors == []
    assert browser.requests == [pages[name].resolve().as_uri()]
    assert seen["view"] == width
    assert seen["width"] <= width, "the page is wider than the screen"
    assert seen["cut"] == [], "text is cut off at the right"
    assert seen["squeezed"] == [], "text has no room"
    assert seen["torn"] == [], "a word or a number is torn apart"
    assert len(seen["figures"]) == FIGURES[name]
    for figure in seen["figures"]:
        assert figure["width"] > 200, figure
        assert figure["height"] > 100, figure
        assert figure["drawn"] > 10, figure
        assert figure["said"] > 3, figure
        assert len(figure["label"]) > 3, figure
        assert figure["title"], figure
    assert seen["foreign"] == 0
    assert "<script>alert('x')</script>" in seen["text"]
    assert (seen["ground"] == "rgb(255, 255, 255)") is not dark
    assert (seen["plot"].strip() == "#e8edf2") is dark


def test_without_a_browser_a_person_skips_and_ci_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CHROMIUM", raising=False)
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no Chromium was found"):
        chromium()
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="no Chromium was found"):
        chromium()


def test_the_browser_sees_what_would_be_wrong(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "wrong.html"
    page.write_text(
        "<!doctype html><meta name=viewport content='width=device-width'><figure><h3>x</h3></figure>"
        "<p style='width:900px'>wide</p><table><td style='max-width:9px;overflow-wrap:anywhere'>letters</table><table><th style='display:block;width:30px;overflow-wrap:anywhere'>primal_dual</table><img src='https://evil.example/a.png'><script>console.error('oh'); nope()</script>"
    )
    browser.open(page, width=PHONE)
    seen = browser.evaluate(LOOK)
    assert any("oh" in error for error in browser.errors)
    assert any("nope" in error for error in browser.errors)
    assert "https://evil.example/a.png" in browser.requests
    assert seen["width"] > PHONE
    assert seen["cut"] == ["wide"]
    assert "letters" in seen["squeezed"]
    assert "primal" in seen["torn"]
    assert seen["foreign"] == 2
    assert seen["figures"][0]["drawn"] == 0
