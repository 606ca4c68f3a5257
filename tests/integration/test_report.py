"""The report as people see it: in a real Chromium, on a desk and on a phone, in light and in dark, and on paper."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from orchestrator.record.goodput import account
from orchestrator.record.report import Report, to_html
from orchestrator.record.report.build import build
from orchestrator.record.report.model import Against, Facts
from orchestrator.release.bootstrap import Interval
from tests import record_examples as examples
from tests.needed import lacks

FACTS = Facts(
    dataset={
        "source": "s3://corpora/python/**/*.py", "num_files": 1874, "num_bytes": 38_400_000,
        "train_tokens": 11_200_000, "eval_tokens": 1_204_224, "vocabulary": 8192,
    },
    against=Against(
        name="code-lm@3",
        figures={"loss": 2.4, "perplexity": 11.02, "bits_per_byte": 0.9},
        same_split=True,
        loss=2.341,
        interval=Interval(difference=-0.0283, low=-0.0341, high=-0.0226),
    ),
)  # fmt: skip
WIDTHS = {"desk": 1280, "phone": 360}
LEAST_CONTRAST, LEAST_CONTRAST_LARGE = 4.5, 3.0
"""WCAG 2.2, 1.4.3 (AA). Text is large from 24 px on, or from 18.66 px where it is bold."""

# Each text's colour against the nearest background behind it that is not transparent, by WCAG's relative luminance.
CONTRASTS = """() => {
  const rgba = text => { const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number); return [r, g, b, a]; };
  const luminance = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const over = (top, below) => top.slice(0, 3).map((v, i) => v * top[3] + below[i] * (1 - top[3]));
  const behind = element => {
    const layers = [];
    for (let at = element; at; at = at.parentElement) {
      const color = rgba(getComputedStyle(at).backgroundColor);
      layers.push(color);
      if (color[3] === 1) break;
    }
    return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255]);
  };
  const found = [];
  for (const element of document.querySelectorAll('body *')) {
    const own = [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
    if (!own || element.closest('svg, .unseen') || !element.getClientRects().length) continue;
    const style = getComputedStyle(element), size = parseFloat(style.fontSize);
    const [a, b] = [luminance(rgba(style.color)), luminance(behind(element))];
    const large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
    found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), large, element.textContent.trim().slice(0, 40)]);
  }
  return found;
}"""
# What stands out of the page at its sides, but for what scrolls by itself.
STANDING_OUT = """() => [...document.querySelectorAll('body *')]
  .filter(element => !element.closest('.wide, .unseen, pre'))
  .filter(element => { const box = element.getBoundingClientRect();
    return box.width && (box.right > document.documentElement.clientWidth + 0.5 || box.left < -0.5); })
  .map(element => element.outerHTML.slice(0, 120))"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        lacks("Chromium", "apt-get install chromium")
    with sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield started
        started.close()


@dataclass
class Look:
    """A page, and what the browser said while it was loaded."""

    page: Page
    console: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


def report_of(story: str) -> Report:
    record = examples.STORIES[story]()
    return build(record, account(record), FACTS if story not in ("waiting", "begun", "failed") else None)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("report")

    def written(story: str) -> Path:
        path = folder / f"{story}.html"
        if not path.exists():
            path.write_text(to_html(report_of(story)), encoding="utf-8")
        return path

    return written


@pytest.fixture
def look(browser: Browser, pages: Callable[[str], Path], tmp_path: Path) -> Iterator[Callable[..., Look]]:
    """Opens a story's page, and leaves a picture of it in the test's folder."""
    contexts: list[Any] = []

    def opened(story: str, *, width: int = 1280, scheme: str = "light") -> Look:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        found = Look(context.new_page())
        found.page.on("console", lambda message: found.console.append(message.text))
        found.page.on("pageerror", lambda error: found.console.append(str(error)))
        found.page.on("dialog", lambda dialog: found.console.append(dialog.message))
        found.page.on("request", lambda request: found.requests.append(request.url))
        found.page.goto(pages(story).as_uri())
        found.page.screenshot(path=tmp_path / f"{story}-{width}-{scheme}.png", full_page=True)
        return found

    yield opened
    for context in contexts:
        context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("story", examples.STORIES)
def test_a_page(look: Callable[..., Look], story: str, width: int, scheme: str) -> None:
    seen = look(story, width=width, scheme=scheme)
    assert seen.console == []
    assert [url for url in seen.requests if not url.startswith("data:")] == [seen.page.url]
    assert seen.page.evaluate("document.documentElement.scrollWidth") <= width
    assert seen.page.evaluate(STANDING_OUT) == []
    contrasts = seen.page.evaluate(CONTRASTS)
    assert len(contrasts) > 30
    faint = [each for each in contrasts if each[0] < (LEAST_CONTRAST_LARGE if each[1] else LEAST_CONTRAST)]
    assert faint == []


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_the_curves_are_drawn(look: Callable[..., Look], width: int) -> None:
    page = look("whole", width=width).page
    for title in ("Loss by step", "Loss, from step 1,500 on", "Tokens per second over time"):
        chart = page.get_by_role("img", name=title)
        box = chart.bounding_box()
        assert box is not None
        assert box["width"] > 0.6 * width / (2 if title.startswith("Loss") and width > 700 else 1)
        assert box["height"] > 180
        line = chart.locator("path.line").first.bounding_box()
        assert line is not None
        assert line["width"] > 0.2 * box["width"]
    labels = page.locator(".axis span:visible")
    sizes = {labels.nth(index).evaluate("e => parseFloat(getComputedStyle(e).fontSize)") for index in range(8)}
    assert min(sizes) >= 12, "labels do not shrink with the chart"


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_labels_of_an_axis_do_not_lie_on_one_another(look: Callable[..., Look], width: int) -> None:
    page = look("whole", width=width).page
    for axis in page.locator(".axis.x").all():
        boxes = [box for label in axis.locator("span:visible").all() if (box := label.bounding_box())]
        for one, other in pairwise(boxes):
            assert one["x"] + one["width"] <= other["x"]


def test_nothing_in_a_hostile_page_runs(look: Callable[..., Look]) -> None:
    page = look("hostile").page
    assert page.locator("script, img, iframe, object").count() == 0
    assert page.locator("h1").inner_text().startswith("<script>alert(1)</script>")


def test_a_script_that_got_in_would_not_run(browser: Browser, pages: Callable[[str], Path], tmp_path: Path) -> None:
    text = pages("begun").read_text(encoding="utf-8")
    (tmp_path / "worse.html").write_text(text.replace("<main>", "<main><script>document.title = 'owned'</script>"))
    page = browser.new_page()
    page.goto((tmp_path / "worse.html").as_uri())
    assert page.title() == "code-lm-34c43bef: in flight"
    page.close()


def test_parts_are_told_without_colour(look: Callable[..., Look]) -> None:
    page = look("whole").page
    rows = page.locator("table.parts tbody th").all_inner_texts()
    assert [row.split("\n")[0].strip() for row in rows][:2] == ["computing", "evaluating"]
    assert "computing 8" in (
        page.get_by_role("img", name="Worker time by what it went to").get_attribute("aria-label") or ""
    )
    assert page.locator(".track").first.get_attribute("aria-label")


def test_it_prints_in_light(look: Callable[..., Look]) -> None:
    page = look("whole", scheme="dark").page
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.pdf(format="A4", print_background=True).startswith(b"%PDF")
