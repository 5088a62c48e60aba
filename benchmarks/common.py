"""What all benchmarks use: interleaved measurements, time and memory of commands, tables, and sections of RESULTS.md.

No machine is equally fast twice, so contestants are measured alternately in one run, and reported as medians, ratios and
shares of what the machine reaches in matrix products and memory reads. torch is imported where it is needed, because a
benchmark that starts commands should be small itself.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import IO, Any, TypeVar, cast

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "RESULTS.md"
HEADING = """# What the benchmarks measured

Written by the commands themselves (`--record`). Ratios and shares carry over to other machines better than seconds.

"""
T = TypeVar("T")
LAUNCHER = """
import json, os, sys, time
out = int(sys.argv[1])
os.set_inheritable(out, False)
start = time.perf_counter()
child = os.posix_spawnp(sys.argv[2], sys.argv[2:], os.environ)
_, status, used = os.wait4(child, 0)
seconds = time.perf_counter() - start
os.write(out, json.dumps([seconds, used.ru_maxrss, os.waitstatus_to_exitcode(status)]).encode())
"""
"""Starts a command from a small process: a child's peak memory includes that of the process that forked it."""


@dataclass(frozen=True)
class CommandResult:
    """Time, memory and output of a command."""

    seconds: float
    megabytes: float  # peak resident memory of its largest process
    output: str
    line_times: Sequence[float]  # seconds after the start at which each line of the output was printed

    def seconds_until(self, text: str) -> float:
        """When the first line with `text` was printed."""
        lines = zip(self.line_times, self.output.splitlines(), strict=True)
        return next(seconds for seconds, line in lines if text in line)


def run_command(command: Sequence[str], folder: Path = ROOT, exit_codes: Sequence[int] = (0,)) -> CommandResult:
    """Run a command; exits with its error if its exit code is not one of `exit_codes`."""
    read, write = os.pipe()
    lines, times = [], []
    with os.fdopen(read) as answer, tempfile.TemporaryFile("w+") as errors:
        start = time.perf_counter()
        launcher = [sys.executable, "-I", "-S", "-c", LAUNCHER, str(write), *command]
        streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": errors}
        process = subprocess.Popen(launcher, cwd=folder, text=True, pass_fds=[write], **streams)
        os.close(write)
        with process:
            for line in cast(IO[str], process.stdout):
                lines.append(line)
                times.append(time.perf_counter() - start)
        result = answer.read()
        errors.seek(0)
        stderr = errors.read()
    seconds, peak, code = json.loads(result) if result else (0.0, 0.0, None)
    if code not in exit_codes:
        sys.exit(f"{shlex.join(command)} ended with {code}:\n{stderr[-2000:]}")
    return CommandResult(seconds, peak / (1e6 if sys.platform == "darwin" else 1e3), "".join(lines), times)


def seconds_until(command: Sequence[str], condition: Callable[[str], bool]) -> float:
    """Seconds from a command's start until `condition` holds for its output so far; then it is killed."""
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=errors)
        try:
            while True:
                ended = process.poll() is not None
                if condition(os.pread(output.fileno(), 1 << 22, 0).decode(errors="replace")):
                    return time.perf_counter() - start
                if ended:
                    stderr = os.pread(errors.fileno(), 1 << 22, 0).decode(errors="replace")
                    sys.exit(f"{shlex.join(command)} ended too soon:\n{stderr[-2000:]}")
                time.sleep(0.005)
        finally:
            process.kill()
            process.wait()


class Worker:
    """A contestant that is started once, warms up, and works when asked.

    It writes a line of JSON when it is ready, and one for each line that it reads. Other lines are ignored.
    """

    def __init__(self, command: Sequence[str], folder: Path = ROOT) -> None:
        self.command = shlex.join(command)[:200]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, cwd=folder, text=True, **pipes)
        self.ready = self.answer()

    def answer(self) -> dict[str, Any]:
        """The next object that it writes."""
        for line in cast(IO[str], self.process.stdout):
            if line.startswith("{"):
                return cast(dict[str, Any], json.loads(line))
        sys.exit(f"{self.command} ended with {self.process.wait()} before it answered")

    def ask(self, line: object) -> dict[str, Any]:
        """Let it work; its answer."""
        print(line, file=self.process.stdin, flush=True)
        return self.answer()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *reason: object) -> None:
        self.process.kill()
        self.process.communicate()


def interleave(contestants: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """What each contestant measures, once in each round; the first one changes from round to round."""
    results: dict[str, list[T]] = {name: [] for name in contestants}
    names = list(contestants)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            print(f"  round {i + 1} of {rounds}: {name}", file=sys.stderr, flush=True)
            results[name].append(contestants[name]())
    return results


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table, aligned; all columns but the first are flush right."""
    cells = [list(head), *([str(cell) for cell in row] for row in rows)]
    widths = [max(3, *(len(row[column]) for row in cells)) for column in range(len(head))]

    def line(row: Sequence[str]) -> str:
        rest = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        return "| " + " | ".join([row[0].ljust(widths[0]), *rest]) + " |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(cells[0]), line(rule), *(line(row) for row in cells[1:])])


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """The median, and the range."""
    middle = format(statistics.median(values), form)
    return middle if len(values) == 1 else f"{middle} ({min(values):{form}}-{max(values):{form}})"


TARGET_HEAD = ("target", "measured", "wanted", "held")


def target(name: str, value: float, bound: float, at_most: bool = False, form: str = ".2f") -> tuple[str, ...]:
    """A row of a table of figures with their bounds."""
    holds = value <= bound if at_most else value >= bound
    return name, f"{value:{form}}", f"{'<=' if at_most else '>='} {bound:{form}}", "yes" if holds else "NO"


@dataclass
class Report:
    """What a benchmark prints, kept for RESULTS.md."""

    lines: list[str] = field(default_factory=list)

    def add(self, text: str) -> None:
        """Print a paragraph or a table, and keep it."""
        print(text + "\n", flush=True)
        self.lines += [text, ""]


@contextmanager
def report(name: str, record: bool) -> Iterator[Report]:
    """A benchmark's report, which starts with the machine; `record` makes it a section of RESULTS.md."""
    result = Report()
    result.add(f"{machine()}.")
    yield result
    if record:
        date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
        heading = f"`{command_line(sys.argv[1:])}`, {date}, commit {commit()}."
        write_section(RESULTS, name, "\n".join([heading, "", *result.lines]))
        print(f"recorded in {RESULTS.relative_to(ROOT)}")


def machine() -> str:
    """One line: CPU, cores, its matrix instructions, GPU, versions."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    cpu = next(iter(re.findall(r"model name\s*:\s*(.+)", info)), platform.machine())
    known = [name for name in ("amx_tile", "amx_bf16", "avx512_bf16", "avx512f") if name in set(info.split())]
    parts = [f"{cpu}, {os.cpu_count()} cores ({', '.join(known) or 'neither AMX nor AVX-512'})"]
    if "torch" in sys.modules and (cuda := sys.modules["torch"].cuda).is_available():
        parts.append(f"{cuda.device_count()} x {cuda.get_device_name()}")
    return "; ".join([*parts, f"Python {platform.python_version()}, torch {metadata.version('torch')}"])


def commit() -> str:
    """The commit that is measured, with `-dirty` if files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip() or "none"


def command_line(argv: Sequence[str]) -> str:
    """This benchmark's command without paths of this machine."""
    words = ["PATH" if word.startswith(("/", "~", ".")) else re.sub(r"=[/~.].*", "=PATH", word) for word in argv]
    return shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *words])


def write_section(path: Path, name: str, text: str) -> None:
    """Write or replace a section of the results; sections are sorted by name."""
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    sections = dict(re.findall(r"^## (\S+)\n\n(.*?)(?=^## |\Z)", before, re.M | re.S))
    sections[name] = text.strip() + "\n\n"
    content = HEADING + "".join(f"## {key}\n\n{sections[key]}" for key in sorted(sections))
    path.write_text(content.rstrip() + "\n", encoding="utf-8")


def parser(description: str | None, rounds: int, nanogpt: bool = False) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--rounds", type=int, default=rounds, help="measurements of each contestant, interleaved")
    result.add_argument("--record", action="store_true", help="write the results to benchmarks/RESULTS.md")
    if nanogpt:
        result.add_argument("--nanogpt", type=Path, metavar="PATH", help="your clone of nanoGPT")
    return result


def best_seconds(work: Callable[[], object], seconds: float = 0.5) -> float:
    """The fastest of as many calls as fit into so many seconds, at least five, after one to warm up."""
    import torch

    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    times: list[float] = []
    while len(times) < 6 or sum(times[1:]) < seconds:
        start = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def matmul_flops(shape: tuple[int, int, int], dtype: Any, device: str = "cpu", seconds: float = 0.5) -> float:
    """FLOP/s of the matrix product (m, k) @ (k, n)."""
    import torch

    m, k, n = shape
    a, b = torch.randn(m, k, device=device, dtype=dtype), torch.randn(k, n, device=device, dtype=dtype)
    return 2 * m * k * n / best_seconds(lambda: a @ b, seconds)


def gpt_matrices(n_layers: int, d_model: int, vocab_size: int) -> list[tuple[int, int]]:
    """Shapes (output, input) of all matrices that a token of a GPT-2 is multiplied with."""
    block = [(3 * d_model, d_model), (d_model, d_model), (4 * d_model, d_model), (d_model, 4 * d_model)]
    return [*block * n_layers, (vocab_size, d_model)]


def train_flops_per_token(matrix_parameters: int, n_layers: int, d_model: int, context: int) -> int:
    """FLOPs of a token, forward and backward: 6 N + 12 L H Q T (Chowdhery et al. 2022, PaLM, appendix B)."""
    return 6 * matrix_parameters + 12 * n_layers * d_model * context


def peak_megabytes() -> float:
    """Peak memory of this process: of the GPU if there is one, else resident."""
    if "torch" in sys.modules and (cuda := sys.modules["torch"].cuda).is_available():
        return float(cuda.max_memory_allocated()) / 1e6
    status = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace")
    return int(re.findall(r"VmHWM:\s+(\d+)", status)[0]) / 1e3
