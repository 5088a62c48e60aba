"""Signals: a run that is asked to stop finishes the current step, saves a checkpoint and exits with 128 + signal.

The loop checks for a request between steps; work that can be repeated later, such as recording attention, is
interrupted at once.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from types import FrameType

NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
"""Ctrl-C; `kill`, a scheduler's warning; a closed terminal, which is SIGBREAK on Windows."""
SIGNALS = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
DUPLICATE_SECONDS = 0.3  # a second SIGINT within it is the same Ctrl-C, which the terminal and torchrun both deliver


class ShutdownRequested(BaseException):
    """Raised inside of interruptible work by a signal. A BaseException, so that no `except Exception` swallows it."""


class SignalHandler:
    """Remembers the first signal that asked the run to stop, in `signum`; 0 before that."""

    def __init__(self) -> None:
        self.signum = 0
        self._parent = os.getppid()
        self._received_at = 0.0
        self._interruptible = False

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Handle the signals while the body runs. Signals that were ignored before (`nohup`) stay ignored."""
        handled = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        previous = {number: signal.signal(number, self._handle) for number in handled}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signum and number == signal.SIGINT and now - self._received_at > DUPLICATE_SECONDS:
            os._exit(128 + number)  # a second Ctrl-C exits at once; half-written files have temporary names
        if not self.signum:
            self.signum, self._received_at = number, now
        if self._interruptible:
            self._interruptible = False
            raise ShutdownRequested

    def poll(self) -> int:
        """`signum`. If torchrun was killed, which then stops none of its processes, that counts as a SIGTERM."""
        if not self.signum and "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != self._parent:
            self.signum = signal.SIGTERM
        return self.signum

    def run_interruptible(self, action: Callable[[], None]) -> bool:
        """Run an action that can be repeated later; False if a signal interrupted it, or had come before."""
        with contextlib.suppress(ShutdownRequested):
            self._interruptible = True
            try:
                if not self.signum:
                    action()
            finally:
                self._interruptible = False
        return not self.signum
