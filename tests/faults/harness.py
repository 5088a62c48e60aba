"""What the fault tests share: a small run that uses everything, and how two runs are compared."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from tests.faults.forkserver import ForkServer

CORPUS = "The quick brown fox jumps over the lazy dog.\nPack my box with five dozen jugs.\n" * 6
STEPS = 12
FAULTY = (
    *("--data.tokenizer=char", "--data.val_fraction=0.2", "--run.threads=1", "--train.dtype=fp32", "--log.every=1"),
    *("--model.n_layers=1", "--model.n_heads=2", "--model.d_model=8", "--model.context=8", "--model.dropout=0.2"),
    *("--train.batch_size=8", "--train.micro_batch_size=2", f"--train.steps={STEPS}", "--train.eval_every=4"),
    *("--train.save_every=2", "--train.keep_checkpoints=2", "--train.eval_tokens=40", "--log.sample_tokens=4"),
)
"""Options of the run: 53 sequences, so that 12 steps of 8 are almost two epochs."""
MEASURED = ("tokens_per_second", "mfu", "peak_memory_mb")
"""Metrics that depend on the machine."""


def good(folder: Path) -> bool:
    """Whether a checkpoint is what its manifest says, without the program's own reader."""
    try:
        files = json.loads((folder / "manifest.json").read_text())["files"]
        return len(files) >= 4 and all(
            hashlib.sha256((folder / name).read_bytes()).hexdigest() == listed["sha256"]
            for name, listed in files.items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def checkpoints(run: Path) -> list[Path]:
    """The good checkpoints, oldest first."""
    root = run / "checkpoints"
    named = [path for path in root.iterdir() if path.name.isdecimal()] if root.is_dir() else []
    return sorted((path for path in named if good(path)), key=lambda path: int(path.name))


def committed(run: Path) -> int:
    """The newest step with a good checkpoint; -1 without one."""
    found = checkpoints(run)
    return int(found[-1].name) if found else -1


def sha(run: Path) -> tuple[str, str]:
    """sha256 of the weights and of the optimizer state in the newest good checkpoint."""
    newest = checkpoints(run)[-1]
    weights, state = (
        hashlib.sha256((newest / name).read_bytes()).hexdigest()
        for name in ("model.safetensors", "optimizer.safetensors")
    )
    return weights, state


def state(run: Path) -> dict[str, Any]:
    """`state` of the newest good checkpoint: step, tokens seen, best loss, ..."""
    saved: dict[str, Any] = json.loads((checkpoints(run)[-1] / "state.json").read_text())["state"]
    return saved


def numbers(run: Path) -> list[tuple[Any, ...]]:
    """The lines of metrics.jsonl without what is measured. Fails for a line that is not JSON."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [tuple(sorted((k, v) for k, v in line.items() if k not in MEASURED)) for line in lines]


def leftovers(run: Path) -> list[str]:
    """Temporary files and folders, which a finished run must not have."""
    return sorted(str(path.relative_to(run)) for path in run.rglob(".*"))


@dataclass(frozen=True)
class Reference:
    """An uninterrupted run; others must end like it. `argv`: its options without `--run.dir`."""

    run: Path
    argv: tuple[str, ...]

    @classmethod
    def make(cls, server: ForkServer, run: Path, argv: Sequence[str]) -> Reference:
        done = server.run(*argv, f"--run.dir={run}")
        assert done.returncode == 0, done.stderr
        return cls(run, tuple(argv))

    def stopped_at(self, step: int, server: ForkServer, run: Path, *changes: str) -> Path:
        """The same run, stopped after a step, in another folder."""
        shutil.rmtree(run, ignore_errors=True)
        done = server.run(*self.argv, *changes, f"--run.dir={run}", f"--run.stop_at_step={step}")
        assert done.returncode == 0 and committed(run) == step, done.stderr
        return run

    def resume(self, server: ForkServer, run: Path) -> None:
        """What a user does after an interruption; a folder without config.toml is not a run yet. Then `check`."""
        again = (f"--run.resume={run}",) if (run / "config.toml").is_file() else (*self.argv, f"--run.dir={run}")
        done = server.run(*again, "--run.stop_at_step=0")
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
        self.check(run)

    def same_weights(self, run: Path) -> bool:
        """Whether a finished run has the same weights, optimizer state and train state."""
        return sha(run) == sha(self.run) and state(run) == state(self.run)

    def check(self, run: Path) -> None:
        """Assert that a finished run equals this one: weights, metrics, samples, attention files."""
        assert self.same_weights(run), f"{run}: {state(run)} instead of {state(self.run)}"
        for line, (one, other) in enumerate(zip_longest(numbers(run), numbers(self.run)), 1):
            assert one == other, f"{run}: metrics.jsonl has {one} instead of {other} in line {line}"
        samples, expected = ((at / "samples.txt").read_text() for at in (run, self.run))
        assert samples == expected, f"{run}: samples.txt is {samples!r} instead of {expected!r}"
        files, expected_files = ({path.name for path in (at / "attention").iterdir()} for at in (run, self.run))
        assert files >= expected_files, files  # perhaps also of the step that it was resumed from
        assert not (left := leftovers(run)), f"{run} still has {left}"
