"""The page that a benchmark prints, and its section of RESULTS.md: where, when and by which command it was measured."""

from __future__ import annotations

import datetime
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from benchmarks.side_by_side import ROOT

RESULTS = Path(__file__).parent / "RESULTS.md"
HEAD = """# What the benchmarks measured

Written by the commands themselves (`--record`). Ratios and shares carry over to other machines better than seconds.

"""


def number_formats() -> str:
    """Of what makes bf16 quick on a processor: what this one has."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return "unknown"
    found = [name for name in ("amx_tile", "amx_bf16", "amx_int8", "avx512_bf16", "avx512f") if name in flags]
    return ", ".join(found) or "neither AMX nor AVX-512"


def machine() -> str:
    """One line: processor, cores, what it multiplies, memory, GPU where torch sees one, versions."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    parts = [f"{processor()}, {cores} cores ({number_formats()}), {gib:.0f} GiB"]
    if "torch" in sys.modules:
        import torch

        if torch.cuda.is_available():
            parts.append(f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}")
    return "; ".join([*parts, f"Python {platform.python_version()}, torch {metadata.version('torch')}"])


def commit() -> str:
    """The commit that is measured, and whether files differ from it."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    changed = [line for line in git("status", "--porcelain").splitlines() if not line.endswith(RESULTS.name)]
    return (git("rev-parse", "--short", "HEAD") or "none") + (" with changes" if changed else "")


def command_line(argv: Sequence[str]) -> str:
    """This benchmark's command as anyone would type it: no path of one's own machine."""
    words = ["PATH" if word.startswith(("/", "~", ".")) else re.sub(r"=[/~.].*", "=PATH", word) for word in argv]
    return shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *words])


@dataclass
class Page:
    """What a benchmark prints, kept for RESULTS.md."""

    lines: list[str] = field(default_factory=list)

    def say(self, text: str = "") -> None:
        """Print a paragraph or a table, and keep it."""
        print(text + "\n", flush=True)
        self.lines += [text, ""]


@contextmanager
def page(name: str, record: bool) -> Iterator[Page]:
    """A benchmark's page: where it is measured, and what is said; `record` makes it a section of RESULTS.md."""
    found = Page()
    found.say(f"{machine()}.")
    yield found
    if record:
        when = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
        heading = f"`{command_line(sys.argv[1:])}`, {when}, commit {commit()}."
        write_section(RESULTS, name, "\n".join([heading, "", *found.lines]))
        print(f"recorded in {RESULTS.relative_to(ROOT)}")


def write_section(path: Path, name: str, text: str) -> None:
    """Put a section into the page of results, in place of the one of its name; sections stand in their names' order."""
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    sections = dict(re.findall(r"^## (\S+)\n\n(.*?)(?=^## |\Z)", before, re.M | re.S))
    sections[name] = text.strip() + "\n\n"
    whole = HEAD + "".join(f"## {key}\n\n{sections[key]}" for key in sorted(sections))
    partial = path.with_suffix(".partial")
    partial.write_text(whole.rstrip() + "\n", encoding="utf-8")
    partial.replace(path)
