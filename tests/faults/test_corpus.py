"""The text, or the tokens made of it, change, shrink or vanish under a run: it ends as it should, or says why not.

A run never trains on another text than the one it began with, and goes on where the text is again what it was.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from common.errors import DATA, DISK_OR_MEMORY
from tests.faults.forkserver import ForkServer
from tests.faults.harness import CORPUS, Reference, committed, sha
from tests.faults.hook import Hook
from tests.faults.started import Forked, error_lines, shell_code

OTHER = CORPUS.replace("brown fox", "fox brown")
"""The same letters, the same size, other sentences: only its content tells it from the text."""


def swap(path: Path) -> None:
    """Another text in the same file, of the same size and with the same time of its last change."""
    before = path.stat()
    path.write_text(OTHER)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def append(path: Path) -> None:
    with path.open("a") as file:
        file.write("And one more fox.\n")


def shrink(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def vanish(path: Path) -> None:
    path.unlink()


def become_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def become_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def become_binary(path: Path) -> None:
    path.write_bytes(b"\0\xff" * 300)


HARM = (swap, append, shrink, empty, vanish, become_a_folder, become_a_pipe, become_binary)


def restore(path: Path) -> None:
    """The text as it was."""
    if path.is_dir():
        path.rmdir()
    path.unlink(missing_ok=True)
    path.write_text(CORPUS)


def refused(child_code: int, err: str, *codes: int) -> str:
    """The one line of a run that refused, with one of these exit codes."""
    assert shell_code(child_code) in codes, f"{child_code}: {err}"
    assert "Traceback" not in err, err
    (said,) = error_lines(err)
    return said


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

    def in_training(self) -> Forked:
        """The run, stopped in the middle: as it writes its second sample, after step 8."""
        hook = Hook(2, "SIGSTOP", "open", "samples.txt", under=str(self.run))
        running = Forked(self.server, *self.argv, hook=hook, env=self.env)
        assert running.held(), running.output()
        return running

    def resume(self, *changes: str) -> tuple[int, str]:
        done = self.server.run(f"--run.resume={self.run}", *changes, env=self.env)
        return done.returncode, done.stderr

    def ends_equal(self, *changes: str) -> None:
        """Resumed, or begun where there is no run yet, it ends like the one that nothing disturbed."""
        if (self.run / "config.toml").is_file():
            code, err = self.resume(*changes)
        else:
            done = self.server.run(*self.argv, *changes, env=self.env)
            code, err = done.returncode, done.stderr
        assert code == 0, err
        self.reference.check(self.run)


@pytest.fixture
def place(server: ForkServer, reference: Reference, tmp_path: Path) -> Place:
    return Place(tmp_path, server, reference)


@pytest.mark.parametrize("harm", HARM)
def test_a_text_that_changes_during_the_run(harm: Callable[[Path], None], place: Place) -> None:
    """The tokens are prepared: what happens to the text concerns only the next start, which sees it and says so."""
    running = place.in_training()
    harm(place.text)
    running.send(signal.SIGTERM)  # held as it is, it is asked to stop as well: so that there is something to resume
    running.send(signal.SIGCONT)
    done = running.end()
    assert shell_code(done.returncode) == 143, done.stderr
    step = committed(place.run)
    assert step == 8
    code, err = place.resume()
    said = refused(code, err, DATA)
    assert str(place.text) in said or "text" in said, said
    assert committed(place.run) == step
    restore(place.text)
    place.ends_equal()


@pytest.mark.parametrize("harm", [swap, shrink, vanish])
def test_a_run_that_has_its_tokens_ends_without_the_text(harm: Callable[[Path], None], place: Place) -> None:
    running = place.in_training()
    harm(place.text)
    running.send(signal.SIGCONT)
    done = running.end()
    assert done.returncode == 0, done.stderr
    place.reference.check(place.run)


def test_a_text_that_may_no_longer_be_read(place: Place) -> None:
    """By a process without root's rights, to whom nothing is forbidden."""
    half = place.server.run(*place.argv, "--run.stop_at_step=6", env=place.env)
    assert half.returncode == 0, half.stderr
    place.text.chmod(0)
    done = place.server.run(f"--run.resume={place.run}", env=place.env, powerless=True)
    assert str(place.text) in refused(done.returncode, done.stderr, DATA)
    place.text.chmod(0o644)
    place.ends_equal()


@pytest.mark.parametrize("harm", [swap, shrink, vanish])
def test_a_text_that_changes_while_it_is_prepared(
    harm: Callable[[Path], None], server: ForkServer, reference: Reference, tmp_path: Path
) -> None:
    """At each moment at which the cache is written: refused, or trained on what the text was when it was first read."""
    at = 0
    while at < 40:
        at += 1
        place = Place(tmp_path / str(at), server, reference)
        hook = Hook(at, "SIGSTOP", under=str(place.cache))
        running = Forked(server, *place.argv, hook=hook, env=place.env)
        if not running.held():  # there was no such moment
            assert at > 4
            break
        prepared = bool(list(place.cache.glob("tokens-*[0-9a-f]/manifest.json")))
        harm(place.text)
        running.send(signal.SIGCONT)
        done = running.end()
        if done.returncode == 0 and at > 1:
            reference.check(place.run)
        elif done.returncode == 0:  # the cache itself was made, and nothing read: the run began with this text
            again = Place(tmp_path / "again", server, reference)
            shutil.copy(place.text, again.text)
            assert server.run(*again.argv, env=again.env).returncode == 0 and sha(again.run) == sha(place.run)
        else:
            assert str(place.text) in refused(done.returncode, done.stderr, DATA)
            assert not prepared and not (place.run / "config.toml").exists()
            assert not list(place.cache.glob("tokens-*/manifest.json"))
            restore(place.text)
            if at == 4:
                place.ends_equal()
    assert at < 40


# ---- the tokens ----


def tokens(place: Place) -> Path:
    """The folder of the prepared tokens."""
    (found,) = place.cache.glob("tokens-*[0-9a-f]")
    return found


def cache_removed(place: Place) -> None:
    shutil.rmtree(place.cache)


def tokens_removed(place: Place) -> None:
    shutil.rmtree(tokens(place))


def shard_cut(place: Place) -> None:
    path = tokens(place) / "train-00000.npy"
    os.truncate(path, path.stat().st_size // 2)


def shard_emptied(place: Place) -> None:
    os.truncate(tokens(place) / "val-00000.npy", 0)


def shard_rewritten(place: Place) -> None:
    """Other tokens, all of the vocabulary, in the same file and as many."""
    path = tokens(place) / "train-00000.npy"
    data = path.read_bytes()
    with path.open("r+b") as file:
        file.seek(len(data) - 400)
        file.write(data[-400:-200] * 2)


def shard_replaced(place: Place) -> None:
    """Another file under the same name: the one that the run reads is untouched."""
    path = tokens(place) / "train-00000.npy"
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[:-400] + data[-400:-200] * 2)


@pytest.mark.parametrize("harm", [cache_removed, tokens_removed, shard_replaced])
def test_tokens_that_go_away_during_the_run_are_still_read(harm: Callable[[Place], None], place: Place) -> None:
    """What is held open stays; a run that starts later prepares them again."""
    running = place.in_training()
    harm(place)
    running.send(signal.SIGCONT)
    done = running.end()
    assert done.returncode == 0, done.stderr
    place.reference.check(place.run)
    shutil.rmtree(place.run)
    place.ends_equal()


@pytest.mark.parametrize("harm", [shard_cut, shard_emptied, shard_rewritten])
def test_tokens_that_change_during_the_run_stop_it(harm: Callable[[Place], None], place: Place) -> None:
    """One line, never a SIGBUS; resumed, the run prepares them again and ends as it should."""
    running = place.in_training()
    harm(place)
    running.send(signal.SIGCONT)
    done = running.end()
    assert "00000.npy" in refused(done.returncode, done.stderr, DATA, DISK_OR_MEMORY)
    assert committed(place.run) >= 6
    place.ends_equal()


@pytest.mark.parametrize("harm", [cache_removed, tokens_removed, shard_cut, shard_rewritten])
def test_tokens_that_change_between_two_runs_are_prepared_again(harm: Callable[[Place], None], place: Place) -> None:
    done = place.server.run(*place.argv, "--run.stop_at_step=6", env=place.env)
    assert done.returncode == 0, done.stderr
    harm(place)
    place.ends_equal()


# ---- another place ----


def test_a_text_that_was_moved_is_the_same_text(place: Place, tmp_path: Path) -> None:
    done = place.server.run(*place.argv, "--run.stop_at_step=6", env=place.env)
    assert done.returncode == 0, done.stderr
    elsewhere = tmp_path / "elsewhere" / "moved.txt"
    elsewhere.parent.mkdir()
    place.text.rename(elsewhere)
    code, err = place.resume()
    assert str(place.text) in refused(code, err, DATA)
    other = tmp_path / "other.txt"
    other.write_text(OTHER)
    code, err = place.resume(f"--data.source={other}")
    refused(code, err, DATA)
    assert committed(place.run) == 6
    place.ends_equal(f"--data.source={elsewhere}")
