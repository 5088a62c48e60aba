"""A headless browser. A test fails on any error, any breach of the content security policy and any other request."""

import io
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from numpy.typing import NDArray
from playwright.sync_api import sync_playwright

from inspection.page_builder import PageRun, write_page
from tests.browser import example_run


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium; without it the tests are skipped, except in continuous integration."""
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if not chromium and not os.environ.get("CI"):
        pytest.skip("chromium was not found; set CHROMIUM to its path")
    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        chrome = playwright.chromium.launch(executable_path=chromium, args=options)
        yield chrome
        chrome.close()


@dataclass
class View:
    """An open page, and the errors and requests that it should not have caused."""

    page: Any
    errors: list[str] = field(default_factory=list)

    def wait_for(self, *parts: str) -> None:
        """Wait until the drawn view's hash contains all these parts."""
        wanted = "".join(f'[data-drawn*="{part}"]' for part in parts)
        self.page.wait_for_selector(f"html{wanted}", timeout=10_000, state="attached")

    def press(self, key: str, *parts: str) -> None:
        self.page.keyboard.press(key)
        self.wait_for(*parts)

    def text(self, selector: str) -> str:
        return " ".join(self.page.locator(selector).inner_text().split())

    def attention(self) -> dict[int, float]:
        """The list "attends to": key -> exact value."""
        rows = self.page.eval_on_selector_all(
            "#attends-to li[data-key]", "rows => rows.map(r => [r.dataset.key, r.dataset.value])"
        )
        return {int(key): float(value) for key, value in rows}

    def grid(self) -> NDArray[np.float64]:
        """The scores in the grid of heads, flat."""
        return np.array(self.page.eval_on_selector_all("#grid td", "cells => cells.map(c => Number(c.dataset.value))"))

    def point(self, query: float, key: float) -> tuple[float, float]:
        """The middle of a matrix cell on the screen, in CSS pixels."""
        x, y = self.page.evaluate(
            """([i, j]) => { const { left, top, cell } = matrix.layout;
            const box = document.getElementById("matrix").getBoundingClientRect();
            return [box.left + left + (j + 0.5) * cell, box.top + top + (i + 0.5) * cell]; }""",
            [query, key],
        )
        return x, y

    def cell_colours(self) -> NDArray[np.int64]:
        """The colour on the screen of the middle of each matrix cell, (T, T, 3), 0 to 255."""
        image = matplotlib.image.imread(io.BytesIO(self.page.screenshot()))
        T = self.page.evaluate("matrix.layout.T")
        points = np.array([[self.point(i, j) for j in range(T)] for i in range(T)]).astype(int)
        return np.rint(255 * image[points[..., 1], points[..., 0], :3]).astype(np.int64)

    def open_walkthrough(self) -> None:
        self.page.locator("#walkthrough-section").scroll_into_view_if_needed()
        self.page.wait_for_selector("#walkthrough tr[data-key]")


OpenPage = Callable[..., View]


@pytest.fixture
def open_page(browser: Any) -> Iterator[OpenPage]:
    """Opens a file with a hash."""
    views: list[View] = []

    def open_file(path: Path, hash: str = "", width: int = 1280, height: int = 800, **options: Any) -> View:
        view = View(browser.new_page(viewport={"width": width, "height": height}, offline=True, **options))
        views.append(view)
        allowed = ("data:", "blob:", path.as_uri())
        log = view.errors.append
        view.page.on("request", lambda request: request.url.startswith(allowed) or log(f"requested {request.url}"))
        view.page.on("console", lambda message: message.type == "error" and log(message.text))
        view.page.on("pageerror", lambda error: log(str(error)))
        view.page.goto(path.as_uri() + hash)
        view.page.wait_for_selector("html[data-ready]", timeout=20_000, state="attached")
        return view

    yield open_file
    for view in views:
        view.page.close()
    assert [view.errors for view in views] == [[] for _ in views]


@pytest.fixture(scope="session")
def page_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run with everything in it."""
    path, runs = tmp_path_factory.mktemp("page") / "attention.html", [PageRun("first", example_run.files())]
    write_page(path, runs, example_run.FINDINGS, example_run.ablations(), "runs/example")
    return path
