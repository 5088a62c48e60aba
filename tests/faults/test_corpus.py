"""The text or its token files change, shrink or vanish during a run or before it is resumed.

A run never trains on another text than the one it started with, and continues when the text is restored.
"""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from common.errors import DATA
from tests.faults.forkserver import Child, ForkServer
from tests.faults.harness import CORPUS, Reference, committed
from tests.faults.hook import Hook
from tests.faults.started import error_lines

OTHER = CORPUS.replace("brown fox", "fox brown")
"""The same letters and size, other sentences: only its content distinguishes it from the text."""


def swap(path: Path) -> None:
    """Another text of the same size and modification time."""
    before = path.stat()
    path.write_text(OTHER)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def shrink(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def error_line(returncode: int, err: str) -> str:
    """The one line of a run that ended with the exit code for data."""
    assert returncode == DATA and "Traceback" not in err, f"{returncode}: {err}"
    (line,) = error_lines(err)
    return line


class Place:
    """A text, a cache and a run of their own."""

    def __init__(self, folder: Path, server: ForkServer, reference: Reference) -> None:
        folder.mkdir(exist_ok=True)
        self.server, self.reference = server, reference
        self.text, self.cache, self.run = folder / "text.txt", folder / "cache", folder / "run"
        self.env = {"GLASSGPT_CACHE": str(self.cache)}
        self.text.write_text(CORPUS)
        options = [option for option in reference.argv if not option.startswith("--data.source=")]
        self.argv = (*options, f"--data.source={self.text}", f"--run.dir={self.run}")

    def paused(self) -> Child:
        """The run, paused as it writes its second sample, after step 8."""
        hook = Hook(3, "SIGSTOP", "open", "samples.txt")
        running = self.server.start(*self.argv, hook=hook, env=self.env)
        assert running.held(), running.output()
        return running

    def stop_after(self, step: int) -> None:
        done = self.server.run(*self.argv, f"--run.stop_at_step={step}", env=self.env)
        assert done.returncode == 0, done.stderr

    def resume(self, *changes: str) -> tuple[int, str]:
        done = self.server.run(f"--run.resume={self.run}", "--run.stop_at_step=0", *changes, env=self.env)
        return done.returncode, done.stderr

    def check_completes(self, *changes: str) -> None:
        """Resumed, it ends like the uninterrupted run."""
        code, err = self.resume(*changes)
        assert code == 0, err
        self.reference.check(self.run)


@pytest.fixture
def place(server: ForkServer, reference: Reference, tmp_path: Path) -> Place:
    return Place(tmp_path, server, reference)


@pytest.mark.parametrize("harm", [swap, shrink, Path.unlink], ids=lambda harm: harm.__name__)
def test_text_changed_during_a_run_is_noticed_on_resuming(harm: Callable[[Path], None], place: Place) -> None:
    running = place.paused()
    harm(place.text)
    running.send(signal.SIGTERM)
    running.send(signal.SIGCONT)
    done = running.end()
    assert done.returncode == 143, done.stderr
    assert committed(place.run) == 8
    assert "text" in error_line(*place.resume())
    assert committed(place.run) == 8
    place.text.write_text(CORPUS)
    place.check_completes()


def test_a_run_needs_neither_text_nor_cache_once_it_has_tokens(place: Place) -> None:
    running = place.paused()
    shrink(place.text)
    shutil.rmtree(place.cache)
    running.send(signal.SIGCONT)
    done = running.end()
    assert done.returncode == 0, done.stderr
    place.reference.check(place.run)


def test_tokens_removed_between_runs_are_prepared_again(place: Place) -> None:
    place.stop_after(6)
    shutil.rmtree(place.cache)
    place.check_completes()


def test_moved_text_is_the_same_text(place: Place, tmp_path: Path) -> None:
    place.stop_after(6)
    moved = tmp_path / "moved.txt"
    place.text.rename(moved)
    assert str(place.text) in error_line(*place.resume())
    other = tmp_path / "other.txt"
    other.write_text(OTHER)
    error_line(*place.resume(f"--data.source={other}"))
    assert committed(place.run) == 6
    place.check_completes(f"--data.source={moved}")
