"""Keys, pointer, slider, lists, downloads and links."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import matplotlib.image
import numpy as np
import pytest
from numpy.typing import NDArray

from tests.browser import example_run
from tests.browser.conftest import OpenPage

START = "#text=held-out+1&step=200&head=L0H1&query=5&score=induction"
KEYS = {
    "ArrowRight": "query=6",
    "ArrowLeft": "query=5",
    "]": "step=400",
    "[": "step=200",
    "l": "head=L0H2",
    "h": "head=L0H1",
    "Home": "query=0",
    "End": "query=15",
    "v": "value_weighted=1",
    "c": "compare=100",
    "t": "theme=dark",
    "Enter": "pinned=1",
}


def test_keys(page_path: Path, open_page: OpenPage) -> None:
    view = open_page(page_path, START, color_scheme="light")
    for key, expected in KEYS.items():
        view.press(key, expected)
    for key, flag in (("v", "value_weighted"), ("c", "compare"), ("Escape", "pinned"), ("ArrowUp", "query=15")):
        view.page.keyboard.press(key)
        view.page.wait_for_selector(f'html:not([data-drawn*="{flag}"])', state="attached")
    for key, query in (("Home", 0), ("ArrowLeft", 0), ("End", 15), ("ArrowRight", 15)):
        view.press(key, f"query={query}")
    view.page.keyboard.press("?")
    assert view.page.locator("#help").is_visible() and "Escape" in view.text("#help")
    view.page.keyboard.press("Escape")
    assert not view.page.locator("#help").is_visible()


def test_hover_and_pin(page_path: Path, open_page: OpenPage) -> None:
    view = open_page(page_path, START)
    view.page.locator("#token-7").hover()
    view.wait_for("query=7")
    view.page.locator("#token-9").click()
    view.wait_for("query=9", "pinned=1")
    view.page.locator("#token-3").hover()
    view.wait_for("query=9", "key=3")
    assert view.page.locator("#text .tok[data-percent]").count() >= 1


def test_step_slider_and_text_list(page_path: Path, open_page: OpenPage) -> None:
    view = open_page(page_path, "#text=held-out+1&step=100&head=L1H2&query=9&score=induction")
    shown = [(view.attention(), view.grid().tolist(), view.cell_colours().tolist(), view.text("#timeline-readout"))]
    view.page.locator("#step").fill("2")
    view.wait_for("step=400")
    shown.append((view.attention(), view.grid().tolist(), view.cell_colours().tolist(), view.text("#timeline-readout")))
    assert all(before != after for before, after in zip(*shown, strict=True))
    assert view.text("#step-number") == "400"
    assert view.page.locator("#text-choice option").all_inner_texts() == ["sample", "held-out 1", "pronoun 1"]
    view.page.select_option("#text-choice", "2")
    view.wait_for("text=pronoun+1")
    assert view.page.locator("#text .tok").count() == 8


def test_first_view_and_findings(page_path: Path, open_page: OpenPage) -> None:
    view = open_page(page_path)
    assert view.text("#headline") == example_run.FINDINGS["headline"]
    view.wait_for("text=sample", "step=400", "head=L1H2", "score=antecedent.pronoun")
    for part in ("#disclaimer", "#text", "#attends-to", "#predictions", "#matrix", "#grid", "#ablation", "#timeline"):
        box = view.page.locator(part).bounding_box()
        assert box and box["y"] + box["height"] <= 800, f"{part} is below the window"
    view.press("h", "head=L1H1")
    view.page.locator("#findings button").first.click()
    view.wait_for("text=pronoun+1", "head=L1H2", "query=7", "score=antecedent.pronoun")


def test_link_restores_the_view(page_path: Path, open_page: OpenPage) -> None:
    view = open_page(page_path, START)
    for key in ("v", "]", "c", "Enter", "t"):
        view.page.keyboard.press(key)
    view.wait_for("value_weighted=1", "step=400", "compare=100", "pinned=1", "theme=")
    link, attention = view.attribute("data-drawn"), view.attention()
    view.page.wait_for_timeout(600)
    assert view.page.evaluate("location.hash") == link
    again = open_page(page_path, link)
    assert again.attribute("data-drawn") == link and again.attention() == attention


BROKEN_LINKS = [
    "#text=none&step=7&head=L9H9&query=99&score=x&compare=y&theme=z", "#head=L1H", "#query=-1", "#query=1e9", "#key=5",
    "#step=__proto__&score=constructor&text=__proto__", "#%ff%00", "##", "#head=L01H0000&key=9999999999",
]  # fmt: skip


def test_broken_links_are_ignored(page_path: Path, open_page: OpenPage) -> None:
    for link in BROKEN_LINKS:
        view = open_page(page_path, link)
        view.wait_for("text=sample", "step=400")
        assert view.attention(), link


def test_comparison_of_two_steps_and_of_two_runs(page_path: Path, two_runs_path: Path, open_page: OpenPage) -> None:
    def row(step: int, seed: int) -> NDArray[np.float64]:
        return example_run.files(seed=seed)[step].texts[1].pattern(1)[0, 1, 9].astype(np.float64)

    selected = "#text=held-out+1&step=400&head=L1H1&query=9&score=induction"
    steps = open_page(page_path, selected + "&compare=100")
    runs = open_page(two_runs_path, selected + "&compare=run")
    for view, difference in ((steps, row(2, 0) - row(0, 0)), (runs, row(2, 0) - row(2, 50))):
        attention = view.attention()
        assert len(attention) == 5
        assert attention == pytest.approx({key: difference[key] for key in attention}, abs=1e-6)
    scores = [file.scores["induction"].ravel() for file in example_run.files()]
    assert steps.grid() == pytest.approx(scores[2] - scores[0], abs=1e-4)
    assert steps.text("#scale-low") == "\N{MINUS SIGN}1" and "dashed: second" in runs.text("#timeline-readout")


def test_downloads(page_path: Path, open_page: OpenPage, tmp_path: Path) -> None:
    view = open_page(page_path, START)
    with view.page.expect_download() as download:
        view.page.keyboard.press("d")
    assert download.value.suggested_filename == "L0H1-200-held-out-1.png"
    download.value.save_as(tmp_path / "matrix.png")
    image = matplotlib.image.imread(tmp_path / "matrix.png")
    colours = (image[::9, ::9, :3] * 255).astype(np.uint32) @ np.array([1, 256, 65536], dtype=np.uint32)
    assert image.shape[0] > 1000 and len(np.unique(colours)) > 20
    with view.page.expect_download() as download:
        view.page.locator("#svg").click()
    download.value.save_as(tmp_path / "matrix.svg")
    svg = ElementTree.parse(tmp_path / "matrix.svg").getroot()
    texts = {"".join(node.itertext()) for node in svg.iter("{http://www.w3.org/2000/svg}text")}
    assert {"key (column)", "query (row)", "·fox"} <= texts
    squares = sum(path.get("d", "").count("M") for path in svg.iter("{http://www.w3.org/2000/svg}path"))
    assert squares > 100
