"""Programs as a user, a scheduler or torchrun starts them: real processes, observed through /proc and what they write.

Everything that one `Started` starts, however deep, carries a word of its own in its environment: so whatever is left
behind is found, also when its parent has gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.faults.forkserver import Child, ForkServer, state

ROOT = Path(__file__).parent.parent.parent
WORD = "GLASSGPT_STARTED"


class Started:
    """A command in a session of its own, its output in files. Use it in a `with`: nothing survives the body.

    Args:
        quiet: signals that the command ignores from its start, as after `nohup` (SIGHUP) or `&` in a script (SIGINT).
        terminal: a terminal that it is started in.
        stdout: where it prints to, instead of a file.
    """

    def __init__(
        self,
        *command: object,
        cwd: Path = ROOT,
        env: Mapping[str, str] | None = None,
        quiet: Sequence[int] = (),
        terminal: int | None = None,
        stdout: int | None = None,
    ) -> None:
        self.word, self.folder = secrets.token_hex(8), tempfile.TemporaryDirectory()
        self.out, self.err = (Path(self.folder.name) / name for name in ("out", "err"))
        threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1"}

        def prepare() -> None:
            for number in quiet:
                signal.signal(number, signal.SIG_IGN)
            if terminal is not None:
                import fcntl
                import termios

                fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)

        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.process = subprocess.Popen(
                [*map(str, command)],
                cwd=cwd,
                stdin=subprocess.DEVNULL if terminal is None else terminal,
                stdout=next(x for x in (stdout, terminal, out) if x is not None),
                stderr=err if terminal is None else terminal,
                start_new_session=True,
                preexec_fn=prepare,
                env={**os.environ, **threads, **(env or {}), WORD: self.word},
            )

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *_: object) -> None:
        for pid in (self.pid, *self.living()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(30)
        self.folder.cleanup()

    @property
    def pid(self) -> int:
        return self.process.pid

    def living(self) -> list[int]:
        """Every process that this command started and that still lives, the command itself included."""
        return [pid for pid in pids() if environment(pid).get(WORD) == self.word]

    def ranks(self) -> dict[int, int]:
        """The processes of a torchrun, by rank."""
        found = {}
        for pid in self.living():
            rank = environment(pid).get("RANK")
            if rank is not None and environment(parent(pid)).get("RANK") is None:  # not a rank's own child
                found[int(rank)] = pid
        return found

    def send(self, number: int) -> None:
        """Send the command a signal."""
        os.kill(self.pid, number)

    def until(self, condition: Callable[[], bool], what: str, seconds: float = 90) -> None:
        """Wait until something has come about; it fails if the command ends first."""
        deadline = time.monotonic() + allowed(seconds)
        while not condition():
            ended = self.process.poll()
            assert ended is None or condition(), f"ended with {ended} before: {what}\n{self.output()}"
            assert time.monotonic() < deadline, f"not within {seconds} s: {what}\n{self.output()}"
            time.sleep(0.005)

    def end(self, within: float = 120) -> subprocess.CompletedProcess[str]:
        """Its end. The exit code is what a shell reports: 143 for a process that SIGTERM ended."""
        within = allowed(within)
        try:
            code = self.process.wait(within)
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f"still running after {within} s\n{self.output()}") from error
        texts = [path.read_text("utf-8", "replace") for path in (self.out, self.err)]
        return subprocess.CompletedProcess(self.process.args, shell_code(code), *texts)

    def output(self) -> str:
        """What it has printed so far."""
        return "\n".join(path.read_text("utf-8", "replace")[-6000:] for path in (self.out, self.err))

    def nobody_left(self, within: float = 10) -> None:
        """Assert that every process it started has ended."""
        deadline = time.monotonic() + allowed(within)
        while left := self.living():
            assert time.monotonic() < deadline, [(pid, line(pid)) for pid in left]
            time.sleep(0.02)


class Forked:
    """A run that the fork server has started: what `Started` can do, three seconds sooner."""

    def __init__(self, server: ForkServer, *argv: object, **how: Any) -> None:
        self.child: Child = server.start(*argv, **how)
        self.code: int | None = None

    @property
    def pid(self) -> int:
        return self.child.pid

    def send(self, number: int) -> None:
        """Send it a signal."""
        self.child.send(number)

    def output(self) -> str:
        """What it has printed so far."""
        texts = (path.read_text("utf-8", "replace") for path in (self.child.out, self.child.err) if path.exists())
        return "\n".join(text[-6000:] for text in texts)

    def ended(self, within: float = 0) -> bool:
        """Whether it has ended after so many seconds."""
        if self.code is None:  # the server tells it once
            self.code = self.child.poll(within)
        return self.code is not None

    def until(self, condition: Callable[[], bool], what: str, seconds: float = 60) -> None:
        """Wait until something has come about; it fails if the run ends first."""
        deadline = time.monotonic() + allowed(seconds)
        while not condition():
            assert not self.ended() or condition(), f"ended with {self.code} before: {what}\n{self.output()}"
            assert time.monotonic() < deadline, f"not within {seconds} s: {what}\n{self.output()}"
            time.sleep(0.002)

    def held(self) -> bool:
        """Wait until it has stopped itself; False if it ends instead."""
        while not self.ended():
            with contextlib.suppress(OSError):
                if state(self.pid) == "T":
                    return True
            time.sleep(0.002)
        return False

    def end(self, within: float = 60) -> subprocess.CompletedProcess[str]:
        """Its end. The exit code is what a shell reports: 143 for a process that SIGTERM ended."""
        within = allowed(within)
        if not self.ended(within):
            self.send(signal.SIGKILL)
            self.ended(30)
            raise AssertionError(f"still running after {within} s\n{self.output()}")
        assert self.code is not None
        texts = [path.read_text("utf-8", "replace") for path in (self.child.out, self.child.err)]
        return subprocess.CompletedProcess(self.child.args, shell_code(self.code), *texts)


def train(*argv: object, **how: Any) -> Started:
    """`python train.py ...`"""
    return Started(sys.executable, ROOT / "train.py", *argv, **how)


def allowed(seconds: float) -> float:
    """Seconds that something promised within `seconds` may take here and now: as much longer as the machine is busy."""
    return seconds * max(1.0, 1.5 * os.getloadavg()[0] / (os.cpu_count() or 1))


def shell_code(code: int) -> int:
    """A return code of `subprocess` as a shell reports it."""
    return 128 - code if code < 0 else code


def pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]


def environment(pid: int) -> dict[str, str]:
    """The environment that a process was started with; empty for one that has ended."""
    try:
        words = Path(f"/proc/{pid}/environ").read_bytes().decode("utf-8", "replace").split("\0")
    except OSError:
        return {}
    return dict(word.split("=", 1) for word in words if "=" in word)


def line(pid: int) -> str:
    """The command line of a process."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
    return ""


def parent(pid: int) -> int:
    """The process that a process was started by; 0 for one that has ended."""
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def catches(pid: int, number: int, kind: str = "SigCgt") -> bool:
    """Whether a process has a handler of its own for a signal."""
    with contextlib.suppress(OSError):
        for row in Path(f"/proc/{pid}/status").read_text().splitlines():
            if row.startswith(kind):
                return bool(int(row.split()[1], 16) >> (number - 1) & 1)
    return False


def loaded(pid: int, library: str) -> bool:
    """Whether a process has begun to load a library of that name."""
    with contextlib.suppress(OSError):
        return library in Path(f"/proc/{pid}/maps").read_text()
    return False


def steps_done(run: Path) -> int:
    """The last step that metrics.jsonl tells the loss of; 0 before the first."""
    with contextlib.suppress(OSError):
        for text in reversed((run / "metrics.jsonl").read_text().splitlines()):
            with contextlib.suppress(ValueError):
                told = json.loads(text)
                if "loss" in told:
                    return int(told["step"])
    return 0


def error_lines(text: str) -> list[str]:
    """The lines by which the program says what went wrong."""
    return [found for found in text.splitlines() if found.startswith("error: ")]
