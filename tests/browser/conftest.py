"""A browser without a network: any request but for the page itself, any error and any breach of its policy fails."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from inspection.page_builder import PageRun, write_page
from tests.browser import made

ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.browser)


def unavailable(reason: str) -> None:
    """Skips, but for the continuous integration, where a browser is promised."""
    if os.environ.get("CI"):
        pytest.fail(f"{reason}, although CI is set")
    pytest.skip(reason)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        unavailable("playwright is not installed")
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if not chromium:
        unavailable("there is no chromium; its path may stand in CHROMIUM")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        yield started
        started.close()


@dataclass
class View:
    """A page that is open, and what it has done."""

    page: Any
    troubles: list[str] = field(default_factory=list)

    def attribute(self, name: str) -> str:
        return self.page.locator("html").get_attribute(name) or ""

    def shows(self, *parts: str) -> None:
        """Waits until a view is drawn whose link holds all these parts."""
        wanted = "".join(f'[data-drawn*="{part}"]' for part in parts)
        self.page.wait_for_selector(f"html{wanted}", timeout=10_000, state="attached")

    def press(self, key: str, *parts: str) -> None:
        self.page.keyboard.press(key)
        self.shows(*parts)

    def text(self, selector: str) -> str:
        return " ".join((self.page.locator(selector).inner_text() or "").split())

    def readings(self) -> dict[int, float]:
        """What the side box says: key → number, exactly."""
        rows = self.page.eval_on_selector_all(
            "#readings li[data-key]", "rows => rows.map(r => [r.dataset.key, r.dataset.value])"
        )
        return {int(key): float(value) for key, value in rows}

    def grid(self) -> NDArray[np.float64]:
        """The numbers in the grid of heads."""
        rows = self.page.eval_on_selector_all("#grid td[data-head]", "cells => cells.map(c => c.dataset.value)")
        return np.array([float(value) for value in rows])

    def pixels(self) -> NDArray[np.uint8]:
        """The matrix, one colour for the middle of each cell, (T, T, 4)."""
        return np.array(
            self.page.evaluate(
                """() => { const { left, top, cell, T } = matrixView.geometry; const scale = devicePixelRatio;
                const pen = document.getElementById("matrix").getContext("2d");
                const at = (i, j) => Array.from(pen.getImageData(Math.floor((left + (j + 0.5) * cell) * scale),
                  Math.floor((top + (i + 0.5) * cell) * scale), 1, 1).data);
                return Array.from({ length: T }, (_, i) => Array.from({ length: T }, (_, j) => at(i, j))); }"""
            ),
            dtype=np.uint8,
        )

    def point(self, query: int, key: int) -> tuple[float, float]:
        """Where a cell of the matrix is on the screen."""
        found = self.page.evaluate(
            """([i, j]) => { const { left, top, cell } = matrixView.geometry;
            const box = document.getElementById("matrix").getBoundingClientRect();
            return [box.left + left + (j + 0.5) * cell, box.top + top + (i + 0.5) * cell]; }""",
            [query, key],
        )
        return found[0], found[1]


Opener = Callable[..., View]


@pytest.fixture
def opened(browser: Any) -> Iterator[Opener]:
    """Opens a file with a hash; at the end of the test nothing may have gone wrong in it."""
    contexts, views = [], []

    def open_file(path: Path, link: str = "", width: int = 1280, height: int = 800, **options: Any) -> View:
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        view = View(context.new_page())
        views.append(view)

        def route(route: Any) -> None:
            if route.request.url.partition("#")[0] == path.as_uri():
                return route.continue_()
            view.troubles.append(f"asked for {route.request.url}")
            return route.abort()

        context.route("**", route)
        asked: list[str] = []
        view.page.on("request", lambda request: asked.append(request.url))
        view.page.on("request", lambda request: len(asked) > 1 and view.troubles.append(f"asked for {request.url}"))
        view.page.on("console", lambda said: said.type == "error" and view.troubles.append(said.text))
        view.page.on("pageerror", lambda error: view.troubles.append(str(error)))
        view.page.goto(path.as_uri() + link)
        view.page.wait_for_selector("html[data-ready]", timeout=20_000, state="attached")
        return view

    yield open_file
    for context in contexts:
        context.close()
    assert [view.troubles for view in views] == [[] for _ in views]


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run with everything in it."""
    path = tmp_path_factory.mktemp("page") / "attention.html"
    write_page(path, [PageRun("first", made.dumps())], made.CLAIMS, made.evidence(), "runs/made")
    return path


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of two runs, the second with other weights."""
    path = tmp_path_factory.mktemp("page") / "pair.html"
    runs = [PageRun("first", made.dumps()), PageRun("second", made.dumps(seed=50))]
    write_page(path, runs, None, None, "two runs")
    return path
