"""What a run tells to Weights & Biases, on request, behind the back of training.

wandb lives in a process of its own (`wandb_process.py`), which a thread feeds from a bounded queue. So nothing that
wandb does, be it to fail, to hang, to print, to catch signals or to wait at exit, can stop training, slow it, or keep
it from ending: it is said in one line on stderr, and the run goes on without it.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import json
import re
import secrets
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from common.errors import escape_control_chars
from training.config import RunConfig

PROGRAM = Path(__file__).parent / "wandb_process.py"
ROOM = 32_000_000
"""Bytes that may wait to be sent."""
PATIENCE = 30.0
"""Seconds that `close` waits at most, for what is still being sent."""
SILENCE = 10.0
"""Seconds that it waits without a word from wandb, unless it is sending the last of it."""


class Tracker:
    """One run there. Its numbers, samples and pictures are sent as they come; `log` never waits.

    A resumed run goes on in the same run there, whose id is kept in the run folder. Offline, wandb begins another
    folder with the same id, and `wandb sync` joins the folders of an id in the order of time.

    Args:
        folder: the run's; wandb writes into its folder `wandb`.
        name: the run's name there.
        visible: False in processes that tell nothing.
        patience: see `PATIENCE`.
        silence: see `SILENCE`.
        room: see `ROOM`.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        name: str,
        visible: bool,
        patience: float = PATIENCE,
        silence: float = SILENCE,
        room: int = ROOM,
    ) -> None:
        self.patience, self.silence, self.room = patience, silence, room
        self.process: subprocess.Popen[bytes] | None = None
        self.waiting: deque[bytes] = deque()
        self.held = 0  # bytes in `waiting`
        self.changed = threading.Condition()
        self.closing = self.over = self.out = self.finishing = self.crowded = False
        self.heard = time.monotonic()
        if config.log.wandb == "disabled" or not visible:
            return
        try:
            keywords = {
                "project": escape_control_chars(config.log.wandb_project),
                "name": escape_control_chars(name),
                "dir": str(folder.absolute()),
                "mode": config.log.wandb,
                "config": dataclasses.asdict(config),
                "allow_val_change": True,
                "id": run_id(folder),
                "resume": "allow",
            }
            self.put({"init": keywords, "argv": sys.argv, "patience": patience})
            # Without the current folder among the places to import from (-P), which may hold wandb's own output; and in
            # a session of its own, so that Ctrl-C in a terminal is the trainer's alone.
            self.process = subprocess.Popen(
                [sys.executable, "-P", str(PROGRAM)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            self.give_up(f"{type(error).__name__}: {error}")
            return
        assert self.process.stdin is not None and self.process.stdout is not None
        threading.Thread(target=self.feed, args=(self.process.stdin,), daemon=True).start()
        threading.Thread(target=self.listen, args=(self.process, self.process.stdout), daemon=True).start()

    def log(self, step: int, values: Mapping[str, Any], sample: str | None = None, image: Path | None = None) -> None:
        """Send numbers, and perhaps a sample of text and a picture, which is read now: its file may be replaced."""
        if self.process is None:
            return
        row: dict[str, Any] = {"step": step, "values": dict(values)}
        if sample is not None:
            row["sample"] = sample
        if image is not None:
            with contextlib.suppress(OSError):  # a picture less
                row["image"] = (image.stem, image.suffix, base64.b64encode(image.read_bytes()).decode())
        self.put(row)

    def put(self, row: Mapping[str, Any]) -> None:
        """Queue a line; one that finds no room is dropped."""
        line = json.dumps(row, default=str, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        with self.changed:
            if self.held + len(line) <= self.room or "close" in row:
                self.waiting.append(line)
                self.held += len(line)
                self.changed.notify_all()
                return
            told, self.crowded = self.crowded, True
        if not told:
            self.say("wandb does not keep up; some lines are not sent")

    def feed(self, pipe: IO[bytes]) -> None:
        """Send what is queued, until the run is closed."""
        with contextlib.suppress(OSError), pipe:  # where the process has ended, `listen` says so
            while True:
                with self.changed:
                    self.changed.wait_for(lambda: self.waiting or self.closing)
                    if not self.waiting:
                        return
                    line = self.waiting.popleft()
                    self.held -= len(line)
                pipe.write(line)
                pipe.flush()

    def listen(self, process: subprocess.Popen[bytes], pipe: IO[bytes]) -> None:
        """Take note of every word of wandb's, until its last."""
        word = ""
        with pipe:
            for line in pipe:
                word = line.decode("utf-8", "replace").rstrip("\n")
                with self.changed:
                    self.heard = time.monotonic()
                    self.finishing = word == "finishing"
                    self.changed.notify_all()
                if word == "done" or word.startswith("failed "):
                    break
        if word.startswith("failed "):
            self.give_up(word.removeprefix("failed "))
        elif word != "done":
            self.give_up(f"its process ended with {process.wait()}")
        with self.changed:
            self.over = True
            self.changed.notify_all()

    def close(self, exit_code: int = 0, patience: float | None = None) -> None:
        """End the run there, and wait until everything is sent, for `patience` seconds at most.

        Args:
            exit_code: 0 marks the run there as finished, anything else as failed.
        """
        if self.process is None:
            return
        begun = time.monotonic()
        self.put({"close": exit_code})
        with self.changed:
            self.closing = True
            self.changed.notify_all()
            while not self.over:
                now, end = time.monotonic(), begun + (self.patience if patience is None else patience)
                if not self.finishing:
                    end = min(end, max(begun, self.heard) + self.silence)
                if now >= end:
                    break
                self.changed.wait(end - now)
            late = not self.over
        if late:
            self.give_up(f"no answer within {time.monotonic() - begun:.0f} s")
        else:
            self.end(at_most=2.0)

    def end(self, at_most: float = 0.0) -> None:
        """See to it that its process has ended; wandb's service ends with it."""
        process, self.process = self.process, None
        if process is None:
            return
        try:
            process.wait(at_most)
        except subprocess.TimeoutExpired:
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # a process that hangs in the kernel is left to it
                process.wait(1.0)

    def give_up(self, reason: str) -> None:
        """Say once that wandb is out, and go on without it."""
        with self.changed:
            told, self.out = self.out, True
        self.end()
        if not told:
            self.say(f"wandb is out ({escape_control_chars(reason)[:200]}); training goes on without it")

    def say(self, text: str) -> None:
        """A line on stderr, beside the progress bar."""
        tqdm.write(text, file=sys.stderr)


def run_id(folder: Path) -> str:
    """The id of the run there: the one that the run folder keeps, or a new one.

    Raises:
        OSError: if it can't be kept.
    """
    file = folder / "wandb" / "run-id.txt"
    with contextlib.suppress(OSError, UnicodeDecodeError):
        kept = file.read_text(encoding="ascii").strip()
        if re.fullmatch(r"[0-9a-z]{8}", kept):
            return kept
    fresh = secrets.token_hex(4)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(fresh + "\n", encoding="ascii")
    return fresh
