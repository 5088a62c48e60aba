"""Keys, pointer, slider, lists, downloads and links."""

import base64
import io
from pathlib import Path
from xml.etree import ElementTree

import matplotlib.image
import numpy as np
import pytest

from inspection.attention_file import AttentionFile
from inspection.page_builder import PageRun, write_page
from tests.browser import example_run
from tests.browser.conftest import OpenPage

pytestmark = pytest.mark.browser
START = "#text=held-out+1&step=200&head=L0H1&query=5&score=induction"
KEYS = {
    "body": "ArrowRight query=6, ArrowDown query=7, ArrowUp query=6, ArrowLeft query=5, ] step=400, [ step=200, Home query=0, "
    "ArrowLeft query=0, End query=15, ArrowRight query=15, v value_weighted=1, c compare=100, Enter pinned=1",
    "#grid [aria-selected=true]": "ArrowRight head=L0H2, ArrowDown head=L1H2, ArrowLeft head=L1H1, ArrowUp head=L0H1",
    "#matrix": "ArrowUp query=14, ArrowRight key=, ArrowDown query=15",
}


def test_keys(page_path: Path, open_page: OpenPage) -> None:
    view = open_page(page_path, START)
    for place, keys in KEYS.items():
        view.page.locator(place).focus()
        for key, expected in map(str.split, keys.split(", ")):
            view.press(key, expected)
    for key, flag in (("v", "value_weighted"), ("c", "compare"), ("Escape", "pinned")):
        view.page.keyboard.press(key)
        view.page.wait_for_selector(f'html:not([data-drawn*="{flag}"])', state="attached")
    view.page.keyboard.press("?")
    assert view.page.locator("#help").is_visible() and "Escape" in view.text("#help")
    view.page.keyboard.press("Escape")
    assert not view.page.locator("#help").is_visible()


def test_step_slider_and_lists(page_path: Path, open_page: OpenPage) -> None:
    view = open_page(page_path, "#text=held-out+1&head=L1H2&query=9&score=induction")
    for index, (step, file) in enumerate(zip(example_run.STEPS, example_run.files(), strict=True)):
        view.page.locator("#step").fill(str(index))
        view.wait_for(f"step={step}")
        row = file.texts[1].pattern(1)[0, 2, 9]
        assert view.attention() == pytest.approx({key: row[key] for key in view.attention()})
        for score in ("induction", "distance"):
            view.page.select_option("#score", score)
            view.wait_for(f"score={score}")
            assert view.grid() == pytest.approx(file.scores[score].ravel(), rel=1e-4)
            assert f"{file.scores[score][1, 2]:.3f}" in view.text("#head-score")
    view.page.locator("#timeline").click(position={"x": 40, "y": 40})
    view.wait_for("step=100")
    view.page.select_option("#text-choice", "2")
    view.wait_for("text=pronoun+1")
    assert view.page.locator("#text .tok").count() == 8


def test_chosen_token_is_scrolled_into_view(open_page: OpenPage, tmp_path: Path) -> None:
    text = example_run.record("a line", example_run.WORDS * 12, 3, False)
    write_page(tmp_path / "page.html", [PageRun("run", [AttentionFile([text], {})])], None, None, "a line")
    view = open_page(tmp_path / "page.html", "#query=2")
    x, y = view.point(150, 3)
    view.page.mouse.click(x, y)
    view.wait_for("query=150")
    box, token = (view.page.locator(each).bounding_box() for each in ("#text", "#token-150"))
    assert box and token and box["y"] <= token["y"] and token["y"] + token["height"] <= box["y"] + box["height"]


def test_first_view_and_findings(page_path: Path, open_page: OpenPage) -> None:
    view = open_page(page_path)
    assert view.text("#headline") == example_run.FINDINGS["headline"]
    view.wait_for("text=sample", "step=400", "head=L1H2", "score=antecedent.pronoun")
    for part in ("#disclaimer", "#text", "#attends-to", "#predictions", "#matrix", "#grid", "#ablation", "#timeline"):
        box = view.page.locator(part).bounding_box()
        assert box and box["y"] + box["height"] <= 800, f"{part} is below the window"
    view.page.locator("#findings button").first.click()
    view.wait_for("text=pronoun+1", "head=L1H2", "query=7", "score=antecedent.pronoun")


def test_link_restores_the_view(page_path: Path, open_page: OpenPage) -> None:
    view = open_page(page_path, START)
    for key in ("v", "]", "c", "Enter"):
        view.page.keyboard.press(key)
    view.wait_for("value_weighted=1", "step=400", "compare=100", "pinned=1")
    view.page.wait_for_timeout(600)
    link = view.page.evaluate("location.hash")
    again = open_page(page_path, link)
    again.wait_for(link)
    assert again.attention() == view.attention()


def test_broken_links_are_ignored(page_path: Path, open_page: OpenPage) -> None:
    invalid = "text=none&step=7&head=L9H9&query=99&score=x&compare=y"
    for link in (invalid, "head=L1H", "query=1e9", "key=5", "step=__proto__&score=constructor", "%ff%00", "#"):
        view = open_page(page_path, f"#{link}")
        view.wait_for("text=sample", "step=400")
        assert view.attention(), link


def test_comparison_of_two_steps_and_of_two_runs(open_page: OpenPage, tmp_path: Path) -> None:
    files, others = example_run.files(), example_run.files(seed=50)
    write_page(tmp_path / "two.html", [PageRun("first", files), PageRun("second", others)], None, None, "two runs")
    for compare, other in (("100", files[0]), ("run", others[2])):
        link = f"#text=held-out+1&step=400&head=L1H1&query=9&score=induction&compare={compare}"
        view = open_page(tmp_path / "two.html", link)
        row = (files[2].texts[1].pattern(1) - other.texts[1].pattern(1))[0, 1, 9]
        scores = files[2].scores["induction"] - other.scores["induction"]
        attention = view.attention()
        assert len(attention) == 5 and attention == pytest.approx({key: row[key] for key in attention}, abs=1e-6)
        assert view.grid() == pytest.approx(scores.ravel(), abs=1e-4)
        assert view.text("#scale-low") == "\N{MINUS SIGN}1" and view.text("#second-run") == "dashed: second"


def test_comparison_starts_with_a_text_that_both_steps_have(page_path: Path, open_page: OpenPage) -> None:
    view = open_page(page_path, "#text=sample")  # the model writes another one at each step
    view.press("c", "compare=100", "text=held-out+1")
    assert not view.page.locator("#message").is_visible() and view.attention()


def test_download(page_path: Path, open_page: OpenPage) -> None:
    view = open_page(page_path, START)
    with view.page.expect_download() as download:
        view.page.locator("#download").click()
    assert download.value.suggested_filename == "L0H1-200-held-out-1.svg"
    svg = ElementTree.parse(download.value.path()).getroot()
    assert {"key (column)", "query (row)", "·fox"} <= set(svg.itertext())
    _, _, png = svg[0].attrib["href"].partition(",")
    cells, shown = matplotlib.image.imread(io.BytesIO(base64.b64decode(png))), view.cell_colours()
    above_the_query = np.tril_indices(5)
    assert np.abs(255 * cells[..., :3] - shown)[above_the_query].max() <= 1
