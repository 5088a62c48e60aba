"""SIGTERM, SIGINT and SIGHUP in every phase of a run: all that was learned is saved, and nothing is half-written.

A phase is known by what the run has written, by the signals that it listens to, or by the file operation that it
announces (`hook.py`); nothing waits for a time that a phase is thought to begin at.
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
from tests.faults.forkserver import ForkServer
from tests.faults.harness import FAULTY, Reference, checkpoints, committed, numbers
from tests.faults.hook import Hook
from tests.faults.started import Forked, Started, allowed, catches, ignores, line, loaded, steps_done, train

SOON = 10.0
"""Seconds within which a run that was asked to stop has saved and ended."""
ASKED = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])

SLOW_STEPS = (
    *FAULTY,
    *("--train.batch_size=800", "--train.micro_batch_size=1", "--train.steps=3", "--train.save_every=3"),
    "--train.eval_every=3",
)
"""A run whose steps take a second or two."""
SLOW_EVALUATION = (
    *FAULTY,
    "--train.micro_batch_size=1",
    "--train.steps=8",
    "--train.eval_tokens=100000",
    "--train.keep_checkpoints=9",
)
"""A run that evaluates for a second or two, on `long_corpus`."""


@pytest.fixture(scope="session")
def slow(server: ForkServer, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """The run with slow steps, undisturbed."""
    argv = (*SLOW_STEPS, f"--data.source={corpus}")
    return Reference.make(server, tmp_path_factory.mktemp("reference") / "slow", argv)


@pytest.fixture(scope="session")
def evaluating(server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """The run with slow evaluations, undisturbed."""
    folder = tmp_path_factory.mktemp("evaluating")
    text = folder / "long.txt"
    text.write_text("The quick brown fox jumps over the lazy dog, and the dog sleeps on.\n" * 500)
    argv = (*SLOW_EVALUATION, "--data.val_fraction=0.4", f"--data.source={text}")
    return Reference.make(server, folder / "whole", argv)


def go_on(server: ForkServer, reference: Reference, run: Path) -> None:
    """What a user does next: resume, or start again where there is no run yet. It must end like the reference."""
    again = (f"--run.resume={run}",) if (run / "config.toml").is_file() else (*reference.argv, f"--run.dir={run}")
    done = server.run(*again)
    assert done.returncode == 0, done.stderr
    reference.check(run)


def check_stopped(run: Path, code: int, number: int, err: str = "") -> None:
    """The exit code says which signal it was, no traceback shows, and whatever has its name is whole."""
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


def stop(running: Forked, number: int, run: Path) -> None:
    """Send a signal, and see it end in time with the right exit code."""
    running.send(number)
    done = running.end(SOON)
    check_stopped(run, done.returncode, number, done.stderr)


# ---- moments that a file operation announces ----

WRITTEN = {
    "the first checkpoint": Hook(at=1, operation="fsync", path="000000"),
    "the mark of a run": Hook(at=1, operation="rename", path="config.", under="RUN"),
    "the first dump": Hook(at=1, operation="rename", path=".000000.safetensors", under="RUN"),
    "a sample": Hook(at=2, operation="open", path="samples.txt", under="RUN"),
    "a dump": Hook(at=1, operation="rename", path=".000008.safetensors", under="RUN"),
    "a save, its folder": Hook(at=1, operation="mkdir", path="000006"),
    "a save, a file": Hook(at=2, operation="write", path="000006"),
    "a save, syncing": Hook(at=3, operation="fsync", path="000006"),
    "a save, its name": Hook(at=1, operation="rename", path="000006"),
    "old checkpoints going": Hook(at=1, operation="remove"),
    "the plot": Hook(at=1, operation="open", path="loss.png", under="RUN"),
    "the heads": Hook(at=1, operation="rename", path=".ablations.json", under="RUN"),
    "the page": Hook(at=1, operation="rename", path=".attention.html", under="RUN"),
}
LAST_BUT = {"a sample": 8, "a dump": 8, "a save, its folder": 6, "a save, a file": 6, "a save, syncing": 6}
"""The step that is saved after a signal at these moments."""


@ASKED
@pytest.mark.parametrize("moment", WRITTEN)
def test_a_signal_while_something_is_written(
    moment: str, number: int, server: ForkServer, reference: Reference, tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    chosen = WRITTEN[moment]
    under = str(run) if chosen.under else ""
    hook = Hook(chosen.at, signal.Signals(number).name, chosen.operation, chosen.path, under=under, log=str(log))
    done = Forked(server, *reference.argv, f"--run.dir={run}", hook=hook).end()
    assert len(log.read_text().splitlines()) >= chosen.at, f"no such moment: {moment}"
    check_stopped(run, done.returncode, number, done.stderr)
    assert committed(run) >= LAST_BUT.get(moment, -1)
    if moment in ("the plot", "the heads", "the page"):
        assert committed(run) == 12
    go_on(server, reference, run)


@ASKED
def test_a_signal_while_the_corpus_is_prepared(
    number: int, server: ForkServer, reference: Reference, tmp_path: Path
) -> None:
    run, cache = tmp_path / "run", tmp_path / "cache"
    hook = Hook(1, signal.Signals(number).name, "open", "val-00000.npy", under=str(cache))
    env = {"GLASSGPT_CACHE": str(cache)}
    done = Forked(server, *reference.argv, f"--run.dir={run}", hook=hook, env=env).end()
    check_stopped(run, done.returncode, number, done.stderr)
    assert not list(cache.glob("tokens-*/manifest.json")) and not (run / "config.toml").exists()
    done = server.run(*reference.argv, f"--run.dir={run}", env=env)
    assert done.returncode == 0, done.stderr
    reference.check(run)


# ---- moments that are seen from outside ----


LOADING = ("libffi", "libtorch_python", "_multiarray_umath", "libcrypto", "safetensors_rust")
"""Libraries in the order in which a start loads them, from the command line's parser to what checkpoints need."""


@ASKED
@pytest.mark.parametrize("library", LOADING)
def test_a_signal_while_modules_are_imported(library: str, number: int, corpus: Path, tmp_path: Path) -> None:
    """Importers often take any exception for a sign that something is not installed: it must end all the same."""
    run = tmp_path / "run"
    with train(*FAULTY, f"--data.source={corpus}", f"--run.dir={run}") as started:
        started.until(lambda: loaded(started.pid, library), library)
        started.send(number)
        done = started.end(SOON)
    check_stopped(run, done.returncode, number, done.stderr)
    assert not done.stderr and not (run / "config.toml").exists()


def encoders(started: Started) -> list[int]:
    """The processes that encode text and have begun to ignore Ctrl-C."""
    return [pid for pid in started.living() if "spawn_main" in line(pid) and ignores(pid, signal.SIGINT)]


@ASKED
def test_a_signal_while_workers_encode_the_corpus(number: int, tmp_path: Path) -> None:
    """A corpus large enough to be shared among processes; none of them outlives the run."""
    text, run, cache = tmp_path / "large.txt", tmp_path / "run", tmp_path / "cache"
    text.write_text("".join(f"{k} foxes jumped over {k * k} lazy dogs on day {k % 365}.\n" for k in range(450_000)))
    argv = (*FAULTY, "--data.tokenizer=byte", f"--data.source={text}", f"--run.dir={run}", "--data.workers=2")
    with train(*argv, env={"GLASSGPT_CACHE": str(cache)}) as started:
        started.until(lambda: len(encoders(started)) == 2, "workers encode")
        started.send(number)
        done = started.end(SOON)
        started.nobody_left()
    check_stopped(run, done.returncode, number, done.stderr)
    assert not (run / "config.toml").exists() and not list(cache.glob("tokens-*/manifest.json"))


@ASKED
@pytest.mark.parametrize("step", [1, 2], ids=["the first step", "a step"])
def test_a_signal_in_a_step(step: int, number: int, server: ForkServer, slow: Reference, tmp_path: Path) -> None:
    """The step is finished and saved, and the user is told how to go on."""
    run = tmp_path / "run"
    running = Forked(server, *slow.argv, f"--run.dir={run}")
    running.until(lambda: catches(running.pid, signal.SIGHUP) and steps_done(run) == step - 1, "the step")
    stop(running, number, run)
    assert committed(run) == steps_done(run) and step - 1 <= steps_done(run) <= step
    assert f"--run.resume {run}" in running.said()
    go_on(server, slow, run)


@ASKED
@pytest.mark.parametrize("step", [4, 8], ids=["an evaluation", "the last evaluation"])
def test_a_signal_in_an_evaluation(
    step: int, number: int, server: ForkServer, evaluating: Reference, tmp_path: Path
) -> None:
    """It is broken off after the batch in hand, and made again when the run goes on: told once."""
    run = tmp_path / "run"
    running = Forked(server, *evaluating.argv, f"--run.dir={run}")
    running.until(lambda: steps_done(run) == step, "the evaluation")
    stop(running, number, run)
    assert committed(run) == step
    assert dict(numbers(run)[-1]).get("val_loss") is None
    go_on(server, evaluating, run)


@ASKED
def test_a_signal_while_heads_are_taken_away(
    number: int, server: ForkServer, reference: Reference, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    running = Forked(server, *reference.argv, f"--run.dir={run}")
    running.until(lambda: (run / "loss.png").exists(), "the report")
    stop(running, number, run)
    assert committed(run) == 12
    go_on(server, reference, run)


@ASKED
def test_a_signal_after_the_last_line(number: int, server: ForkServer, reference: Reference, tmp_path: Path) -> None:
    """It may come before the process has ended, or find nobody; what the run left is whole either way."""
    run = tmp_path / "run"
    running = Forked(server, *reference.argv, f"--run.dir={run}")
    running.until(lambda: "attend.py summary" in running.said(), "the last line")
    running.send(number)
    done = running.end(SOON)
    assert done.returncode in (0, 128 + number), done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    reference.check(run)
    go_on(server, reference, run)


# ---- more than one signal ----


def test_a_second_interrupt_leaves_at_once(server: ForkServer, slow: Reference, tmp_path: Path) -> None:
    run = tmp_path / "run"
    running = Forked(server, *slow.argv, f"--run.dir={run}")
    running.until(lambda: steps_done(run) == 1, "the second step")
    running.send(signal.SIGINT)
    time.sleep(0.4)
    assert not running.ended(), "the step was too short for this test"
    began = time.monotonic()
    running.send(signal.SIGINT)
    done = running.end()
    assert time.monotonic() - began < allowed(1)
    check_stopped(run, done.returncode, signal.SIGINT, done.stderr)
    assert committed(run) == 0  # step 2 was not waited for
    go_on(server, slow, run)


@pytest.mark.parametrize("operation", ["write", "fsync"])
def test_a_second_interrupt_in_a_save_breaks_nothing(
    operation: str, server: ForkServer, reference: Reference, tmp_path: Path
) -> None:
    """The save is held at each operation from this one on, so that both signals fall into it."""
    run = tmp_path / "run"
    hook = Hook(1, "SIGSTOP", operation, "000006", lasting=True)
    running = Forked(server, *reference.argv, f"--run.dir={run}", hook=hook)
    assert running.held()
    before = committed(run)
    running.send(signal.SIGINT)
    running.send(signal.SIGCONT)  # the first one is heard
    assert running.held()
    time.sleep(0.4)
    running.send(signal.SIGINT)
    running.send(signal.SIGCONT)
    done = running.end(SOON)
    check_stopped(run, done.returncode, signal.SIGINT, done.stderr)
    assert committed(run) >= before
    go_on(server, reference, run)


@pytest.mark.parametrize(
    ("numbers_sent", "apart", "code"),
    [
        ((signal.SIGINT, signal.SIGINT), 0.05, 130),  # a terminal and torchrun both deliver it
        ((signal.SIGTERM, signal.SIGTERM), 0.6, 143),
    ],
    ids=["an echo", "SIGTERM twice"],
)
def test_what_is_no_second_interrupt_still_saves(
    numbers_sent: tuple[int, int], apart: float, code: int, server: ForkServer, slow: Reference, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    running = Forked(server, *slow.argv, f"--run.dir={run}")
    running.until(lambda: steps_done(run) == 1, "the second step")
    running.send(numbers_sent[0])
    time.sleep(apart)
    assert not running.ended(), "the step was too short for this test"
    running.send(numbers_sent[1])
    done = running.end(SOON)
    check_stopped(run, done.returncode, numbers_sent[0], done.stderr)
    assert done.returncode == code and committed(run) == 2
    go_on(server, slow, run)


# ---- a terminal that closes ----


def test_a_closed_terminal_is_a_request_to_stop(server: ForkServer, slow: Reference, tmp_path: Path) -> None:
    """The kernel sends SIGHUP, and whatever is printed from then on fails: the run saves and ends all the same."""
    run = tmp_path / "run"
    master, terminal = pty.openpty()
    try:
        with train(*slow.argv, f"--run.dir={run}", terminal=terminal) as started:
            os.close(terminal)
            os.set_blocking(master, False)
            started.until(lambda: bool(drained(master)) and steps_done(run) == 1, "the second step")
            os.close(master)
            master = -1
            done = started.end(SOON)
    finally:
        if master >= 0:
            os.close(master)
    check_stopped(run, done.returncode, signal.SIGHUP)
    assert committed(run) == 2
    go_on(server, slow, run)


def drained(master: int) -> bool:
    """Read what a program wrote to its terminal, so that it never waits for a reader."""
    with contextlib.suppress(BlockingIOError, OSError):
        while os.read(master, 65536):
            pass
    return True


def test_signals_that_were_ignored_from_the_start_stay_ignored(reference: Reference, tmp_path: Path) -> None:
    """`nohup` ignores SIGHUP, and a shell ignores SIGINT for what a script starts with `&`."""
    run = tmp_path / "run"
    both = (signal.SIGHUP, signal.SIGINT)
    with train(*reference.argv, f"--run.dir={run}", quiet=both) as started:
        started.until(lambda: steps_done(run) > 0, "the loop")
        for number in both:
            started.send(number)
        done = started.end(60)
    assert done.returncode == 0, done.stderr
    reference.check(run)


def test_the_reader_of_the_output_goes_away(slow: Reference, tmp_path: Path) -> None:
    """`train.py | head -3`: a run is worth more than its lines; it goes on to its end."""
    run = tmp_path / "run"
    reader, pipe = os.pipe()
    with train(*slow.argv, f"--run.dir={run}", stdout=pipe) as started:
        os.close(pipe)
        started.until(lambda: steps_done(run) == 1, "the second step")
        os.close(reader)
        done = started.end(60)
    assert "Traceback" not in done.stderr, done.stderr
    slow.check(run)
