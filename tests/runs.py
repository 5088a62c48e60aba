"""Small runs that several tests look at, through the scripts as a user starts them."""

import contextlib
import importlib
import io
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from common.errors import UserError, run_main

ROOT = Path(__file__).parent.parent

TINY = (
    *("--data.tokenizer=char", "--model.n_layers=2", "--model.n_heads=2", "--model.d_model=16", "--model.context=16"),
    *("--train.batch_size=4", "--train.steps=6", "--train.eval_every=3", "--train.save_every=3"),
    *("--train.eval_tokens=100", "--log.every=1", "--log.sample_tokens=8"),
)
"""Options of a run that takes a fraction of a second."""


class Terminal(io.TextIOWrapper):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def script(name: str, *argv: object, terminal: bool = False) -> subprocess.CompletedProcess[str]:
    """Run one of the three scripts to its end, in this process: the same `main`, without the seconds that torch takes
    to load."""
    kind = Terminal if terminal else io.TextIOWrapper
    out, err = (kind(io.BytesIO(), encoding="utf-8", newline="") for _ in range(2))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    command, code = [name, *map(str, argv)], 0
    try:
        with mock.patch("sys.argv", command), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run_main(importlib.import_module(name.removesuffix(".py")).main)
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    for stream in (out, err):
        stream.seek(0)
    return subprocess.CompletedProcess(command, code, out.read(), err.read())


def process(
    name: str, *argv: object, env: dict[str, str] | None = None, timeout: float = 120, cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """Run one of the three scripts in a process of its own, without a terminal."""
    command = [sys.executable, str(ROOT / name), *map(str, argv)]
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=timeout, env={**os.environ, **(env or {})}
    )


def output(name: str, *argv: object) -> str:
    """What a script prints that must end well."""
    done = script(name, *argv)
    assert done.returncode == 0, done.stderr
    return done.stdout


def python(program: str, *argv: object, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a program text in a process of its own."""
    command = [sys.executable, "-c", program, *map(str, argv)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600, env={**os.environ, **env})


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def user_error(code: int, match: str | None = None) -> Iterator[pytest.ExceptionInfo[UserError]]:
    """A `UserError` of one line with this exit code must be raised."""
    with pytest.raises(UserError, match=match) as caught:
        yield caught
    assert caught.value.exit_code == code and len(str(caught.value).splitlines()) == 1, caught.value


def error_line(done: subprocess.CompletedProcess[str], code: int) -> str:
    """The one line on stderr of a script that refused, with `code`; never a traceback."""
    assert done.returncode == code, f"{done.returncode}: {done.stdout}\n{done.stderr}"
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in done.stderr, done.stderr
    assert len(lines) == 1, done.stderr
    return lines[0]
