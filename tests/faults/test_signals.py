"""SIGTERM, SIGINT and SIGHUP in every phase of a run: all that was learned is saved, and nothing is half-written.

A phase is recognised by what the run has written, by its signal handlers, or by a file operation (`hook.py`).
"""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import time
from pathlib import Path

import pytest

from inspection.attention_file import read_attention_file
from tests.faults.forkserver import Child, ForkServer
from tests.faults.harness import FAULTY, Reference, checkpoints, committed, numbers
from tests.faults.hook import Hook
from tests.faults.started import allowed, catches, loaded, steps_done, train

SOON = 10.0
"""Seconds within which a run that was asked to stop has saved and exited."""
BOTH = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])


@pytest.fixture(scope="session")
def slow(server: ForkServer, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """A run whose steps take a second or two."""
    options = ("--train.batch_size=800", "--train.micro_batch_size=1", "--train.steps=3", "--train.save_every=3")
    argv = (*FAULTY, *options, "--train.eval_every=3", f"--data.source={corpus}")
    return Reference.make(server, tmp_path_factory.mktemp("reference") / "slow", argv)


@pytest.fixture(scope="session")
def evaluating(server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """A run whose evaluations take a second or two."""
    folder = tmp_path_factory.mktemp("evaluating")
    text = folder / "long.txt"
    text.write_text("The quick brown fox jumps over the lazy dog, and the dog sleeps on.\n" * 500)
    options = ("--train.micro_batch_size=1", "--train.steps=8", "--train.eval_tokens=100000", "--data.val_fraction=0.4")
    return Reference.make(server, folder / "whole", (*FAULTY, *options, f"--data.source={text}"))


def check_stopped(run: Path, code: int, number: int, err: str = "") -> None:
    """The exit code says which signal it was, there is no traceback, and whatever has its name is complete."""
    assert code == 128 + number, err
    assert "Traceback" not in err and "Exception ignored" not in err, err
    if run.is_dir():
        root = run / "checkpoints"
        named = [path for path in root.iterdir() if path.name.isdecimal()] if root.is_dir() else []
        assert len(named) == len(checkpoints(run))
        for path in (run / "attention").glob("[0-9]*.safetensors"):
            read_attention_file(path)
        if (run / "metrics.jsonl").is_file():
            numbers(run)


def stop(running: Child, number: int, run: Path) -> None:
    """Send a signal, and check that the run ends in time with the right exit code."""
    running.send(number)
    done = running.end(SOON)
    check_stopped(run, done.returncode, number, done.stderr)


MOMENTS = {
    "first checkpoint": Hook(at=1, operation="fsync", path="000000"),
    "config.toml": Hook(at=1, operation="rename", path=".config.toml", under="RUN"),
    "sample": Hook(at=3, operation="open", path="samples.txt", under="RUN"),
    "attention file": Hook(at=1, operation="rename", path=".000008.safetensors", under="RUN"),
    "save: rename": Hook(at=1, operation="rename", path="000006"),
    "old checkpoint removed": Hook(at=1, operation="remove"),
    "plot": Hook(at=1, operation="open", path="loss.png", under="RUN"),
    "page": Hook(at=1, operation="rename", path=".attention.html", under="RUN"),
}
SAVED = {"sample": 8, "attention file": 8, "plot": 12, "page": 12}
"""The step that has been saved after a signal at these moments."""


@BOTH
@pytest.mark.parametrize("moment", MOMENTS)
def test_signal_while_something_is_written(
    moment: str, number: int, server: ForkServer, reference: Reference, tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    at = MOMENTS[moment]
    under = str(run) if at.under else ""
    hook = Hook(at.at, signal.Signals(number).name, at.operation, at.path, under=under, log=str(log))
    done = server.start(*reference.argv, f"--run.dir={run}", hook=hook).end()
    assert len(log.read_text().splitlines()) >= at.at, f"no such moment: {moment}"
    check_stopped(run, done.returncode, number, done.stderr)
    assert committed(run) >= SAVED.get(moment, -1)
    reference.resume(server, run)


@BOTH
def test_signal_while_the_corpus_is_prepared(
    number: int, server: ForkServer, reference: Reference, tmp_path: Path
) -> None:
    run, cache = tmp_path / "run", tmp_path / "cache"
    hook = Hook(2, signal.Signals(number).name, "open", under=str(cache))
    env = {"GLASSGPT_CACHE": str(cache)}
    done = server.start(*reference.argv, f"--run.dir={run}", hook=hook, env=env).end()
    check_stopped(run, done.returncode, number, done.stderr)
    assert not (run / "config.toml").exists()
    done = server.run(*reference.argv, f"--run.dir={run}", env=env)
    assert done.returncode == 0, done.stderr
    reference.check(run)


@BOTH
@pytest.mark.parametrize("library", ["libtorch_python", "safetensors_rust"])
def test_signal_during_imports(library: str, number: int, corpus: Path, tmp_path: Path) -> None:
    """Libraries in the order in which a start loads them."""
    run = tmp_path / "run"
    with train(*FAULTY, f"--data.source={corpus}", f"--run.dir={run}") as started:
        started.until(lambda: loaded(started.pid, library), library)
        started.send(number)
        done = started.end(SOON)
    check_stopped(run, done.returncode, number, done.stderr)
    assert not done.stderr and not (run / "config.toml").exists()


@BOTH
def test_signal_in_a_step(number: int, server: ForkServer, slow: Reference, tmp_path: Path) -> None:
    """The step is finished and saved, and the output says how to resume."""
    run = tmp_path / "run"
    running = server.start(*slow.argv, f"--run.dir={run}")
    running.until(lambda: catches(running.pid, signal.SIGHUP) and steps_done(run) == 1, "the second step")
    stop(running, number, run)
    assert 1 <= committed(run) <= 2
    assert f"--run.resume {run}" in running.output()
    slow.resume(server, run)


def test_signal_in_an_evaluation(server: ForkServer, evaluating: Reference, tmp_path: Path) -> None:
    """It is interrupted after the current batch, and repeated by the resumed run."""
    run = tmp_path / "run"
    running = server.start(*evaluating.argv, f"--run.dir={run}")
    running.until(lambda: steps_done(run) == 4, "the evaluation")
    stop(running, signal.SIGTERM, run)
    assert committed(run) == 4 and dict(numbers(run)[-1]).get("val_loss") is None
    evaluating.resume(server, run)


# ---- more than one signal ----


def test_second_interrupt_exits_at_once(server: ForkServer, slow: Reference, tmp_path: Path) -> None:
    run = tmp_path / "run"
    running = server.start(*slow.argv, f"--run.dir={run}")
    running.until(lambda: steps_done(run) == 1, "the second step")
    running.send(signal.SIGINT)
    time.sleep(0.4)
    assert running.poll() is None, "the step was too short for this test"
    start = time.monotonic()
    running.send(signal.SIGINT)
    done = running.end()
    assert time.monotonic() - start < allowed(1)
    check_stopped(run, done.returncode, signal.SIGINT, done.stderr)
    assert committed(run) == 0
    slow.resume(server, run)


@pytest.mark.parametrize(
    ("number", "apart"),
    [(signal.SIGINT, 0.05), (signal.SIGTERM, 0.6)],  # a terminal and torchrun both deliver a Ctrl-C
    ids=["duplicate SIGINT", "SIGTERM twice"],
)
def test_repeated_signal_still_saves(
    number: int, apart: float, server: ForkServer, slow: Reference, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    running = server.start(*slow.argv, f"--run.dir={run}")
    running.until(lambda: steps_done(run) == 1, "the second step")
    running.send(number)
    time.sleep(apart)
    assert running.poll() is None, "the step was too short for this test"
    stop(running, number, run)
    assert committed(run) == 2
    slow.resume(server, run)


# ---- terminals and pipes ----


def test_closed_terminal_saves_and_stops(server: ForkServer, slow: Reference, tmp_path: Path) -> None:
    """The kernel sends SIGHUP, and whatever is printed from then on fails."""
    run = tmp_path / "run"
    master, terminal = pty.openpty()
    os.set_blocking(master, False)

    def second_step() -> bool:
        with contextlib.suppress(OSError):
            while os.read(master, 65536):
                pass
        return steps_done(run) == 1

    with train(*slow.argv, f"--run.dir={run}", terminal=terminal) as started:
        os.close(terminal)
        started.until(second_step, "the second step")
        os.close(master)
        done = started.end(SOON)
    check_stopped(run, done.returncode, signal.SIGHUP)
    assert committed(run) == 2
    slow.resume(server, run)


def test_ignored_signals_stay_ignored(reference: Reference, tmp_path: Path) -> None:
    """`nohup` ignores SIGHUP, and a shell ignores SIGINT for what a script starts with `&`."""
    run = tmp_path / "run"
    both = (signal.SIGHUP, signal.SIGINT)
    with train(*reference.argv, f"--run.dir={run}", quiet=both) as started:
        started.until(lambda: steps_done(run) > 0, "the loop")
        for number in both:
            started.send(number)
        assert started.end(60).returncode == 0
    reference.check(run)


def test_closed_pipe_does_not_stop_training(slow: Reference, tmp_path: Path) -> None:
    """`train.py | head -3`"""
    run = tmp_path / "run"
    reader, pipe = os.pipe()
    with train(*slow.argv, f"--run.dir={run}", stdout=pipe) as started:
        os.close(pipe)
        started.until(lambda: steps_done(run) == 1, "the second step")
        os.close(reader)
        done = started.end(60)
    assert "Traceback" not in done.stderr, done.stderr
    slow.check(run)
