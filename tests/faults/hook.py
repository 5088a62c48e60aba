"""A fault that a process injects into itself at its N-th file operation, by CPython's audit hooks."""

import errno
import itertools
import os
import signal
import sys
from dataclasses import dataclass
from typing import Any

OPERATIONS = ("open", "os.rename", "os.mkdir", "os.remove", "os.chmod", "shutil.rmtree")
"""Events of Python (docs.python.org/3/library/audit_events.html)."""


@dataclass(frozen=True)
class Hook:
    """What happens, and before which operation."""

    at: int = 0  # counted from 1; 0: never, operations are only logged
    do: str = "SIGKILL"  # a signal that the process sends itself, or the error of the operation, such as ENOSPC
    operation: str = ""  # count only this operation, such as rename
    path: str = ""  # count only paths that contain this text
    lasting: bool = False  # every later one fails as well, as on a disk that stays full
    log: str = ""  # a file that gets a line for each counted operation: operation and path


def file_operation(event: str, args: tuple[Any, ...]) -> tuple[str, str]:
    """(operation, path) of an audit event that changes a file or opens it for `fsync`; empty strings for another."""
    if event not in OPERATIONS or not isinstance(args[0], str | bytes | os.PathLike):
        return "", ""
    if event == "open" and args[1] in ("r", "rb"):
        return "", ""
    return event.rpartition(".")[2], os.path.abspath(os.fsdecode(args[0]))


def install(hook: Hook) -> None:
    """Let it happen in this process."""
    counter = itertools.count(1)
    log = os.open(hook.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if hook.log else -1

    def listen(event: str, args: tuple[Any, ...]) -> None:
        operation, path = file_operation(event, args)
        if not operation or hook.operation not in ("", operation) or hook.path not in path:
            return
        count = next(counter)
        if log >= 0:
            os.write(log, f"{operation} {path}\n".encode())
        if hook.at and (count == hook.at or (hook.lasting and count > hook.at)):
            if hook.do.startswith("SIG"):
                os.kill(os.getpid(), getattr(signal, hook.do))
            else:
                number = getattr(errno, hook.do)
                raise OSError(number, os.strerror(number), path)

    sys.addaudithook(listen)
