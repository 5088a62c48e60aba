"""What the fault tests share: a small run that uses everything, and how two runs are compared.

`FAULTY` is that run: dropout, accumulation, several epochs, evaluations, samples, dumps, rotation of checkpoints.
"""

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
"""Options of the run: 53 windows, so that 12 steps of 8 are almost two epochs."""


def good(folder: Path) -> bool:
    """Whether a checkpoint is what its manifest says, found out without the program's own reader."""
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
    """The newest step that has a good checkpoint; -1 if none has."""
    found = checkpoints(run)
    return int(found[-1].name) if found else -1


def sha(run: Path) -> tuple[str, str]:
    """sha256 of the weights and of the optimizer's moments in the newest good checkpoint."""
    newest = checkpoints(run)[-1]
    weights, moments = (
        hashlib.sha256((newest / name).read_bytes()).hexdigest()
        for name in ("model.safetensors", "optimizer.safetensors")
    )
    return weights, moments


def state(run: Path) -> dict[str, Any]:
    """`state` of the newest good checkpoint: step, tokens seen, best loss, ..."""
    saved: dict[str, Any] = json.loads((checkpoints(run)[-1] / "state.json").read_text())["state"]
    return saved


def numbers(run: Path) -> list[tuple[Any, ...]]:
    """What metrics.jsonl says of each step, except speed and memory. Fails for a line that is not JSON."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timing = {"tokens_per_second", "mfu", "peak_memory_mb"}
    return [tuple(sorted((k, v) for k, v in line.items() if k not in timing)) for line in lines]


def difference(found: list[Any], wanted: list[Any]) -> str:
    """Where two lists first differ, in words; empty if they are equal."""
    for place, (one, other) in enumerate(zip_longest(found, wanted), 1):
        if one != other:
            return f"has {one} instead of {other} in line {place}"
    return ""


def leftovers(run: Path) -> list[str]:
    """What a finished run should not hold: files and folders that were being written or removed."""
    marks = (".writing", ".removing", ".partial")
    found = [path for path in run.rglob("*") if any(mark in path.name for mark in marks)]
    found += run.rglob(".*")
    return sorted({str(path.relative_to(run)) for path in found})


@dataclass(frozen=True)
class Reference:
    """A run that nothing disturbed; others must end like it."""

    run: Path
    argv: tuple[str, ...]
    """Its options, all but `--run.dir`."""

    @classmethod
    def make(cls, server: ForkServer, run: Path, argv: Sequence[str]) -> Reference:
        """Train it."""
        done = server.run(*argv, f"--run.dir={run}")
        assert done.returncode == 0, done.stderr
        return cls(run, tuple(argv))

    def stopped_at(self, step: int, server: ForkServer, run: Path, *changes: str) -> Path:
        """The same run, stopped after a step, in another folder."""
        shutil.rmtree(run, ignore_errors=True)
        done = server.run(*self.argv, *changes, f"--run.dir={run}", f"--run.stop_at_step={step}")
        assert done.returncode == 0 and committed(run) == step, done.stderr
        return run

    def same_weights(self, run: Path) -> bool:
        """Whether a finished run has this one's weights, moments and state."""
        return sha(run) == sha(self.run) and state(run) == state(self.run)

    def check(self, run: Path) -> None:
        """Assert that a finished run tells this one's story: metrics without a gap or a double line, samples, dumps."""
        assert self.same_weights(run), f"{run}: {state(run)} instead of {state(self.run)}"
        assert not (found := difference(numbers(run), numbers(self.run))), f"{run}: metrics.jsonl {found}"
        samples, written = ((at / "samples.txt").read_text() for at in (run, self.run))
        assert samples == written, f"{run}: samples.txt is {samples!r} instead of {written!r}"
        dumps, wanted = ({path.name for path in (at / "attention").iterdir()} for at in (run, self.run))
        assert dumps >= wanted, dumps  # and perhaps of the step that it went on from
        assert not (left := leftovers(run)), f"{run} still holds {left}"
