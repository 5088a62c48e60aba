"""Programs as a user, a scheduler or torchrun starts them: real processes, observed through /proc and what they write.

Everything that a `Started` starts inherits a random word in its environment, which finds also those whose parent has gone.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from common.files import read_metrics

ROOT = Path(__file__).parent.parent.parent
WORD = "GLASSGPT_STARTED"
KILLED = 128 + signal.SIGKILL
"""The exit code of a process that was killed."""


class Running:
    """A process whose output goes to files."""

    pid: int
    out: Path
    err: Path

    def poll(self, within: float = 0) -> int | None:
        """Its exit code as a shell reports it, or None if it is still running after so many seconds."""
        raise NotImplementedError

    def send(self, number: int) -> None:
        """Send it a signal."""
        kill(self.pid, number)

    def texts(self) -> list[str]:
        """Its stdout and stderr so far."""
        return [path.read_text("utf-8", "replace") if path.exists() else "" for path in (self.out, self.err)]

    def output(self) -> str:
        return "\n".join(text[-6000:] for text in self.texts())

    def until(self, condition: Callable[[], bool], what: str, seconds: float = 90) -> None:
        """Wait for a condition, named `what` in the error; fail if the process ends first."""
        deadline = time.monotonic() + allowed(seconds)
        while not condition():
            code = self.poll()
            assert code is None or condition(), f"ended with {code} before: {what}\n{self.output()}"
            assert time.monotonic() < deadline, f"not within {seconds} s: {what}\n{self.output()}"
            time.sleep(0.002)

    def held(self) -> bool:
        """Wait until it has stopped itself; False if it ends instead."""
        while self.poll() is None:
            if stat(self.pid)[:1] == ["T"]:
                return True
            time.sleep(0.002)
        return False

    def end(self, within: float = 120) -> subprocess.CompletedProcess[str]:
        """Wait for its end."""
        code = self.poll(allowed(within))
        if code is None:
            self.send(signal.SIGKILL)
            raise AssertionError(f"still running after {allowed(within)} s\n{self.output()}")
        return subprocess.CompletedProcess("", code, *self.texts())


class Started(Running):
    """A command in a session of its own. Use it in a `with`: nothing survives the body.

    Args:
        env: in addition to the current environment.
        how: further arguments of `Popen`.
    """

    def __init__(self, *command: object, env: Mapping[str, str] | None = None, **how: Any) -> None:
        self.word, self.folder = secrets.token_hex(8), tempfile.TemporaryDirectory()
        self.out, self.err = (Path(self.folder.name) / name for name in ("out", "err"))
        threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1"}
        with self.out.open("wb") as out, self.err.open("wb") as err:
            how = {"cwd": ROOT, "stdin": subprocess.DEVNULL, "stdout": out, "stderr": err, **how}
            variables = {**os.environ, **threads, **(env or {}), WORD: self.word}
            self.process = subprocess.Popen([*map(str, command)], start_new_session=True, env=variables, **how)
        self.pid = self.process.pid

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *_: object) -> None:
        for pid in (self.pid, *self.living()):
            kill(pid)
        self.process.wait(30)
        self.folder.cleanup()

    def poll(self, within: float = 0) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return shell_code(self.process.wait(within))
        return None

    def living(self) -> list[int]:
        """Every living process that this command started, the command itself included."""
        pids = map(int, filter(str.isdecimal, os.listdir("/proc")))
        return [pid for pid in pids if environment(pid).get(WORD) == self.word]

    def ranks(self) -> dict[int, int]:
        """The processes of a torchrun, by rank."""
        children = [pid for pid in self.living() if stat(pid)[1:2] == [str(self.pid)]]
        return {int(environment(pid)["RANK"]): pid for pid in children if "RANK" in environment(pid)}

    def nobody_left(self, within: float = 10) -> None:
        """Assert that every process it started has ended."""
        deadline = time.monotonic() + allowed(within)
        while left := self.living():
            assert time.monotonic() < deadline, [(pid, proc(pid, "cmdline")) for pid in left]
            time.sleep(0.02)


def train(*argv: object, **how: Any) -> Started:
    """`python train.py ...`"""
    return Started(sys.executable, ROOT / "train.py", *argv, **how)


def allowed(seconds: float) -> float:
    """Seconds that something promised within `seconds` may take here and now: longer on a busy machine."""
    return seconds * max(1.0, 1.5 * os.getloadavg()[0] / (os.cpu_count() or 1))


def shell_code(code: Any) -> Any:
    """A return code of `subprocess`, or None, as a shell reports it."""
    return 128 - code if code is not None and code < 0 else code


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    """Send a signal to a process that may have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def proc(pid: int, name: str) -> str:
    """A file of /proc about a process; empty for one that has ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/{name}").read_bytes().decode("utf-8", "replace")
    return ""


def environment(pid: int) -> dict[str, str]:
    """The environment that a process was started with."""
    return dict(word.split("=", 1) for word in proc(pid, "environ").split("\0") if "=" in word)


def stat(pid: int) -> list[str]:
    """State (T: stopped), parent and so on, as in proc(5)."""
    return proc(pid, "stat").rpartition(")")[2].split()


def steps_done(run: Path) -> int:
    """The last step of metrics.jsonl that has a loss; 0 before the first."""
    return max((line["step"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line), default=0)


def error_lines(text: str) -> list[str]:
    """The lines by which the program reports what went wrong."""
    return [line for line in text.splitlines() if line.startswith("error: ")]
