"""`UserError`, the exit codes, and `run_main`, which every script runs in. Imports no other module of the project."""

import atexit
import contextlib
import errno
import gc
import io
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

CONFIG = 2
DATA = 3
CHECKPOINT = 4
NON_FINITE = 5
DISK_OR_MEMORY = 6
IN_USE = 7
LOST_PROCESS = 8

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)  # a disk that is full or broken
STEERS_TERMINAL = re.compile("[\0-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")  # C0, C1, bidi, surrogates
RANK_ZERO_SECONDS = 3.0  # the other processes of torchrun wait so long for rank 0 to report bad options or data


class UserError(Exception):
    """Something the user can fix. Each message is one line: what is wrong, where, what to do; it may quote any file."""

    def __init__(self, message: str | list[str], exit_code: int = CONFIG) -> None:
        messages = [message] if isinstance(message, str) else message
        super().__init__("\n".join(map(escape_control_chars, messages)))
        self.exit_code = exit_code


class RemovedError(UserError):
    """A file or folder does not exist; if it was listed before, it has been removed since."""


def escape_control_chars(text: object, keep: str = "") -> str:
    """`text` with escapes for what could steer a terminal or end a line, but for the characters in `keep`."""
    return STEERS_TERMINAL.sub(lambda m: m[0] if m[0] in keep else ascii(m[0])[1:-1], str(text))


def warn(message: str) -> None:
    print(escape_control_chars(message), file=sys.stderr, flush=True)


def quote_arg(word: object) -> str:
    """`word` as one argument of a command that the user may type, in the shell of this system."""
    return subprocess.list2cmdline([str(word)]) if os.name == "nt" else shlex.quote(str(word))


def is_out_of_memory(error: Exception) -> bool:  # torch raises a RuntimeError where CPU memory ran out
    return isinstance(error, MemoryError) or bool(re.search("(allocate|out of|not enough) memory", str(error)))


def run_main(main: Callable[[list[str]], object]) -> None:
    """Run a script. A `UserError` becomes one line on stderr and its exit code; any other error is a bug.

    SIGINT and SIGTERM exit with 130 and 143 and without a traceback; the training loop handles them itself
    (`training/signals.py`). A closed pipe (`| head`) ends the program quietly.
    """
    os.environ["MPLBACKEND"] = "agg"  # matplotlib cannot be imported with a backend that it does not know
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # waiting threads that spin longer stall while other programs run
    # Collect garbage rarely, and not at exit: the hundreds of thousands of objects of torch cost a third of a start.
    gc.set_threshold(100_000, 20, 100)
    atexit.register(gc.freeze)
    for stream in (sys.stdout, sys.stderr):  # a terminal without a character gets its code, not a traceback
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    signals = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
    for number in signals:  # those that are ignored (`nohup`, `&`) stay ignored
        signal.signal(number, exit_on_signal)
    try:
        _run(main)
    finally:
        for number in signals:  # exit handlers of libraries cannot cope with an exception
            signal.signal(number, signal.SIG_DFL)
        if "RANK" in os.environ:
            exit_without_teardown(sys.exception())


def exit_on_signal(number: int, frame: FrameType | None) -> None:
    """Exit with 128 + signal. During an import the process ends at once: importers often catch any exception, and one
    inside of torch's libraries aborts the process."""
    while frame is not None and frame.f_code.co_filename != "<frozen importlib._bootstrap>":
        frame = frame.f_back
    if frame is None:
        sys.exit(128 + number)
    with contextlib.suppress(OSError, RuntimeError):
        sys.stdout.flush()
    os._exit(128 + number)


def exit_without_teardown(error: BaseException | None) -> NoReturn:
    """End a process of torchrun after its exit handlers, without tearing down the interpreter.

    A gloo thread that releases a tensor during teardown aborts the process or deadlocks (pytorch pull request 179291).
    """
    code = int(error.code or 0) if isinstance(error, SystemExit) else int(error is not None)
    if error is not None and not isinstance(error, SystemExit):
        sys.excepthook(type(error), error, error.__traceback__)
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(code)


def _run(main: Callable[[list[str]], object]) -> None:
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except UserError as error:
        _report(str(error), error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python fails again when it flushes
        sys.exit(0)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        _report("out of memory; ask for less at once, or free some memory", DISK_OR_MEMORY)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        _report(f"cannot write {error.filename or 'a file'}: {error.strerror}", DISK_OR_MEMORY)


def _report(message: str, exit_code: int) -> NoReturn:
    """Print what is wrong and exit. torchrun ends the other processes once rank 0 has reported bad options or data."""
    is_late = exit_code in (CONFIG, DATA) and os.environ.get("LOCAL_RANK", "0") != "0"
    if is_late:
        time.sleep(RANK_ZERO_SECONDS)
    process = f" (process {os.environ.get('RANK')})" if is_late else ""
    for line in message.splitlines():
        warn(f"error{process}: {line}")
    sys.exit(exit_code)
