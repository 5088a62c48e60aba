"""The page is safe, reachable, readable in light and dark and on a narrow window, and quick."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inspection.attention_file import AttentionFile, AttentionRecord
from inspection.page_builder import PageRun, write_page
from tests.browser import made
from tests.browser.conftest import Opener

LINK = "#text=held-out+1&step=400&head=L1H1&query=9"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "hostile.html"
    evil = "</script><script>window.hurt = 1</script>"
    dump = AttentionFile([made.text(evil, made.HOSTILE, 1, True)], {"step": "1"}, {evil: np.ones((2, 3), np.float32)})
    claim = {"head": [1, 1], "score": evil, "weight": "x", "text": evil}
    broken = [{"head": "x"}, {"head": [9, 9]}, {"head": [0, 0], "others": 3}, {"head": [0, 0], "others": [None]}]
    broken += [3, None, claim]
    evidence = {"measures": {"corpus": {"unit": evil, "zero": "x", "mean": [[evil]]}}}
    write_page(path, [PageRun(evil, [dump])], {"headline": evil, "findings": broken}, evidence, f"</title>{evil}\x00")
    return path


def test_hostile_tokens_and_names_are_shown_as_they_are(hostile: Path, opened: Opener) -> None:
    view = opened(hostile)
    page = view.page
    assert page.evaluate("window.hurt") is None
    assert page.locator("script:not([type])").count() == 1 and page.locator("img").count() == 0
    assert page.locator("#text .tok").count() == len(made.HOSTILE)
    shown = [text.strip("\n") for text in page.locator("#text .tok").evaluate_all("t => t.map(s => s.textContent)")]
    assert shown[0] == "<end>" and shown[1] == made.HOSTILE[1].decode() and shown[8] == "\\x00"
    assert shown[10] == "\\u2028" and shown[11] == "\\xf0\\x9f" and shown[13] == "😀" and shown[16] == "\\u202e"
    assert view.text("#headline").startswith("</script>") and "\\x00" in page.title()
    for key in ["ArrowRight"] * 12 + ["v", "c", "l"]:
        page.keyboard.press(key)
    page.locator("#how").scroll_into_view_if_needed()
    page.wait_for_selector("#step-agreement")
    assert page.evaluate("window.hurt") is None


def test_hostile_tokens_in_a_drawing(hostile: Path, opened: Opener, tmp_path: Path) -> None:
    from xml.etree import ElementTree

    view = opened(hostile)
    with view.page.expect_download() as download:
        view.page.keyboard.press("s")
    download.value.save_as(tmp_path / "matrix.svg")
    assert not list(ElementTree.parse(tmp_path / "matrix.svg").getroot().iter("script"))


def test_the_policy_lets_no_other_script_run(built: Path, opened: Opener) -> None:
    view = opened(built)
    view.page.evaluate(
        """() => { const s = document.createElement("script"); s.textContent = "window.hurt = 1";
        const d = document.createElement("div"); d.setAttribute("onclick", "window.hurt = 1");
        document.body.append(s, d); d.click();
        fetch("https://example.org/").catch(() => 0); }"""
    )
    assert view.page.evaluate("window.hurt") is None
    view.page.wait_for_timeout(100)
    assert len(view.troubles) >= 3 and all("Content Security Policy" in trouble for trouble in view.troubles)
    view.troubles.clear()


@pytest.mark.parametrize("width", [360, 400, 700, 1000])
def test_a_narrow_window_needs_no_scrolling_sideways(width: int, built: Path, hostile: Path, opened: Opener) -> None:
    for path, link in ((built, LINK + "&weigh=1&against=100"), (hostile, "")):
        view = opened(path, link, width=width)
        view.page.locator("#how").scroll_into_view_if_needed()
        view.page.wait_for_selector("#step-agreement")
        assert view.page.evaluate("document.documentElement.scrollWidth") <= width


CONTRAST = """() => { const parse = (c) => c.match(/[\\d.]+/g).map(Number);
const lum = ([r, g, b]) => [r, g, b].map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((s, v, k) => s + v * [0.2126, 0.7152, 0.0722][k], 0);
const over = (top, below) => { const a = top[3] ?? 1; return [0, 1, 2].map((k) => top[k] * a + below[k] * (1 - a)); };
const ground = (e) => { const own = parse(getComputedStyle(e).backgroundColor);
  return (own[3] ?? 1) === 1 ? own : over(own, e.parentElement ? ground(e.parentElement) : [255, 255, 255]); };
return [...document.querySelectorAll("body *")].filter((e) => e.checkVisibility() && e.closest("option,svg") === null &&
  [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim())).map((e) => {
    const below = ground(e); const style = getComputedStyle(e); const ink = parse(style.color);
    ink[3] = (ink[3] ?? 1) * style.opacity;
    const [a, b] = [lum(over(ink, below)), lum(below)].sort((x, y) => y - x);
    return [(a + 0.05) / (b + 0.05), e.id || e.className || e.tagName, e.textContent.slice(0, 30)]; }); }"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("more", ["", "&against=100"])
def test_text_has_enough_contrast(scheme: str, more: str, built: Path, opened: Opener) -> None:
    view = opened(built, LINK + more, color_scheme=scheme)
    view.page.locator("#how").scroll_into_view_if_needed()
    view.page.wait_for_selector("#step-agreement")
    view.page.wait_for_timeout(150)
    found = view.page.evaluate(CONTRAST)
    assert len(found) > 150
    assert not [row for row in found if row[0] < 4.5], "WCAG 2.2, 1.4.3, level AA"


def test_light_dark_and_the_switch_between(built: Path, opened: Opener) -> None:
    ground = "getComputedStyle(document.documentElement).backgroundColor"
    light, dark = (opened(built, LINK, color_scheme=scheme) for scheme in ("light", "dark"))
    assert light.page.evaluate(ground) == "rgb(255, 255, 255)" != dark.page.evaluate(ground)
    before = light.pixels().tolist()
    light.page.locator("#theme").click()
    light.shows("theme=dark")
    assert light.page.evaluate(ground) == dark.page.evaluate(ground)
    assert light.pixels().tolist() != before, "the hatching goes with the theme"


def test_reduced_motion(built: Path, opened: Opener) -> None:
    durations = "getComputedStyle(document.querySelector('.tok')).transitionDuration"
    still, moving = (opened(built, LINK, reduced_motion=wish) for wish in ("reduce", "no-preference"))
    assert still.page.evaluate(durations) == "0s" != moving.page.evaluate(durations)


def test_what_a_screen_reader_hears(built: Path, opened: Opener) -> None:
    view = opened(built, "#text=held-out+1&step=400&head=L1H1&query=7")
    row = made.dumps()[2].texts[1].pattern(1)[0, 1, 7]
    key = int(row.argmax())
    words = made.WORDS[key].decode().strip() or "<end>"
    wanted = f"She reads {words} {100 * row[key]:.1f}\u00a0%"
    view.page.locator("#live", has_text=wanted).wait_for(state="attached", timeout=3000)
    page = view.page
    assert page.locator("#live").get_attribute("aria-live") == "polite"
    assert page.locator("#text").get_attribute("aria-activedescendant") == "token-7"
    assert page.locator("#text [aria-selected=true]").count() == 1
    assert page.locator("#grid [aria-selected=true]").get_attribute("aria-label").startswith("L1H1, ")
    assert page.get_by_role("listbox", name="the text").count() == 1
    assert page.get_by_role("grid").count() == 1 and page.get_by_role("gridcell").count() == 6
    assert page.get_by_role("slider", name="Step").get_attribute("aria-valuetext") == "step 400"
    assert page.get_by_role("checkbox", name="Value-weighted").count() == 1
    assert page.get_by_role("combobox", name="Compare with").count() == 1
    nameless = "e => e.filter(one => !one.textContent.trim() && !one.labels?.length).length"
    assert page.eval_on_selector_all("button, select, input", nameless) == 0


def test_a_page_without_scores_evidence_or_details(opened: Opener, tmp_path: Path) -> None:
    text = made.text("a line", made.WORDS, 3, False)
    bare = AttentionRecord("a line", text.tokens, text.token_bytes, text.loss, text.value_norms, text.pattern_tril)
    write_page(tmp_path / "bare.html", [PageRun("bare", [AttentionFile([bare], {})])], None, None, "a line")
    view = opened(tmp_path / "bare.html")
    packed = text.pattern()
    assert view.grid() == pytest.approx(packed[:, :, 1:].max(axis=-1).mean(axis=-1).ravel(), abs=1e-3)
    assert "not kept" in view.text("#likely") and "not measured" in view.text("#effect")


def test_one_token(opened: Opener, tmp_path: Path) -> None:
    one = made.text("one", [b"Mia"], 3, True)
    write_page(
        tmp_path / "one.html",
        [PageRun("one", [AttentionFile([one], {"step": "5"}, made.scores(1))])],
        None,
        None,
        "one",
    )
    view = opened(tmp_path / "one.html")
    assert view.readings() == {0: 1.0}
    for key in ("ArrowRight", "ArrowUp", "v", "c", "]", "End"):
        view.page.keyboard.press(key)
    assert view.readings() == {}


def test_a_large_model_is_drawn_in_time(opened: Opener, tmp_path: Path) -> None:
    """Bounds that only a mistake exceeds; what it really takes is measured elsewhere."""
    L, H, T = 12, 12, 512
    rows, columns = np.tril_indices(T)
    falling = np.exp(-0.02 * (rows - columns)) / np.cumsum(np.exp(-0.02 * np.arange(T)))[rows]
    packed = np.broadcast_to(falling.astype(np.float16), (L, H, len(rows)))
    words = [made.WORDS[1 + k % 8] for k in range(T)]
    args: tuple[Any, ...] = (np.ones(T - 1, np.float32), np.ones((L, H, T), np.float32), packed)
    text = AttentionRecord("long", np.arange(T, dtype=np.int32), words, *args)
    scores = {"entropy": np.linspace(0, 1, L * H, dtype=np.float32).reshape(L, H)}
    write_page(
        tmp_path / "large.html", [PageRun("large", [AttentionFile([text], {"step": "1"}, scores)])], None, None, "large"
    )
    view = opened(tmp_path / "large.html", "#query=300")
    assert float(view.attribute("data-ready")) < 10_000
    for _ in range(3):
        view.page.keyboard.press("ArrowRight")
    view.shows("query=303")
    assert float(view.attribute("data-redraw-ms")) < 500
