"""The text or its token files change, shrink or vanish during a run or before it is resumed.

A run never trains on another text than the one it started with, and continues when the text is restored.
"""

import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from common.errors import DATA
from tests.faults.harness import CORPUS, Reference, committed
from tests.faults.hook import Hook
from tests.faults.processes import Running, proc, run_script, start
from tests.runs import error_line

OTHER = CORPUS.replace("brown fox", "fox brown")
"""The same letters and size, other sentences: only its content distinguishes it from the text."""


def swap(path: Path) -> None:
    """Another text of the same size and modification time."""
    before = path.stat()
    path.write_text(OTHER)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def shrink(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


class Place:
    """A text, a cache and a run of their own."""

    def __init__(self, folder: Path, reference: Reference) -> None:
        folder.mkdir(exist_ok=True)
        self.reference = reference
        self.text, self.cache, self.run = folder / "text.txt", folder / "cache", folder / "run"
        self.env = {"GLASSGPT_CACHE": str(self.cache)}
        self.text.write_text(CORPUS)
        options = [option for option in reference.argv if not option.startswith("--data.source=")]
        self.argv = (*options, f"--data.source={self.text}", f"--run.dir={self.run}")

    def paused(self) -> Running:
        """The run, paused as it writes its second sample, after step 8."""
        hook = Hook(3, "SIGSTOP", "open", "samples.txt")
        running = start(*self.argv, hook=hook, env=self.env)
        running.until(lambda: "State:\tT" in proc(running.pid, "status"), "SIGSTOP")
        return running

    def stop_after(self, step: int) -> None:
        done = run_script(*self.argv, f"--run.stop_at_step={step}", env=self.env)
        assert done.returncode == 0, done.stderr

    def resume(self, *changes: str) -> subprocess.CompletedProcess[str]:
        return run_script(f"--run.resume={self.run}", "--run.stop_at_step=0", *changes, env=self.env)

    def check_completes(self, *changes: str) -> None:
        """Resumed, it ends like the uninterrupted run."""
        done = self.resume(*changes)
        assert done.returncode == 0, done.stderr
        self.reference.check(self.run)


@pytest.fixture
def place(reference: Reference, tmp_path: Path) -> Place:
    return Place(tmp_path, reference)


@pytest.mark.parametrize("harm", [swap, shrink, Path.unlink], ids=lambda harm: harm.__name__)
def test_text_changed_during_a_run_is_noticed_on_resuming(harm: Callable[[Path], None], place: Place) -> None:
    running = place.paused()
    harm(place.text)
    running.send(signal.SIGTERM)
    running.send(signal.SIGCONT)
    done = running.end()
    assert done.returncode == 143, done.stderr
    assert committed(place.run) == 8
    assert "text" in error_line(place.resume(), DATA)
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
    assert str(place.text) in error_line(place.resume(), DATA)
    other = tmp_path / "other.txt"
    other.write_text(OTHER)
    error_line(place.resume(f"--data.source={other}"), DATA)
    assert committed(place.run) == 6
    place.check_completes(f"--data.source={moved}")
