"""The report as a browser draws it: on a desktop, on a phone, in the dark, and on paper."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from phi3v.evaluation.report import write_report
from tests.browser import Browser, needs_chromium
from tests.evaluation.reports import FULL, evaluation, rate

pytestmark = [needs_chromium, pytest.mark.slow]

DESKTOP, PHONE, PAPER = 1280, 390, 717  # CSS pixels; A4 between its margins
LEAST_CONTRAST = 4.5  # of text, WCAG 2.1 level AA; of lines 3
STICKS_OUT = """[...document.querySelectorAll("body *")].filter(e => !e.closest("svg"))
  .filter(e => e.getBoundingClientRect().right > innerWidth + 0.5).map(e => e.outerHTML)"""
CONTRASTS = """(() => {
  document.querySelectorAll("details").forEach(e => e.open = true);
  const numbers = colour => colour.match(/[0-9.]+/g).map(Number);
  const light = colour => numbers(colour).slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, n) => sum + v * [0.2126, 0.7152, 0.0722][n], 0);
  const behind = e => {
    const colour = getComputedStyle(e).backgroundColor;
    return numbers(colour)[3] === 0 ? behind(e.parentElement) : colour; };
  const contrast = (e, colour) => {
    const [low, high] = [light(colour), light(behind(e))].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05); };
  const texts = [], words = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (words.nextNode()) {
    const e = words.currentNode.parentElement;
    if (!words.currentNode.data.trim() || e.localName == "title") continue;
    const style = getComputedStyle(e);
    const ink = e.closest("svg") ? style.fill : style.color;
    texts.push([contrast(e, ink), words.currentNode.data]); }
  const lines = [...document.querySelectorAll("polyline:not(.faint)")]
    .map(e => [contrast(e, getComputedStyle(e).stroke), e.className.baseVal]);
  return {texts, lines}; })()"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    long = replace(FULL.examples[0], prediction="x" * 300, id="y" * 300)
    write_report(path, replace(FULL, examples=[*FULL.examples, long], title="z" * 200))
    return path


@pytest.mark.parametrize("width", [DESKTOP, PHONE])
def test_nothing_sticks_out(browser: Browser, page: Path, width: int) -> None:
    browser.open(page, width)
    assert browser.run("document.documentElement.scrollWidth") == width
    assert browser.run(STICKS_OUT) == []


def test_every_picture_is_decoded_and_every_chart_has_its_size(
    browser: Browser, page: Path
) -> None:
    browser.open(page, PHONE)
    widths = browser.run("[...document.images].map(e => [e.naturalWidth, e.width])")
    assert widths == [[200, 160], [200, 160]]
    heights = browser.run(
        "[...document.querySelectorAll('figure > svg')].map(e => e.getBoundingClientRect().height)"
    )
    assert len(heights) == 12 and min(heights) > 100


def test_no_label_of_a_chart_is_cut_off_on_a_phone(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(path, replace(FULL, evaluations=[evaluation(n, 0.6 + n / 500) for n in (4, 8)]))
    browser.open(path, PHONE)
    cut = """[...document.querySelectorAll("figure > svg text")].filter(e => {
      const [text, whole] = [e, e.closest("svg")].map(e => e.getBoundingClientRect());
      return text.left < whole.left || text.right > whole.right; }).map(e => e.textContent)"""
    assert browser.run(cut) == []


def test_the_longest_score_and_its_number_of_rows_are_on_one_line(
    browser: Browser, tmp_path: Path
) -> None:
    scores = {name: rate(1.0, 1.0, 1.0, 1256) for name in ("anls", "blind_anls")}
    path = tmp_path / "report.html"
    write_report(path, replace(FULL, summary={"metrics": scores}))
    for width in (DESKTOP, PHONE):
        browser.open(path, width)
        heights = browser.run(
            "[...document.querySelectorAll('.metrics td')].map(e => e.clientHeight)"
        )
        assert max(heights) < 80 if width == DESKTOP else max(heights) < 40


@pytest.mark.parametrize("is_dark", [False, True], ids=["light", "dark"])
def test_text_and_lines_stand_out(browser: Browser, page: Path, is_dark: bool) -> None:
    browser.open(page, DESKTOP, is_dark)
    found = browser.run(CONTRASTS)
    assert len(found["texts"]) > 200 and len(found["lines"]) > 10
    assert [pair for pair in found["texts"] if pair[0] < LEAST_CONTRAST] == []
    assert [pair for pair in found["lines"] if pair[0] < 3] == []
    background = browser.run("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(20, 24, 29)" if is_dark else "rgb(255, 255, 255)")


def test_on_paper_the_recipe_is_unfolded_and_links_are_gone(browser: Browser, page: Path) -> None:
    browser.open(page, PAPER, is_dark=True, media="print")
    assert browser.run("document.documentElement.scrollWidth") == PAPER
    assert browser.run("document.querySelector('pre').checkVisibility()") is True
    assert browser.run("document.querySelector('nav').getBoundingClientRect().height") == 0
    assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    pages = re.findall(rb"/Type\s*/Page\b", browser.pdf())
    assert 3 <= len(pages) <= 9
