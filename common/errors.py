"""The one error that a user sees, and the exit codes.

A leaf: it imports nothing of ours, so that every part of the house can raise `UserError` where the trouble is known.
It is caught once, in each script's `main()`.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import gc
import io
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

CONFIG = 2
DATA = 3
CHECKPOINT = 4
NON_FINITE = 5
DISK_OR_MEMORY = 6
IN_USE = 7
LOST_PROCESS = 8
INTERRUPTED = 130

AGAIN = 0.05
"""Seconds after which a signal that came while a module was imported is looked at once more."""
TURN = 3.0
"""Seconds that a process waits for the first one to say what is wrong with the settings."""

DISK_FAILURES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
"""What the system says of a disk that is full, broken or locked: no bug of ours, wherever it is met."""


class UserError(Exception):
    """Something the user can mend. `message` says what is wrong, where, and what to do, in one line."""

    def __init__(self, message: str, exit_code: int = CONFIG) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def escape_control_chars(text: object) -> str:
    """`text` with control characters and lone surrogates escaped, so that no file name or token drives a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in str(text))


def run_main(main: Callable[[list[str]], None]) -> None:
    """Run a script: a `UserError` becomes one line on stderr and its exit code; any other error is a bug.

    `--debug` anywhere on the command line shows the traceback of a `UserError` too. A reader that goes away
    (`| head`) ends the program quietly. SIGTERM ends it as Ctrl-C does, so that what is half-written is tidied up;
    the training loop has its own way (`training/signals.py`).
    """
    seldom_collect()
    try:
        with Asked().listening():
            run(main)
    except BaseException as end:
        if "RANK" in os.environ:
            leave(end)
        raise
    if "RANK" in os.environ:
        leave(SystemExit(0))


def seldom_collect() -> None:
    """Let Python look for cycles of objects seldom, and at the end of the process not at all.

    Loading torch makes hundreds of thousands of objects that stay. Looking through them, many times while they come and
    once more at the end, takes a third of the time of a short command.
    """
    gc.set_threshold(100_000, 20, 100)
    atexit.register(gc.freeze)


class Asked:
    """Ends the program on SIGINT or SIGTERM, and remembers that it was asked to.

    What a signal's handler raises can get lost: who imports a library that need not be there often takes any exception
    for a sign that it is not; in torch's own libraries it can abort the process. So what is being imported comes to
    its end first, a start looks once more before it leaves anything behind (`end_if_asked`), and so does the end.
    """

    number = 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if number != signal.SIGALRM:
            self.number = number
        if is_importing(frame):
            signal.setitimer(signal.ITIMER_REAL, AGAIN)
        else:
            sys.exit(128 + self.number)

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take over the signals, but one that is ignored (`nohup`, `&`).

        Whatever came of one that got lost, the program ends as it asks. After the body a signal ends the process
        at once and without a word: all is written, and the exit handlers of libraries can't stand an exception.
        """
        numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
        for number in (*numbers, signal.SIGALRM):
            signal.signal(number, self)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            for number in (*numbers, signal.SIGALRM):
                signal.signal(number, signal.SIG_DFL)
            if self.number:
                sys.exit(128 + self.number)


def is_importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported where the program stands."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def end_if_asked() -> None:
    """End the program if a signal has asked for it and the exception got lost."""
    for number in (signal.SIGINT, signal.SIGTERM):
        asked = signal.getsignal(number)
        if isinstance(asked, Asked) and asked.number:
            sys.exit(128 + asked.number)


def leave(end: BaseException) -> NoReturn:
    """End one of torchrun's processes after its exit handlers, but without taking anything down; `end` is still held.

    A thread of gloo that lets go of a tensor needs Python's lock for it. If Python is being taken down by then, the
    process is aborted, which torchrun takes for a failure (pytorch pull request 179291). If DDP is, which waits for the
    thread and holds the lock, the process hangs. What an exception has passed through lives as long as the exception.
    """
    if isinstance(end, SystemExit):
        code = int(end.code or 0)
    else:
        code = 1
        sys.excepthook(type(end), end, end.__traceback__)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


def run(main: Callable[[list[str]], None]) -> None:
    """What `run_main` does, up to the end of the process."""
    for stream in (sys.stdout, sys.stderr):  # a terminal that can't show a character gets its code, not a traceback
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    argv = sys.argv[1:]
    debug = "--debug" in argv
    try:
        main([a for a in argv if a != "--debug"])
        sys.stdout.flush()
    except UserError as error:
        end_if_asked()  # what came of a lost signal need not be said
        refuse(error, debug)
    except BrokenPipeError:
        # Python would complain again while it flushes stdout at exit; there is nobody left to read.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        if error.errno not in DISK_FAILURES:
            raise
        refuse(UserError(f"cannot write {error.filename or 'a file'}: {error.strerror}", DISK_OR_MEMORY), debug)
    except KeyboardInterrupt:  # somebody else's
        sys.exit(INTERRUPTED)


def refuse(error: UserError, debug: bool) -> NoReturn:
    """Say what is wrong and end with its exit code. Of torchrun's processes one speaks for all of a wrong setting."""
    if debug:
        for line in "".join(traceback.format_exception(error)).splitlines():
            print(escape_control_chars(line), file=sys.stderr)
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    # What is wrong with the text is most often wrong everywhere; the first of the machine's processes comes first.
    who = f"error (process {os.environ.get('RANK')})" if error.exit_code == DATA and not first else "error"
    if first or error.exit_code != CONFIG:
        for line in str(error).splitlines():
            print(f"{who}: {escape_control_chars(line)}", file=sys.stderr)
    else:
        time.sleep(TURN)  # torchrun ends all once one has ended: not before the first has spoken
    sys.exit(error.exit_code)
