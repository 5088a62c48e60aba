"""What the page says is what the arrays hold: weights, scores, losses, and every step on the way to a weight."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.browser import made
from tests.browser.conftest import Opener, View

DUMPS = made.dumps()
NAMES = ["sample", "held-out 1", "pronoun 1"]


def pattern(step: int, text: int, layer: int, head: int) -> NDArray[np.float64]:
    return DUMPS[step].texts[text].pattern(layer)[0, head].astype(np.float64)


def weighted(step: int, text: int, layer: int, head: int) -> NDArray[np.float64]:
    """Kobayashi et al. 2020: each weight times the length of what it lets through, rows summing to 1."""
    product = pattern(step, text, layer, head) * DUMPS[step].texts[text].value_norms[layer, head]
    return product / product.sum(axis=-1, keepdims=True)


def link(step: int, text: int, layer: int, head: int, query: int, more: str = "") -> str:
    return f"#text={NAMES[text]}&step={made.STEPS[step]}&head=L{layer}H{head}&query={query}{more}"


def number(view: View, selector: str) -> float:
    return float(view.text(selector).replace("\N{MINUS SIGN}", "-"))


def agrees(view: View, row: NDArray[np.float64], within: float = 1e-6) -> None:
    found = view.readings()
    assert found, "nothing is read"
    assert set(found) <= set(np.argsort(-np.abs(row), kind="stable")[:5].tolist())
    assert int(np.abs(row).argmax()) in found
    for key, value in found.items():
        assert value == pytest.approx(row[key], abs=within)


PLACES = [(2, 0, 0, 0, 7), (2, 1, 1, 2, 15), (0, 1, 0, 1, 4), (1, 2, 1, 0, 7), (2, 1, 1, 1, 0)]


@pytest.mark.parametrize("place", PLACES)
def test_the_side_box_says_the_weights(place: tuple[int, ...], built: Path, opened: Opener) -> None:
    step, text, layer, head, query = place
    view = opened(built, link(*place))
    row = pattern(step, text, layer, head)[query]
    agrees(view, row)
    assert f"{100 * row.max():.1f} %" in view.text("#readings li:first-child")


@pytest.mark.parametrize("place", PLACES)
def test_value_weighted(place: tuple[int, ...], built: Path, opened: Opener) -> None:
    step, text, layer, head, query = place
    view = opened(built, link(*place, more="&weigh=1"))
    agrees(view, weighted(step, text, layer, head)[query], within=1e-3)


@pytest.mark.parametrize("query, key", [(15, 3), (15, 15), (6, 0), (9, 12)])
def test_hovering_a_cell_says_its_weight(query: int, key: int, built: Path, opened: Opener) -> None:
    view = opened(built, link(2, 1, 1, 2, 14))
    view.page.mouse.move(*view.point(query, key))
    said = view.text("#matrix-readout")
    if key > query:
        assert "masked" in said
    else:
        assert f"{100 * pattern(2, 1, 1, 2)[query, key]:.2f} %" in said
    view.page.mouse.click(*view.point(query, key))
    view.shows(f"query={query}", "pinned=1")


def test_colours_are_the_weights(built: Path, opened: Opener) -> None:
    import matplotlib

    view = opened(built, link(2, 1, 1, 2, 15))
    colours = (matplotlib.colormaps["cividis"](range(256), bytes=True)[:, :3]).astype(int)
    weights, shown = pattern(2, 1, 1, 2), view.pixels().astype(int)
    for i in range(0, 14):  # the rows above the frame of the chosen one
        for j in range(i + 1):
            assert np.abs(shown[i, j, :3] - colours[round(255 * weights[i, j])]).max() <= 3, (i, j)
    masked = shown[np.triu_indices(16, 1)][:, :3]
    assert np.abs(masked - colours[0]).max(axis=1).min() > 60, "masked cells do not look like a weight of 0"


def test_loss_and_next_tokens(built: Path, opened: Opener) -> None:
    view = opened(built, link(2, 1, 0, 0, 5))
    text = DUMPS[2].texts[1]
    assert f"loss {text.loss[4]:.2f} nats" in view.text("#token-place")
    rows = view.page.locator("#likely li").all_inner_texts()
    assert text.top_tokens is not None and len(rows) == 5
    for row, (token, chance) in zip(rows, text.top_tokens[5], strict=True):
        assert f"{100 * chance:.1f}"[:-1] in row and token.decode().strip() in row
    view.press("Home", "query=0")
    assert "nothing came before" in view.text("#token-place")


@pytest.mark.parametrize("step", range(3))
@pytest.mark.parametrize("score", ["induction", "distance"])
def test_the_grid_holds_the_scores(score: str, step: int, built: Path, opened: Opener) -> None:
    view = opened(built, link(step, 1, 1, 1, 3) + f"&score={score}")
    assert view.grid() == pytest.approx(DUMPS[step].scores[score].ravel(), rel=1e-4)
    assert f"{DUMPS[step].scores[score][1, 1]:.3f}" in view.text("#head-score")
    assert f"step {made.STEPS[step]}: L1H1" in view.text("#timeline-readout")


def test_what_is_lost_without_a_head_stands_beside_its_score(built: Path, opened: Opener) -> None:
    view = opened(built, link(2, 1, 1, 2, 3) + "&score=reads.pronoun")
    said = view.text("#effect")
    assert "+2.50 2.00 to 3.00" in said and "+1.50 1.00 to 2.00" in said and "supported" in said
    for _ in range(4):
        view.page.keyboard.press("h")
    view.shows("head=L0H1")
    assert "disputed" in view.text("#effect")
    view.press("h", "head=L0H0")
    assert "no effect" in view.text("#effect")
    view.page.select_option("#score", "entropy")
    view.shows("score=entropy")
    assert "not measured" in view.text("#effect")


def test_heads_that_only_matter_together_say_so(built: Path, opened: Opener) -> None:
    view = opened(built, link(2, 1, 1, 1, 3) + "&score=induction")
    assert "L1H0 + L1H1 together: without them it hurts." in view.text("#effect")
    assert "L1H0 + L1H1" in view.text("#claims")
    view.press("l", "head=L1H2")
    assert "together" not in view.text("#effect")


def test_a_high_weight_without_effect_is_marked(built: Path, opened: Opener) -> None:
    view = opened(built, "#score=reads.pronoun&step=400")
    marked = view.page.eval_on_selector_all(
        "#grid td[data-head]", "cells => cells.map(c => c.getAttribute('aria-label').includes('no effect'))"
    )
    high = DUMPS[2].scores["antecedent.pronoun"] >= 0.5
    high[1, 2] = high[0, 1] = False  # the one that matters, and the one that is disputed
    assert marked == high.ravel().tolist()


def test_the_steps_come_to_the_stored_weight(built: Path, opened: Opener) -> None:
    step, text, layer, head, query, key = 2, 1, 1, 2, 12, 5
    view = opened(built, link(step, text, layer, head, query) + f"&key={key}")
    view.page.locator("#how").scroll_into_view_if_needed()
    view.page.wait_for_selector("#step-agreement")
    dump = DUMPS[step].texts[text]
    assert dump.queries is not None and dump.keys is not None
    product = float(dump.queries[layer, head, query].astype(np.float64) @ dump.keys[layer, head, key])
    assert number(view, "#step-product") == pytest.approx(product, abs=2e-4)
    assert number(view, "#step-score") == pytest.approx(product / np.sqrt(made.D), abs=2e-4)
    said = {
        name: float(view.page.locator("#step-agreement").get_attribute(f"data-{name}"))
        for name in ("recomputed", "stored", "largest")
    }
    exact = made.weights(dump.queries, dump.keys)[layer, head, query, key]
    assert said["recomputed"] == pytest.approx(exact, abs=1e-6)
    assert said["stored"] == pytest.approx(float(pattern(step, text, layer, head)[query, key]), abs=1e-9)
    assert said["largest"] <= 2**-12
    assert len(view.page.locator("#panel tbody tr[data-key]").all()) == query + 1
    assert view.text("#panel tr.masked").startswith("3 later")


def test_where_steps_are_not_kept_the_page_leads_there(built: Path, opened: Opener) -> None:
    view = opened(built, link(0, 1, 1, 2, 12))
    view.page.locator("#how").scroll_into_view_if_needed()
    view.page.locator("#go-explained").click()
    view.shows("step=400", "query=12")
    view.page.wait_for_selector("#step-agreement")
