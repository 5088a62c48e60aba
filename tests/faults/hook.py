"""Harm that a process does to itself, by CPython's audit hooks: it ends, stops or fails at its N-th file operation.

Two kinds of operation are counted: those of a save, which `training/checkpoint.py` announces as `glassgpt.disk`
(operation, path); and, with `under`, Python's own audit events below that folder: `open` for writing, `rename`,
`mkdir`, `remove`, `rmdir`.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from dataclasses import dataclass
from typing import Any

DISK = "glassgpt.disk"
OWN = {"os.rename": "rename", "os.mkdir": "mkdir", "os.remove": "remove", "os.rmdir": "rmdir", "open": "open"}


@dataclass(frozen=True)
class Hook:
    """What happens, and when."""

    at: int = 0
    """The operation, counted from 1, before which it happens; 0: never, operations are only logged."""
    do: str = "SIGKILL"
    """A signal that the process sends itself, such as SIGKILL or SIGSTOP; or the name of an error that the operation
    fails with, such as ENOSPC."""
    operation: str = ""
    """Count only this operation, such as `write`."""
    path: str = ""
    """Count only paths that hold this text."""
    lasting: bool = False
    """Every later operation of that kind fails as well, as on a disk that stays full."""
    under: str = ""
    """Count Python's own operations below this folder instead of a save's."""
    log: str = ""
    """A file that gets a line for each counted operation: operation and path."""


def install(hook: Hook) -> None:
    """Let it happen in this process."""
    lock, count = threading.Lock(), 0
    log = os.open(hook.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if hook.log else -1

    def listen(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        operation, path = parse_event(event, args, hook.under)
        if not operation or hook.operation not in ("", operation) or hook.path not in path:
            return
        with lock:
            count += 1
            now = count
        if log >= 0:
            os.write(log, f"{operation} {path}\n".encode())
        if hook.at and (now == hook.at or (hook.lasting and now > hook.at)):
            strike(hook.do, path)

    sys.addaudithook(listen)


def parse_event(event: str, args: tuple[Any, ...], under: str) -> tuple[str, str]:
    """(operation, path) of an event that counts; two empty strings for another."""
    if event == DISK and not under:
        return str(args[0]), str(args[1])
    if under and event in OWN and isinstance(args[0], str | bytes | os.PathLike):
        path = os.path.abspath(os.fsdecode(args[0]))
        writes = event != "open" or bool((args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))
        if writes and (path + os.sep).startswith(os.path.abspath(under) + os.sep):
            return OWN[event], path
    return "", ""


def strike(what: str, path: str) -> None:
    """Send this process a signal, or fail."""
    if what.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, what))
        return
    number = getattr(errno, what)
    raise OSError(number, os.strerror(number), path)
