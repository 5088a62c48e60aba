"""The fault suite: `pytest -m faults -n 2`. Every test in this folder does harm, and says what came of it.

What each test tried and what was lost is counted by the fixture `figures` and summed up in the last lines.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.figures import KEY, Figures, pytest_terminal_summary
from tests.faults.forkserver import ForkServer
from tests.faults.harness import CORPUS, FAULTY, Reference

__all__ = ["Figures", "pytest_terminal_summary"]
FOLDER = Path(__file__).parent


@pytest.fixture
def figures(request: pytest.FixtureRequest) -> Iterator[Figures]:
    """Counts faults; the sums over all tests are printed at the end."""
    counted = Figures()
    yield counted
    request.node.user_properties.append((KEY, counted.counts))


@pytest.fixture(scope="session")
def server(session_cache: None) -> Iterator[ForkServer]:
    """Starts `train.main` in a fresh process within milliseconds; one server for each pytest worker."""
    with ForkServer() as started:
        yield started


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text so short that a few steps are an epoch."""
    path = tmp_path_factory.mktemp("text") / "fox.txt"
    path.write_text(CORPUS)
    return path


@pytest.fixture(scope="session")
def reference(server: ForkServer, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """A run of `FAULTY` that nothing disturbed."""
    return Reference.make(server, tmp_path_factory.mktemp("reference") / "whole", (*FAULTY, f"--data.source={corpus}"))


@pytest.hookimpl(tryfirst=True)  # before those without the marker are left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker("faults")
