"""Every key and every control does what it says, and a link brings the same view back."""

from __future__ import annotations

from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from tests.browser import made
from tests.browser.conftest import Opener

START = "#text=held-out+1&step=200&head=L0H1&query=5&score=induction"
KEYS = [
    ("ArrowRight", "query=6"),
    ("ArrowLeft", "query=4"),
    ("Home", "query=0"),
    ("End", "query=15"),
    ("]", "step=400"),
    ("[", "step=100"),
    ("l", "head=L0H2"),
    ("h", "head=L0H0"),
    ("v", "weigh=1"),
    ("c", "against=100"),
    ("t", "theme=dark"),
    ("Enter", "pinned=1"),
]


@pytest.mark.parametrize("key, outcome", KEYS)
def test_keys(key: str, outcome: str, built: Path, opened: Opener) -> None:
    opened(built, START, color_scheme="light").press(key, outcome)


def test_keys_turn_off_what_they_turned_on(built: Path, opened: Opener) -> None:
    view = opened(built, START)
    for key, flag in (("v", "weigh"), ("c", "against")):
        view.press(key, flag)
        view.page.keyboard.press(key)
        view.page.wait_for_selector(f'html:not([data-drawn*="{flag}"])', state="attached")
    view.press("Enter", "pinned=1")
    view.page.keyboard.press("Escape")
    view.page.wait_for_selector('html:not([data-drawn*="pinned"])', state="attached")


def test_arrows_stop_at_the_ends(built: Path, opened: Opener) -> None:
    view = opened(built, START)
    view.press("Home", "query=0")
    view.press("ArrowLeft", "query=0")
    view.press("End", "query=15")
    view.press("ArrowRight", "query=15")


def test_up_and_down_go_by_lines(built: Path, opened: Opener) -> None:
    view = opened(built, START)
    view.press("End", "query=15")
    view.page.keyboard.press("ArrowUp")
    view.page.wait_for_selector('html:not([data-drawn*="query=15"])', state="attached")


def test_arrows_in_the_grid_choose_a_head(built: Path, opened: Opener) -> None:
    view = opened(built, START)
    view.page.locator('#grid td[tabindex="0"]').focus()
    view.press("ArrowDown", "head=L1H1", "query=5")
    view.press("ArrowRight", "head=L1H2")
    view.press("ArrowRight", "head=L1H2")
    assert view.page.evaluate("document.activeElement.dataset.head") == "2"


def test_arrows_in_the_matrix_choose_query_and_key(built: Path, opened: Opener) -> None:
    view = opened(built, START + "&key=3")
    view.page.locator("#matrix").focus()
    view.press("ArrowRight", "key=4", "query=5")
    view.press("ArrowDown", "query=6")


def test_fields_keep_their_own_keys(built: Path, opened: Opener) -> None:
    view = opened(built, START)
    view.page.locator("#step").focus()
    view.press("ArrowRight", "step=400", "query=5")


def test_help(built: Path, opened: Opener) -> None:
    view = opened(built, START)
    view.page.keyboard.press("?")
    assert view.page.locator("#help").is_visible() and "Escape" in view.text("#help")
    view.page.keyboard.press("Escape")
    assert not view.page.locator("#help").is_visible()


def test_hovering_reads_and_pinning_holds(built: Path, opened: Opener) -> None:
    view = opened(built, START)
    view.page.locator("#token-7").hover()
    view.shows("query=7")
    view.page.locator("#token-9").click()
    view.shows("query=9", "pinned=1")
    view.page.locator("#token-3").hover()
    view.shows("query=9", "key=3")
    lit = view.page.locator("#text .tok[data-share]").count()
    assert lit >= 1, "the strongest readings are said above their tokens"


def test_the_slider_moves_text_grid_and_matrix(built: Path, opened: Opener) -> None:
    view = opened(built, "#text=held-out+1&step=100&head=L1H2&query=9&score=induction")
    before = view.readings(), view.grid().tolist(), view.pixels().tolist(), view.text("#timeline-readout")
    view.page.locator("#step").fill("2")
    view.shows("step=400")
    after = view.readings(), view.grid().tolist(), view.pixels().tolist(), view.text("#timeline-readout")
    assert all(a != b for a, b in zip(before, after, strict=True))
    assert view.text("#step-number") == "400"


def test_texts_are_chosen(built: Path, opened: Opener) -> None:
    view = opened(built, START)
    assert view.page.locator("#text-choice option").all_inner_texts() == ["sample", "held-out 1", "pronoun 1"]
    view.page.select_option("#text-choice", "2")
    view.shows("text=pronoun+1")
    assert view.page.locator("#text .tok").count() == 8


def test_the_first_view_needs_no_click(built: Path, opened: Opener) -> None:
    view = opened(built)
    assert view.text("#headline") == made.CLAIMS["headline"]
    assert "Weights show what is read, not why." in view.text("#disclaimer")
    view.shows("text=sample", "step=400", "head=L1H2", "score=reads.pronoun")
    for part in ("#text", "#readings", "#likely", "#matrix", "#grid", "#effect", "#timeline"):
        box = view.page.locator(part).bounding_box()
        assert box and box["y"] + box["height"] <= 800, f"{part} is out of sight"


def test_a_claim_leads_to_its_head(built: Path, opened: Opener) -> None:
    view = opened(built, START)
    view.page.locator("#claims button").first.click()
    view.shows("text=pronoun+1", "head=L1H2", "query=7", "score=reads.pronoun")


def test_a_link_brings_the_view_back(built: Path, opened: Opener) -> None:
    view = opened(built, START)
    for key in ("v", "]", "c", "Enter", "t"):
        view.page.keyboard.press(key)
    view.shows("weigh=1", "step=400", "against=100", "pinned=1", "theme=")
    link, readings = view.attribute("data-drawn"), view.readings()
    view.page.wait_for_timeout(600)
    assert view.page.evaluate("location.hash") == link
    again = opened(built, link)
    assert again.attribute("data-drawn") == link and again.readings() == readings


@pytest.mark.parametrize(
    "link",
    ["#text=none&step=7&head=L9H9&query=99&score=x&against=y&theme=z", "#head=L1H", "#query=-1", "#query=1e9",
     "#step=__proto__&score=constructor&text=__proto__", "#%ff%00", "#key=5", "##", "#head=L01H0000&key=9999999999"],
)  # fmt: skip
def test_a_broken_link_is_passed_over(link: str, built: Path, opened: Opener) -> None:
    view = opened(built, link)
    view.shows("text=sample", "step=400")
    assert view.readings()


def test_compared_with_itself_everything_is_zero(built: Path, opened: Opener) -> None:
    view = opened(built, "#text=held-out+1&step=200&head=L1H1&query=9&against=200&score=distance&weigh=1")
    assert view.readings() == {} and "no difference" in view.text("#readings")
    assert not view.grid().any()
    cells = view.pixels()[np.tril_indices(16)].astype(int)
    assert (np.abs(cells[:, :3] - 247).max(axis=1) <= 4).mean() > 0.8, "all but the frame is the middle of the scale"
    view.page.mouse.move(*view.point(12, 4))
    assert "±0.00 points" in view.text("#matrix-readout")


def test_two_steps_are_subtracted(built: Path, opened: Opener) -> None:
    view = opened(built, "#text=held-out+1&step=400&head=L1H1&query=9&against=100&score=induction")
    a, b = (made.dumps()[k].texts[1].pattern(1)[0, 1, 9].astype(np.float64) for k in (2, 0))
    for key, value in view.readings().items():
        assert value == pytest.approx((a - b)[key], abs=1e-6)
    scores = [made.dumps()[k].scores["induction"].ravel() for k in (2, 0)]
    assert view.grid() == pytest.approx(scores[0] - scores[1], abs=1e-4)
    assert (view.text("#scale-low"), view.text("#scale-high")) == ("\N{MINUS SIGN}1", "1")


def test_two_runs_are_subtracted(pair: Path, opened: Opener) -> None:
    view = opened(pair, "#text=held-out+1&step=200&head=L0H2&query=9&against=other")
    a, b = (made.dumps(seed=seed)[1].texts[1].pattern(0)[0, 2, 9].astype(np.float64) for seed in (0, 50))
    readings = view.readings()
    assert len(readings) == 5
    for key, value in readings.items():
        assert value == pytest.approx((a - b)[key], abs=1e-6)


def test_texts_of_other_tokens_are_not_subtracted(built: Path, opened: Opener) -> None:
    view = opened(built, "#text=sample&step=400&against=100&query=5")
    assert "other tokens" in view.text("#message")
    assert all(value > 0 for value in view.readings().values()), "weights are shown instead"


def test_png(built: Path, opened: Opener, tmp_path: Path) -> None:
    view = opened(built, START)
    with view.page.expect_download() as download:
        view.page.keyboard.press("d")
    download.value.save_as(tmp_path / "matrix.png")
    assert download.value.suggested_filename == "L0H1-200-held-out-1.png"
    image = matplotlib.image.imread(tmp_path / "matrix.png")
    colours = (image[::9, ::9, :3] * 255).astype(np.uint32) @ np.array([1, 256, 65536], dtype=np.uint32)
    assert image.shape[0] > 1000 and len(np.unique(colours)) > 20


def test_svg(built: Path, opened: Opener, tmp_path: Path) -> None:
    from xml.etree import ElementTree

    view = opened(built, START)
    with view.page.expect_download() as download:
        view.page.locator("#svg").click()
    download.value.save_as(tmp_path / "matrix.svg")
    root = ElementTree.parse(tmp_path / "matrix.svg").getroot()
    space = "{http://www.w3.org/2000/svg}"
    texts = ["".join(node.itertext()) for node in root.iter(f"{space}text")]
    assert {"key (column): what is read", "query (row): what reads", "·fox"} <= set(texts)
    assert len(list(root.iter(f"{space}rect"))) > 60
