"""What a run tells: a progress bar or plain lines, metrics.jsonl, and, on request, Weights & Biases.

Telling never stops training: an outage of wandb is one line on stderr, and the run goes on.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from common.errors import DISK_OR_MEMORY, UserError
from common.files import read_metrics
from training.checkpoint import TrainState
from training.text_generation import escape_text


class Metrics:
    """`metrics.jsonl`: one JSON object a line, each with its step; and `samples.txt`, which grows with it.

    A resumed run drops what lies beyond its step: there is no gap and no line twice.

    Args:
        folder: of the run.
        state: where the run begins or goes on.

    Raises:
        UserError: if the files can't be written (exit code 6).
    """

    def __init__(self, folder: Path, state: TrainState) -> None:
        path, self.samples = folder / "metrics.jsonl", folder / "samples.txt"
        lines = read_metrics(path)
        kept = [line for line in lines if belongs(line, state)]
        with writing(path):
            ends = [line["samples_end"] for line in kept if isinstance(line.get("samples_end"), int)]
            told = any("val_loss" in line for line in kept)  # without an end: samples are off, or of an older version
            if self.samples.exists() and (ends or not told):
                os.truncate(self.samples, min(self.samples.stat().st_size, max([0, *ends])))
            temporary = path.with_suffix(".writing")
            with temporary.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in kept)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            self.file = path.open("a", encoding="utf-8")

    def write(self, line: Mapping[str, Any]) -> None:
        """Append one line, at once."""
        with writing(Path(self.file.name)):
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()

    def write_sample(self, step: int, text: str) -> int:
        """Append a sample to `samples.txt`; where it ends there, in bytes, which belongs into the evaluation's line."""
        with writing(self.samples), self.samples.open("a", encoding="utf-8") as file:
            file.write(f"step {step}\n{text}\n\n")
            return file.tell()

    def sync(self) -> None:
        """Wait until every line is on the disk: a checkpoint must not outlive the metrics of its steps."""
        with writing(Path(self.file.name)):
            os.fsync(self.file.fileno())


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Tell the user of a file that can't be written (exit code 6)."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}", DISK_OR_MEMORY) from error


def belongs(line: Mapping[str, Any], state: TrainState) -> bool:
    """Whether a line of metrics belongs to a run that stands at `state`."""
    if "final_val_loss" in line or line["step"] > state.step:
        return False
    again = "val_loss" in line and line["step"] == state.step > state.last_eval_step  # that evaluation was broken off
    return not again


class Progress:
    """A bar with loss, tokens/s and the time left; plain lines where stderr is no terminal."""

    def __init__(self, first: int, steps: int, tokens_per_step: int, visible: bool) -> None:
        self.steps, self.tokens_per_step, self.first = steps, tokens_per_step, first
        self.visible, self.plain = visible, not sys.stderr.isatty()
        self.start = self.told = time.perf_counter()
        self.bar = tqdm(
            total=steps, initial=first, unit="step", disable=not visible or self.plain, dynamic_ncols=True, leave=False
        )

    def settle(self, steps: int) -> None:
        """Expect that many steps from now on."""
        self.steps = self.bar.total = steps

    def speed(self, step: int) -> float:
        """Tokens a second since the start."""
        return (step - self.first) * self.tokens_per_step / max(1e-9, time.perf_counter() - self.start)

    def step(self, step: int, loss: float | None) -> None:
        """Move on to `step`; `loss` where it is known."""
        self.bar.update(step - self.bar.n)
        if loss is None:
            return
        self.bar.set_postfix_str(f"loss {loss:.3f}, {self.speed(step):,.0f} tokens/s")
        now = time.perf_counter()
        if self.visible and self.plain and now - self.told > 10:
            self.told = now
            left = (now - self.start) * (self.steps - step) / max(1, step - self.first)
            self.say(f"step {step}/{self.steps}  loss {loss:.3f}  {self.speed(step):,.0f} tokens/s  {left:.0f} s left")

    def say(self, text: str) -> None:
        """Print a line without tearing the bar."""
        if not self.visible:
            return
        try:
            self.bar.write(escape_text(text), file=sys.stdout)
            sys.stdout.flush()
        except OSError:  # the terminal is closed, or the reader gone: the run goes on in silence
            self.visible = False
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115

    def close(self) -> None:
        """Take the bar away."""
        self.bar.close()
