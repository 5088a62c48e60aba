"""Signals: a run that is asked to stop finishes the step in hand, saves, and says so by its exit code.

Ctrl-C (SIGINT), `kill` and a cluster's notice (SIGTERM), and a terminal that is closed (SIGHUP) all ask the same. The
loop looks for the request between steps; what can be done again later, such as looking at attention, is broken off.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from types import FrameType

REQUESTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ECHO = 0.3
"""Seconds within which a second signal is the first one's echo: a terminal and torchrun may both deliver it."""


class BrokenOff(BaseException):
    """Raised by a signal inside of what can be done again later. No `Exception`: nothing may swallow it."""


class Stop:
    """Remembers that the run was asked to stop, and by which signal."""

    def __init__(self) -> None:
        self.number = 0
        self._since = 0.0
        self._breakable = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take over the signals while the body runs. One that was ignored (`nohup`) stays ignored."""
        before = {number: signal.getsignal(number) for number in REQUESTS}
        heard = [number for number, handler in before.items() if handler is not signal.SIG_IGN]
        for number in heard:
            signal.signal(number, self._receive)
        try:
            yield
        finally:
            for number in heard:
                signal.signal(number, before[number])

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.number and number == signal.SIGINT and now - self._since > ECHO:
            os._exit(128 + number)  # a second Ctrl-C: at once; what is half-written has no name yet
        if not self.number:
            self.number, self._since = number, now
        if self._breakable:
            self._breakable = False
            raise BrokenOff

    def attempt(self, action: Callable[[], None]) -> bool:
        """Do what can be done again later; False if a signal broke it off, or came before."""
        try:
            self._breakable = True
            if not self.number:
                action()
            self._breakable = False
        except BrokenOff:
            return False
        finally:
            self._breakable = False
        return not self.number
