"""How soon a command answers: help, a mistyped option, the first training step, the first token.

    python -m benchmarks.start
    python -m benchmarks.start --run runs/quickstart      # sample from this run; else a small one is trained first

Every command is started as a user starts it, beside an empty Python and `import torch`, in turn in one run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median

from benchmarks.results import page
from benchmarks.side_by_side import ROOT, Target, alternate, options, spend, spread, table, targets

PYTHON = sys.executable
QUICK = 0.4
"""Seconds in which help or a mistake has to be answered."""
ANSWERS: dict[str, tuple[str, ...]] = {
    "train.py --help": ("train.py", "--help"),
    "sample.py --help": ("sample.py", "--help"),
    "attend.py --help": ("attend.py", "--help"),
    "attend.py summary --help": ("attend.py", "summary", "--help"),
    "train.py, an option mistyped": ("train.py", "--model.n_layer", "3"),
    "train.py, a value mistyped": ("train.py", "--model.n_layers", "three", "--model.preset", "gtp2"),
    "sample.py, an option mistyped": ("sample.py", "runs/quickstart", "--temprature", "1"),
    "attend.py, an option mistyped": ("attend.py", "runs/quickstart", "--promt", "One day"),
}


def seconds_until(
    command: Sequence[str],
    happened: Callable[[str], bool],
    folder: Path = ROOT,
    changed: Mapping[str, str] | None = None,
) -> float:
    """Seconds from a command's start until `happened` is true of what stands on its stdout; then it is killed."""
    with tempfile.TemporaryFile() as printed, tempfile.TemporaryFile() as errors:
        start = time.perf_counter()
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=errors,
            env={**os.environ, **(changed or {})},
        )
        try:
            while True:
                ended = process.poll() is not None
                text = os.pread(printed.fileno(), 1 << 22, 0).decode(errors="replace")
                if happened(text):
                    return time.perf_counter() - start
                if ended:
                    told = os.pread(errors.fileno(), 1 << 22, 0).decode(errors="replace")
                    sys.exit(f"{' '.join(command)} ended too soon:\n{told[-2000:]}")
                time.sleep(0.005)
        finally:
            process.kill()
            process.wait()


def logged(log: Path) -> list[dict[str, float]]:
    """The whole lines of a run's metrics.jsonl so far."""
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True) if log.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def first_step(changed: Mapping[str, str] | None = None) -> float:
    """Seconds until the first step of a quickstart is done and logged."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "run" / "metrics.jsonl"
        command = [PYTHON, "train.py", f"--run.dir={folder}/run", "--log.every=1"]
        return seconds_until(command, lambda _: any("loss" in line for line in logged(log)), changed=changed)


def first_step_ever() -> float:
    """The same where nothing is in the cache: the corpus is made, its vocabulary learned."""
    with tempfile.TemporaryDirectory() as cache:
        return first_step({"GLASSGPT_CACHE": cache})


def first_token(run: Path) -> float:
    """Seconds until the first piece of text is printed."""
    return seconds_until([PYTHON, "sample.py", str(run), "--tokens=50"], bool)


def small_run(folder: str) -> Path:
    """The quickstart's model after a single step."""
    run = Path(folder) / "run"
    spend([PYTHON, "train.py", f"--run.dir={run}", "--train.steps=1"])
    return run


def answered(words: Sequence[str]) -> float:
    """Seconds until a command has given help or refused."""
    return spend([PYTHON, *words], allowed=(0, 2)).seconds


def main() -> None:
    parser = options(__doc__ or "", rounds=5)
    parser.add_argument("--run", type=Path, metavar="PATH", help="a run to sample from")
    asked = parser.parse_args()
    with page("start", asked.record) as say, tempfile.TemporaryDirectory() as folder:
        run = asked.run.resolve() if asked.run else small_run(folder)
        first_step()  # the corpus is in the cache from now on
        contestants: dict[str, Callable[[], float]] = {
            "python -c pass": lambda: answered(("-c", "pass")),
            "import torch": lambda: answered(("-c", "import torch")),
            **{name: lambda words=words: answered(words) for name, words in ANSWERS.items()},  # type: ignore[misc]
            "train.py, first step": first_step,
            "train.py, first step, empty cache": first_step_ever,
            "sample.py, first token": lambda: first_token(run),
        }
        found = alternate(contestants, asked.rounds)
        say.say(f"Seconds from a command's start; medians of {asked.rounds} rounds, in turn, and their range.")
        say.say(table(("", "seconds"), [(name, spread(took)) for name, took in found.items()]))
        middle = {name: median(took) for name, took in found.items()}
        slowest = max(ANSWERS, key=lambda name: middle[name])
        say.say(targets([Target(f"slowest answer, {slowest}", middle[slowest], QUICK, at_most=True)]))


if __name__ == "__main__":
    main()
