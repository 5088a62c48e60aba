"""A fault that a process injects into itself at its N-th file operation, by CPython's audit hooks."""

import errno
import itertools
import os
import re
import signal
import sys
from dataclasses import dataclass
from typing import Any

OPERATIONS = ("open", "os.rename", "os.mkdir", "os.remove", "os.chmod", "shutil.rmtree")
"""Events of Python (docs.python.org/3/library/audit_events.html)."""


@dataclass(frozen=True)
class Hook:
    """What happens before which operation: the first, second, ... of those that are counted."""

    at: int = 1
    do: str = "SIGKILL"  # a signal that the process sends itself, or the error of the operation, such as ENOSPC
    operation: str = ""  # count only this operation, such as rename
    path: str = ""  # count only paths in which this regular expression is found
    lasting: bool = False  # every later one fails as well, as on a disk that stays full


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

    def listen(event: str, args: tuple[Any, ...]) -> None:
        operation, path = file_operation(event, args)
        if not operation or hook.operation not in ("", operation) or not re.search(hook.path, path):
            return
        count = next(counter)
        if count < hook.at or (count > hook.at and not hook.lasting):
            return
        if hook.do.startswith("SIG"):
            os.kill(os.getpid(), getattr(signal, hook.do))
        else:
            number = getattr(errno, hook.do)
            raise OSError(number, os.strerror(number), path)

    sys.addaudithook(listen)
