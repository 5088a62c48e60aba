"""A headless browser. A test fails on any error, any breach of the content security policy and any other request."""

from __future__ import annotations

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

from inspection.page_builder import PageRun, write_page
from tests.browser import example_run

ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.browser)


def skip(reason: str) -> None:
    """Skip, except in continuous integration, which has a browser."""
    if os.environ.get("CI"):
        pytest.fail(f"{reason}, although CI is set")
    pytest.skip(reason)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        skip("playwright is not installed")
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if not chromium:
        skip("chromium was not found; set CHROMIUM to its path")
    with sync_playwright() as playwright:
        chrome = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        yield chrome
        chrome.close()


@dataclass
class View:
    """An open page, and the errors and requests that it should not have caused."""

    page: Any
    errors: list[str] = field(default_factory=list)

    def attribute(self, name: str) -> str:
        return self.page.locator("html").get_attribute(name) or ""

    def wait_for(self, *parts: str) -> None:
        """Wait until the drawn view's hash contains all these parts."""
        wanted = "".join(f'[data-drawn*="{part}"]' for part in parts)
        self.page.wait_for_selector(f"html{wanted}", timeout=10_000, state="attached")

    def press(self, key: str, *parts: str) -> None:
        self.page.keyboard.press(key)
        self.wait_for(*parts)

    def text(self, selector: str) -> str:
        return " ".join((self.page.locator(selector).inner_text() or "").split())

    def attention(self) -> dict[int, float]:
        """The list "attends to": key -> exact value."""
        rows = self.page.eval_on_selector_all(
            "#attends-to li[data-key]", "rows => rows.map(r => [r.dataset.key, r.dataset.value])"
        )
        return {int(key): float(value) for key, value in rows}

    def grid(self) -> NDArray[np.float64]:
        """The scores in the grid of heads, flat."""
        cells = self.page.eval_on_selector_all("#grid td", "cells => cells.map(c => c.dataset.value)")
        return np.array([float(value) for value in cells])

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
        self.page.wait_for_selector("#step-agreement")


OpenPage = Callable[..., View]


@pytest.fixture
def open_page(browser: Any) -> Iterator[OpenPage]:
    """Opens a file with a hash."""
    contexts, views = [], []

    def open_file(path: Path, hash: str = "", width: int = 1280, height: int = 800, **options: Any) -> View:
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        view = View(context.new_page())
        views.append(view)
        allowed = ("data:", "blob:", path.as_uri())

        def log_request(request: Any) -> None:
            if not request.url.startswith(allowed):
                view.errors.append(f"requested {request.url}")

        def log_message(message: Any) -> None:
            if message.type == "error":
                view.errors.append(message.text)

        view.page.on("request", log_request)
        view.page.on("console", log_message)
        view.page.on("pageerror", lambda error: view.errors.append(str(error)))
        context.set_offline(True)
        view.page.goto(path.as_uri() + hash)
        view.page.wait_for_selector("html[data-ready]", timeout=20_000, state="attached")
        return view

    yield open_file
    for context in contexts:
        context.close()
    assert [view.errors for view in views] == [[] for _ in views]


@pytest.fixture(scope="session")
def page_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run with everything in it."""
    path = tmp_path_factory.mktemp("page") / "attention.html"
    runs = [PageRun("first", example_run.files())]
    write_page(path, runs, example_run.FINDINGS, example_run.ablations(), "runs/example")
    return path


@pytest.fixture(scope="session")
def two_runs_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of two runs with different attention."""
    path = tmp_path_factory.mktemp("page") / "two.html"
    runs = [PageRun("first", example_run.files()), PageRun("second", example_run.files(seed=50))]
    write_page(path, runs, None, None, "two runs")
    return path
