"""System calls of a stopped process, read and tampered with by strace: what really reaches the kernel.

`calls` lists what a process asked of the kernel about a folder; `Call.as_nth` turns one of them into the options that
let strace meet the same call again in a process that does the same, and kill that process or let the call fail.
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults.forkserver import Child

CHANGES = ("mkdir", "openat", "write", "pwrite64", "fsync", "fdatasync", "rename", "renameat2", "unlinkat", "rmdir")
"""The calls by which a save changes the disk; also under their older and newer names."""
OTHER_NAMES = ("?mkdirat", "?renameat", "?unlink", "?open", "?ftruncate", "?fallocate", "?pwritev", "?writev")
TRACED = ",".join(["?" + name for name in CHANGES] + list(OTHER_NAMES))
LINE = re.compile(r"^(\d+) +(\w+)\((.*)\) += (-?\d+)")
QUOTED_OR_OPEN = re.compile(r'"([^"]*)"|<([^>]*)>')


@dataclass(frozen=True)
class Call:
    """A system call, as strace tells it."""

    name: str
    paths: tuple[str, ...]
    """Of its arguments: names, and what its open files are called."""
    text: str
    thread: str
    """`main`, or `other`."""
    at: int
    """How many calls of this name the thread has made, this one included."""

    @property
    def changes(self) -> bool:
        """Whether the disk is different afterwards; opening a file to read it changes nothing."""
        return self.name not in ("openat", "open") or "O_CREAT" in self.text or "O_WRONLY" in self.text

    def as_nth(self, harm: str) -> list[str]:
        """Options of strace that do harm to this call: `signal=KILL`, or `error=EIO`."""
        return ["-e", f"inject={self.name}:{harm}:when={self.at}"]


def require_strace() -> None:
    """Skip the test where strace is missing or may not look at another process."""
    if not shutil.which("strace"):
        pytest.skip("strace is not installed")
    with subprocess.Popen(["sleep", "60"]) as sleeper:
        tracer = subprocess.Popen(["strace", "-p", str(sleeper.pid), "-o", "/dev/null"], stderr=subprocess.PIPE)
        assert tracer.stderr is not None
        said = tracer.stderr.readline().decode()
        tracer.terminate()
        tracer.communicate()
        sleeper.kill()
    if "attached" not in said:
        pytest.skip(f"strace may not attach to processes here: {said.strip()}")


def under_strace(child: Child, log: Path, options: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """Attach strace to a child that has stopped itself, let the child go on, and wait for its end."""
    assert child.held()
    command = ["strace", "-f", "-y", "-s", "0", "-e", f"trace={TRACED}", *options, "-o", str(log), "-p", str(child.pid)]
    tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert tracer.stderr is not None
    deadline = time.monotonic() + 30
    while "attached" not in (said := tracer.stderr.readline()):
        assert time.monotonic() < deadline and tracer.poll() is None, said
    child.send(signal.SIGCONT)
    done = child.end()
    tracer.communicate(timeout=30)
    return done


def calls(log: Path, folder: Path, pid: int) -> list[Call]:
    """The calls of process `pid` about paths in a folder, in their order."""
    found, count = [], Counter[tuple[str, str]]()
    for line in log.read_text("utf-8", "replace").splitlines():
        if not (matched := LINE.match(line)):
            continue
        thread, name, arguments, _ = matched.groups()
        paths = tuple(a or b for a, b in QUOTED_OR_OPEN.findall(arguments) if (a or b).startswith("/"))
        here = tuple(path for path in paths if path.startswith(str(folder)))
        count[thread, name] += 1
        if here:
            kind = "main" if int(thread) == pid else "other"
            found.append(Call(name, here, line.split(None, 1)[1], kind, count[thread, name]))
    return found
