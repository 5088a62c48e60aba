"""The numbers on the page are those of the arrays: attention, losses, ablation, each step of the walk-through."""

from itertools import product
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from numpy.typing import NDArray

from tests.browser import example_run
from tests.browser.conftest import OpenPage

pytestmark = pytest.mark.browser
FILES = example_run.files()


def pattern(step: int, text: int, layer: int, head: int) -> NDArray[np.float64]:
    return FILES[step].texts[text].pattern(layer)[0, head].astype(np.float64)


def view_hash(step: int, text: int, layer: int, head: int, query: int, more: str = "") -> str:
    name = FILES[step].texts[text].name
    return f"#text={name}&step={example_run.STEPS[step]}&head=L{layer}H{head}&query={query}{more}"


SELECTIONS = [(2, 0, 0, 0, 7), (2, 1, 1, 2, 15), (0, 1, 0, 1, 4), (1, 2, 1, 0, 7), (2, 1, 1, 1, 0)]


def test_attends_to(page_path: Path, open_page: OpenPage) -> None:
    for (step, text, layer, head, query), weighted in product(SELECTIONS, (False, True)):
        view = open_page(page_path, view_hash(step, text, layer, head, query, f"&value_weighted={weighted:d}"))
        row = pattern(step, text, layer, head)[query]
        if weighted:  # Kobayashi et al. 2020: attention times value norms, normalised to sum 1
            row *= FILES[step].texts[text].value_norms[layer, head]
            row /= row.sum()
        shown = view.attention()
        assert set(shown) <= set(np.argsort(-row, kind="stable")[:5].tolist()) and int(row.argmax()) in shown
        assert shown == pytest.approx({key: row[key] for key in shown}, abs=1e-3 if weighted else 1e-6)
        assert f"{100 * row.max():.1f}"[:-1] in view.text("#attends-to li:first-child")


def test_hovering_and_pinning(page_path: Path, open_page: OpenPage) -> None:
    view = open_page(page_path, view_hash(2, 1, 1, 2, 14))
    view.page.locator("#token-7").hover()
    view.wait_for("query=7")
    view.page.locator("#token-9").click()
    view.wait_for("query=9", "pinned=1")
    view.page.locator("#token-3").hover()
    view.wait_for("query=9", "key=3")
    for query, key in ((15, 3), (15, 15), (6, 0), (9, 12)):
        view.page.mouse.move(*view.point(query, key))
        expected = "masked" if key > query else f"{100 * pattern(2, 1, 1, 2)[query, key]:.2f} %"
        assert expected in view.text("#matrix-readout")
        view.page.mouse.click(*view.point(query, key))
        view.wait_for(f"query={query}", "pinned=1")


def test_matrix_colours(page_path: Path, open_page: OpenPage) -> None:
    view = open_page(page_path, view_hash(2, 1, 1, 2, 15))
    cividis = matplotlib.colormaps["cividis"](range(256), bytes=True)[:, :3].astype(int)
    expected, shown = pattern(2, 1, 1, 2), view.cell_colours()
    for i in range(14):  # the rows above the frame of the query
        for j in range(i + 1):
            assert np.abs(shown[i, j] - cividis[round(255 * expected[i, j])]).max() <= 4, (i, j)
    masked = shown[np.triu_indices(16, 1)]
    assert np.abs(masked - cividis[0]).max(axis=1).min() > 60, "masked cells do not look like attention 0"


def test_loss_and_predictions(page_path: Path, open_page: OpenPage) -> None:
    view = open_page(page_path, view_hash(2, 1, 0, 0, 5))
    text = FILES[2].texts[1]
    assert f"loss {text.loss[4]:.2f} nats" in view.text("#query-details")
    rows = view.page.locator("#predictions li").all_inner_texts()
    assert len(rows) == 5
    for row, (token, probability) in zip(rows, text.top_tokens[5], strict=True):
        assert f"{100 * probability:.1f}"[:-1] in row and token.decode().strip() in row
    view.press("Home", "query=0")
    assert "no loss" in view.text("#query-details")


def test_ablation_of_each_head(page_path: Path, open_page: OpenPage) -> None:
    view = open_page(page_path, view_hash(2, 1, 1, 2, 3, "&score=antecedent.pronoun"))
    shown = view.text("#ablation")
    assert "+2.50 2.00 to 3.00" in shown and "+1.50 1.00 to 2.00" in shown
    assert "supported: ablating it hurts more than ablating another head" in shown
    table = view.page.eval_on_selector_all("#grid td", "cells => cells.map(c => c.ariaLabel)")
    assert "supported" in table[5] and "disputed" in table[1] and "not supported" in table[0]
    high = FILES[2].scores["antecedent.pronoun"].ravel() >= 0.5
    marks = view.page.locator("#grid .effect").all_inner_texts()
    assert [mark == "∅" for mark in marks] == [bool(high[k]) and k != 5 for k in range(6)]


def test_walkthrough(page_path: Path, open_page: OpenPage) -> None:
    view = open_page(page_path, view_hash(2, 1, 1, 2, 12, "&key=5"))
    view.open_walkthrough()
    record = FILES[2].texts[1]
    assert record.queries is not None and record.keys is not None
    q_k = float(record.queries[1, 2, 12].astype(np.float64) @ record.keys[1, 2, 5])
    for selector, expected in (("#step-product", q_k), ("#step-score", q_k / np.sqrt(example_run.D))):
        assert float(view.text(selector).replace("\N{MINUS SIGN}", "-")) == pytest.approx(expected, abs=2e-4)
    shown = view.page.eval_on_selector_all(
        "#walkthrough tr[data-key]", "rows => rows.map(row => [...row.cells].slice(3).map(c => Number(c.textContent)))"
    )
    exact = example_run.softmax_pattern(record.queries, record.keys)[1, 2]
    weights = np.stack([exact, pattern(2, 1, 1, 2)], axis=-1)[12, :13]
    assert np.abs(np.array(shown) - weights).max() <= 5.1e-5, "weights and stored weights, to four digits"
    assert view.text("#walkthrough tr.masked").startswith("3 later")
