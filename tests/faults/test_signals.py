"""SIGTERM, SIGINT and SIGHUP in every phase of a run: all that was learned is saved, and nothing is half-written.

A phase is recognised by what the run has written, or by a file operation (`hook.py`).
"""

import dataclasses
import fcntl
import os
import pty
import random
import signal
import sys
import termios
import time
from pathlib import Path

import pytest

from inspection.attention_file import read_attention_file
from tests.faults.harness import FAULTY, Reference, checkpoints, committed, named, numbers, steps_done
from tests.faults.hook import Hook
from tests.faults.processes import Running, launch, proc, run_script, start, train

SOON = 10.0
"""Seconds within which a run that was asked to stop has saved and exited."""
BOTH = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])


@pytest.fixture(scope="session")
def slow(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """A run whose steps take a second or two."""
    options = ("--train.batch_size=1600", "--train.micro_batch_size=1", "--train.steps=3", "--train.save_every=3")
    argv = (*FAULTY, *options, "--train.eval_every=3", f"--data.source={corpus}")
    return Reference.make(tmp_path_factory.mktemp("reference") / "slow", argv)


def check_stopped(run: Path, code: int, number: int, err: str = "") -> None:
    """The exit code says which signal it was, there is no traceback, and whatever has its name is complete."""
    assert code == 128 + number, err
    assert "Traceback" not in err and "Exception ignored" not in err, err
    if run.is_dir():
        assert named(run) == checkpoints(run)
        for path in (run / "attention").glob("[0-9]*.safetensors"):
            read_attention_file(path)
        if (run / "metrics.jsonl").is_file():
            numbers(run)


def stop(running: Running, number: int, run: Path, within: float = SOON) -> str:
    """Send a signal, and check that the run ends in time with the right exit code; its stderr."""
    running.send(number)
    done = running.end(within)
    check_stopped(run, done.returncode, number, done.stderr)
    return done.stderr


MOMENTS = {
    "first checkpoint": Hook(operation="open", path=".writing-000000/"),
    "config.toml": Hook(operation="rename", path=".config.toml"),
    "sample": Hook(3, operation="open", path="samples.txt"),
    "attention file": Hook(operation="rename", path=".000008.safetensors"),
    "save: rename": Hook(operation="rename", path=".writing-000006"),
    "old checkpoint removed": Hook(operation="rmtree", path=".removing"),
    "plot": Hook(operation="open", path="loss.png"),
    "page": Hook(operation="rename", path=".attention.html"),
}
SAVED = {"sample": 8, "attention file": 8, "plot": 12, "page": 12}
"""The step that has been saved after a signal at these moments."""


@BOTH
@pytest.mark.parametrize("moment", MOMENTS)
def test_signal_while_something_is_written(moment: str, number: int, reference: Reference, run: Path) -> None:
    hook = dataclasses.replace(MOMENTS[moment], do=signal.Signals(number).name)
    done = run_script(*reference.argv, f"--run.dir={run}", hook=hook)
    check_stopped(run, done.returncode, number, done.stderr)
    assert committed(run) >= SAVED.get(moment, -1)
    reference.resume(run)


@BOTH
def test_signal_while_the_corpus_is_prepared(number: int, reference: Reference, run: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    hook = Hook(2, signal.Signals(number).name, "open", str(cache))
    env = {"GLASSGPT_CACHE": str(cache)}
    done = run_script(*reference.argv, f"--run.dir={run}", hook=hook, env=env)
    check_stopped(run, done.returncode, number, done.stderr)
    assert not (run / "config.toml").exists()
    done = run_script(*reference.argv, f"--run.dir={run}", env=env)
    assert done.returncode == 0, done.stderr
    reference.check(run)


@BOTH
def test_signal_while_a_vocabulary_is_trained(number: int, run: Path, tmp_path: Path) -> None:
    text = tmp_path / "base.txt"
    text.write_text("".join(random.Random(0).choices([chr(0x4E00 + i) for i in range(1000)], k=6_000_000)))
    running = train(f"--data.source={text}", f"--run.dir={run}", env={"GLASSGPT_CACHE": str(tmp_path / "cache")})
    running.until(lambda: any(tmp_path.glob("cache/*.partial")), "training of the vocabulary")
    time.sleep(1)
    assert not stop(running, number, run, SOON / 2)
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} <= {".partial"}


@BOTH
@pytest.mark.parametrize("library", ["libtorch_python", "safetensors_rust"])
def test_signal_during_imports(library: str, number: int, corpus: Path, run: Path) -> None:
    """Libraries in the order in which a start loads them."""
    running = train(*FAULTY, f"--data.source={corpus}", f"--run.dir={run}")
    running.until(lambda: library in proc(running.pid, "maps"), library)
    assert not stop(running, number, run) and not (run / "config.toml").exists()


def start_slow(slow: Reference, run: Path) -> Running:
    """The run in its second step."""
    running = start(*slow.argv, f"--run.dir={run}")
    running.until(lambda: steps_done(run) == 1, "the second step")
    time.sleep(0.2)  # the first ends a little after its metrics are written
    return running


@pytest.mark.parametrize(
    ("number", "again"),
    [(signal.SIGTERM, 0), (signal.SIGINT, 0), (signal.SIGINT, 0.05), (signal.SIGTERM, 0.6)],
    ids=["SIGTERM", "SIGINT", "SIGINT twice", "SIGTERM twice"],
)
def test_signal_in_a_step(number: int, again: float, slow: Reference, run: Path) -> None:
    """The step is finished and saved, also if the signal comes again: a terminal and torchrun both deliver a Ctrl-C."""
    running = start_slow(slow, run)
    if again:
        running.send(number)
        time.sleep(again)
        assert running.poll() is None, "the step was too short for this test"
    stop(running, number, run)
    assert 1 <= committed(run) <= 2
    assert f"--run.resume {run}" in running.texts()[0]
    slow.resume(run)


def test_second_interrupt_exits_at_once(slow: Reference, run: Path) -> None:
    running = start_slow(slow, run)
    running.send(signal.SIGINT)
    time.sleep(0.4)
    assert running.poll() is None, "the step was too short for this test"
    stop(running, signal.SIGINT, run, within=1)
    assert committed(run) == 0
    slow.resume(run)


def test_closed_terminal_saves_and_stops(slow: Reference, run: Path) -> None:
    """The kernel sends SIGHUP, and whatever is printed from then on fails."""
    master, terminal = pty.openpty()
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), terminal)
    running = train(*slow.argv, f"--run.dir={run}", **streams, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
    os.close(terminal)
    running.until(lambda: steps_done(run) == 1, "the second step")
    os.close(master)
    done = running.end(SOON)
    check_stopped(run, done.returncode, signal.SIGHUP)
    assert committed(run) == 2
    slow.resume(run)


def test_ignored_signals_stay_ignored(reference: Reference, run: Path) -> None:
    """`nohup` ignores SIGHUP, and a shell ignores SIGINT for what a script starts with `&`."""
    command = (sys.executable, "train.py", *reference.argv, f"--run.dir={run}")
    running = launch("sh", "-c", 'trap "" HUP INT; exec "$@"', "sh", *command)
    running.until(lambda: steps_done(run) > 0, "the loop")
    for number in (signal.SIGHUP, signal.SIGINT):
        running.send(number)
    assert running.end(60).returncode == 0
    reference.check(run)


def test_closed_pipe_does_not_stop_training(slow: Reference, run: Path) -> None:
    """`train.py | head -3`"""
    reader, pipe = os.pipe()
    running = train(*slow.argv, f"--run.dir={run}", stdout=pipe)
    os.close(pipe)
    running.until(lambda: steps_done(run) == 1, "the second step")
    os.close(reader)
    done = running.end(60)
    assert "Traceback" not in done.stderr, done.stderr
    slow.check(run)
