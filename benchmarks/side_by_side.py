"""What every benchmark here stands on: contestants in turn, a command's time and memory, medians in tables, targets.

A machine is never equally fast twice, so nothing is compared with a figure of another run: contestants are measured
alternately, and what is read are medians, ratios, and shares of what the machine can do at most (`ceilings.py`),
measured in the same run. `results.py` keeps the page; `nanogpt.py` is the peer.

Nothing heavy is imported before it is needed: a benchmark that starts commands stays small itself.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar, cast

ROOT = Path(__file__).parent.parent
T = TypeVar("T")

LAUNCHER = """
import json, os, sys, time
told = int(sys.argv[1])
os.set_inheritable(told, False)
start = time.perf_counter()
child = os.posix_spawnp(sys.argv[2], sys.argv[2:], os.environ)
_, status, used = os.wait4(child, 0)
seconds = time.perf_counter() - start
os.write(told, json.dumps([seconds, used.ru_maxrss, os.waitstatus_to_exitcode(status)]).encode())
"""
"""Starts a command and waits for it. The system counts a process's memory from before it became another program: what
starts the command has to be small."""


@dataclass(frozen=True)
class Spent:
    """What a command took."""

    seconds: float
    """Wall time from its start to its end."""
    megabytes: float
    """Peak resident memory of the largest of its processes."""
    output: str
    errors: str
    code: int
    times: Sequence[float] = ()
    """Of each line of the output: seconds from the start until it was there."""

    def until(self, word: str) -> float:
        """Seconds until the first line that holds `word` was there."""
        return next(at for at, line in zip(self.times, self.output.splitlines(), strict=True) if word in line)


def spend(command: Sequence[str], folder: Path = ROOT, allowed: Sequence[int] = (0,), **environment: str) -> Spent:
    """Run a command to its end; where its exit code is not `allowed`, the benchmark ends with what it said."""
    read, write = os.pipe()
    lines, times = [], []
    with os.fdopen(read) as told, tempfile.TemporaryFile("w+") as errors:
        start = time.perf_counter()
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", LAUNCHER, str(write), *command],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, **environment},
                pass_fds=[write],
            )
        finally:
            os.close(write)
        with process:
            for line in cast(IO[str], process.stdout):
                lines.append(line.rstrip("\n"))
                times.append(time.perf_counter() - start)
        answer = told.read()
        errors.seek(0)
        said = errors.read()
    if not answer:
        sys.exit(f"{shlex.join(command)} could not be started:\n{said[-2000:]}")
    seconds, peak, code = json.loads(answer)
    if code not in allowed:
        sys.exit(f"{shlex.join(command)} ended with {code}:\n{said[-2000:]}")
    unit = 1e6 if sys.platform == "darwin" else 1e3  # bytes there, kilobytes elsewhere
    return Spent(seconds, peak / unit, "".join(f"{line}\n" for line in lines), said, code, times)


class Worker:
    """A contestant that is started once, gets warm, and works when asked.

    The program writes a JSON object a line: one when it is ready, one in answer to each line that it reads. Other lines
    are passed over.
    """

    def __init__(self, command: Sequence[str], folder: Path = ROOT, **environment: str) -> None:
        self.command = shlex.join(command)[:200]
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        self.ready = self.answer()

    def answer(self) -> dict[str, Any]:
        """The next object that it writes."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                return found
        sys.exit(f"{self.command} ended with {self.process.wait()} before it answered")

    def ask(self, word: object) -> dict[str, Any]:
        """Let it work; what it answers."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()
        return self.answer()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *reason: object) -> None:
        self.process.kill()
        self.process.communicate()


def peak_megabytes() -> float:
    """Peak resident memory of this process, of this program alone."""
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace")
        return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1e3  # type: ignore[index]
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def alternate(contestants: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """What each contestant measures, once in each round; who begins changes from round to round."""
    found: dict[str, list[T]] = {name: [] for name in contestants}
    names = list(contestants)
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            print(f"  round {number + 1} of {rounds}: {name}", file=sys.stderr, flush=True)
            found[name].append(contestants[name]())
    return found


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table that reads well as plain text, too; all columns but the first are flush right."""
    cells = [list(head), *([str(cell) for cell in row] for row in rows)]
    widths = [max(3, *(len(row[column]) for row in cells)) for column in range(len(head))]

    def line(row: Sequence[str]) -> str:
        padded = [
            row[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
        ]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(cells[0]), line(rule), *(line(row) for row in cells[1:])])


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """The median, and between what the values lie."""
    middle = format(statistics.median(values), form)
    return middle if len(values) == 1 else f"{middle} ({min(values):{form}}-{max(values):{form}})"


@dataclass(frozen=True)
class Target:
    """A figure beside what it should be."""

    what: str
    value: float
    bound: float
    at_most: bool = False
    form: str = ".2f"

    @property
    def held(self) -> bool:
        return self.value <= self.bound if self.at_most else self.value >= self.bound


def targets(found: Sequence[Target]) -> str:
    """The figures with a bound, in a table."""
    rows = [
        (t.what, f"{t.value:{t.form}}", f"{'<=' if t.at_most else '>='} {t.bound:{t.form}}", "yes" if t.held else "NO")
        for t in found
    ]
    return table(("target", "measured", "wanted", "held"), rows)


def options(description: str, rounds: int, nanogpt: bool = False) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, help="times that each contestant is measured, in turn")
    parser.add_argument("--record", action="store_true", help="write the results to benchmarks/RESULTS.md")
    if nanogpt:
        parser.add_argument("--nanogpt", type=Path, metavar="PATH", help="your clone of nanoGPT, the peer")
    return parser
