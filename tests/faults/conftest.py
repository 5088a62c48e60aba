"""The fault tests: `pytest -m faults -n 2`. Every test in this folder does harm to a run, its files or its disk."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.harness import CORPUS, FAULTY, Reference
from tests.faults.processes import kill_all, start_server

FOLDER = Path(__file__).parent


@pytest.fixture(scope="session", autouse=True)
def fork_server(session_cache: None) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # a fork takes only one thread along
        patch.setenv("PYTHONWARNINGS", "ignore")
        start_server()


@pytest.fixture(autouse=True)
def no_process_survives(fork_server: None) -> Iterator[None]:
    yield
    kill_all()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text so short that a few steps are an epoch."""
    path = tmp_path_factory.mktemp("text") / "fox.txt"
    path.write_text(CORPUS)
    return path


@pytest.fixture(scope="session")
def reference(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """A run of `FAULTY` that nothing disturbed."""
    return Reference.make(tmp_path_factory.mktemp("reference") / "whole", (*FAULTY, f"--data.source={corpus}"))


@pytest.fixture(scope="session")
def to_step_10(reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """The same run up to step 10, which saves the time of the report at the end."""
    return Reference.make(tmp_path_factory.mktemp("to") / "10", (*reference.argv, "--run.stop_at_step=10"))


@pytest.fixture(scope="session")
def at_step_6(reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, stopped at step 6, with checkpoints of steps 4 and 6. Tests damage copies."""
    return reference.stopped_at(6, tmp_path_factory.mktemp("at") / "6")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run that is yet to start."""
    return tmp_path / "run"


@pytest.hookimpl(tryfirst=True)  # before those without the marker are left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker("faults")
