"""The fault tests: `pytest -m faults -n 2`. Every test in this folder does harm to a run, its files or its disk."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.forkserver import ForkServer
from tests.faults.harness import CORPUS, FAULTY, Reference

FOLDER = Path(__file__).parent


@pytest.fixture(scope="session")
def server(session_cache: None) -> Iterator[ForkServer]:
    """Starts scripts in fresh processes within milliseconds; one server for each pytest worker."""
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
