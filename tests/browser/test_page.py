"""The page is safe, accessible, and readable in light and dark and in narrow windows."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

import glassgpt
from inspection.attention_file import AttentionFile
from inspection.page_builder import PageRun, write_page
from tests.browser import example_run
from tests.browser.conftest import OpenPage

pytestmark = pytest.mark.browser
HASH = "#text=held-out+1&step=400&head=L1H1&query=9"
EVIL = "</script><script>window.hacked = 1</script>"


@pytest.fixture(scope="module")
def hostile_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "hostile.html"
    record = example_run.record(EVIL + "\x00", example_run.HOSTILE, 1, True)
    file = AttentionFile([record], {"step": "1"}, {EVIL: np.ones((2, 3), np.float32)})
    findings = {"headline": EVIL, "findings": [example_run.finding([1, 1], EVIL, 0.5, True, EVIL)]}
    write_page(path, [PageRun(EVIL, [file])], findings, None, f"</title>{EVIL}\x00")
    return path


def test_hostile_text_is_shown_as_text(hostile_path: Path, open_page: OpenPage) -> None:
    view = open_page(hostile_path)
    page = view.page
    assert page.locator("script:not([type])").count() == 1 and page.locator("img").count() == 0
    shown = page.locator("#text .tok").all_text_contents()
    assert len(shown) == len(example_run.HOSTILE) and shown[1] == example_run.HOSTILE[1].decode()
    expected = {0: "<end>", 8: "\\x00", 10: "\\u2028", 11: "\\xf0\\x9f", 13: "😀", 16: "\\u202e", 17: "↵"}
    assert {k: shown[k] for k in expected} == expected
    assert view.text("#headline").startswith("</script>") and "\\x00" in page.title()
    view.open_walkthrough()
    with page.expect_download() as download:
        page.keyboard.press("d")
    assert not list(ElementTree.parse(download.value.path()).getroot().iter("script"))
    assert page.evaluate("window.hacked") is None


def test_policy_blocks_other_scripts_and_requests(page_path: Path, open_page: OpenPage) -> None:
    view = open_page(page_path)
    view.page.evaluate("document.body.append(create('script', {}, 'window.hacked = 1'))")
    view.page.evaluate("create('div', { onclick: 'window.hacked = 1' }).click()")
    view.page.evaluate("() => { fetch('https://example.org/').catch(() => 0); }")
    assert view.page.evaluate("window.hacked") is None
    view.page.wait_for_timeout(100)
    assert len(view.errors) >= 3 and all("Content Security Policy" in error for error in view.errors)
    view.errors.clear()


def test_narrow_windows(page_path: Path, hostile_path: Path, open_page: OpenPage) -> None:
    """No horizontal scrolling, and neither a token nor a formula is broken or cut off."""
    rects = "tokens => tokens.map(token => token.getClientRects().length)"
    for width in (360, 700, 1000):
        for path, link in ((page_path, HASH + "&value_weighted=1&compare=100"), (hostile_path, "")):
            view = open_page(path, link, width=width)
            view.open_walkthrough()
            assert view.page.evaluate("document.documentElement.scrollWidth") <= width
            assert set(view.page.locator(".tok, .token").evaluate_all(rects)) == {1}
            assert view.page.locator("#score-description").evaluate("e => e.scrollHeight - e.clientHeight") <= 1


CONTRAST = """() => { const parse = (c) => c.match(/[\\d.]+/g).map(Number);
const luminance = ([r, g, b]) => [r, g, b]
  .map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((s, v, k) => s + v * [0.2126, 0.7152, 0.0722][k], 0);
const over = (top, below) => { const a = top[3] ?? 1; return [0, 1, 2].map((k) => top[k] * a + below[k] * (1 - a)); };
const background = (e) => { const own = parse(getComputedStyle(e).backgroundColor);
  return (own[3] ?? 1) === 1 ? own : over(own, e.parentElement ? background(e.parentElement) : [255, 255, 255]); };
return [...document.querySelectorAll("body *")].filter((e) => e.checkVisibility() && e.closest("option,svg") === null &&
  [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim())).map((e) => {
    const below = background(e); const style = getComputedStyle(e); const ink = parse(style.color);
    ink[3] = (ink[3] ?? 1) * style.opacity;
    const [a, b] = [luminance(over(ink, below)), luminance(below)].sort((x, y) => y - x);
    return [(a + 0.05) / (b + 0.05), e.id || e.className || e.tagName, e.textContent.slice(0, 30)]; }); }"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("more", ["", "&compare=100"])
def test_contrast_in_light_and_dark(scheme: str, more: str, page_path: Path, open_page: OpenPage) -> None:
    view = open_page(page_path, HASH + more, color_scheme=scheme)
    background = view.page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")
    view.open_walkthrough()
    ratios = view.page.evaluate(CONTRAST)
    assert len(ratios) > 150
    assert not [row for row in ratios if row[0] < 4.5], "WCAG 2.2, 1.4.3, level AA"


def test_screen_reader(page_path: Path, open_page: OpenPage) -> None:
    page = open_page(page_path, "#text=held-out+1&step=400&head=L1H1&query=7").page
    row = example_run.files()[2].texts[1].pattern(1)[0, 1, 7]
    word = example_run.WORDS[row.argmax()].decode().strip() or "<end>"
    sentence = f"She attends to {word} {100 * row.max():.1f}\u00a0%"
    page.locator("#live[aria-live=polite]", has_text=sentence).wait_for(state="attached", timeout=3000)
    assert page.locator("#text").get_attribute("aria-activedescendant") == "token-7"
    assert page.locator("#text [aria-selected=true]").count() == 1
    assert page.locator("#grid [aria-selected=true]").get_attribute("aria-label").startswith("L1H1, ")
    assert page.get_by_role("slider", name="Step").get_attribute("aria-valuetext") == "step 400"
    roles = {"listbox": "text", "grid": "a score", "checkbox": "Value-weighted", "combobox": "Compare with"}
    assert all(page.get_by_role(role, name=name).count() == 1 for role, name in roles.items())


def test_page_without_scores_and_ablation(open_page: OpenPage, tmp_path: Path) -> None:
    text = example_run.record("a line", example_run.WORDS, 3, False)
    write_page(tmp_path / "page.html", [PageRun("run", [AttentionFile([text], {})])], None, None, "a line")
    view = open_page(tmp_path / "page.html")
    largest = text.pattern()[:, :, 1:].max(axis=-1)
    assert view.grid() == pytest.approx(largest.mean(axis=-1).ravel(), abs=1e-3)
    assert "not measured" in view.text("#ablation")


def test_page_in_a_notebook(browser: Any, page_path: Path, tmp_path: Path) -> None:
    """It draws in the sandboxed frame without an error, and cannot reach the notebook."""
    frame = glassgpt.Run._repr_html_(SimpleNamespace(folder=page_path.parent))  # type: ignore[arg-type]
    (tmp_path / "notebook.html").write_text(frame, encoding="utf-8")
    page, errors = browser.new_page(), list[str]()
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto((tmp_path / "notebook.html").as_uri())
    frame = page.frames[1]
    frame.wait_for_selector("html[data-ready]", timeout=20_000, state="attached")
    page.wait_for_timeout(600)  # the address of a page changes after 400 ms
    reached = frame.evaluate("() => { try { return parent.document.title; } catch { return null; } }")
    assert not errors and reached is None
    page.close()
