"""How soon a command answers: help, a mistyped option, the first training step, the first token.

python -m benchmarks.start
python -m benchmarks.start --run runs/quickstart      # sample from this run; otherwise a small one is trained first
"""

import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

from benchmarks import common

PYTHON = sys.executable
MAX_SECONDS = 0.4  # for help or a mistake
ANSWERS: dict[str, tuple[str, ...]] = {
    "train.py --help": ("train.py", "--help"),
    "sample.py --help": ("sample.py", "--help"),
    "attend.py summary --help": ("attend.py", "summary", "--help"),
    "train.py, mistyped option": ("train.py", "--model.n_layer", "3"),
    "train.py, mistyped value": ("train.py", "--model.n_layers", "three", "--model.preset", "gtp2"),
    "attend.py, mistyped option": ("attend.py", "runs/quickstart", "--promt", "One day"),
}


def first_step() -> float:
    """Seconds until the first step of a quickstart is logged."""
    with tempfile.TemporaryDirectory() as folder:
        command = [PYTHON, "train.py", f"--run.dir={folder}/run", "--log.every=1", "--train.steps=1"]
        return common.seconds_until(command, lambda output: "step 1/1 |" in output)


def answer(words: Sequence[str]) -> float:
    """Seconds until a command has printed help or an error."""
    return common.run_command([PYTHON, *words], exit_codes=(0, 2)).seconds


def main() -> None:
    options = common.parser(__doc__, rounds=5)
    options.add_argument("--run", type=Path, metavar="PATH", help="a run to sample from")
    args = options.parse_args()
    with common.report("start", args.record) as out, tempfile.TemporaryDirectory() as folder:
        run = args.run.resolve() if args.run else Path(folder) / "run"
        if not args.run:
            common.run_command([PYTHON, "train.py", f"--run.dir={run}", "--train.steps=1"])
        first_step()  # fills the cache
        contestants: dict[str, Callable[[], float]] = {
            "python -c pass": lambda: answer(("-c", "pass")),
            "import torch": lambda: answer(("-c", "import torch")),
            **{name: lambda words=words: answer(words) for name, words in ANSWERS.items()},  # type: ignore[misc]
            "train.py, first step": first_step,
            "sample.py, first token": lambda: common.seconds_until(
                [PYTHON, "sample.py", str(run), "--tokens=50"], bool
            ),
        }
        results = common.interleave(contestants, args.rounds)
        out.add(f"Seconds from a command's start; medians of {args.rounds} interleaved rounds, and the range.")
        out.add(common.table(("", "seconds"), [(name, common.spread(times)) for name, times in results.items()]))
        slowest = max(ANSWERS, key=lambda name: median(results[name]))
        row = common.target(f"slowest answer, {slowest}", median(results[slowest]), MAX_SECONDS, at_most=True)
        out.add(common.table(common.TARGET_HEAD, [row]))


if __name__ == "__main__":
    main()
