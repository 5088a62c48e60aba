"""What the fault tests share: a small run that uses everything, and how two runs are compared."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.files import read_metrics
from tests.faults.processes import run_script

CORPUS = "The quick brown fox jumps over the lazy dog.\nPack my box with five dozen jugs.\n" * 6
FAULTY = (
    *("--data.tokenizer=char", "--data.val_fraction=0.2", "--run.threads=1", "--train.dtype=fp32", "--log.every=1"),
    *("--model.n_layers=1", "--model.n_heads=2", "--model.d_model=8", "--model.context=8", "--model.dropout=0.2"),
    *("--train.batch_size=8", "--train.micro_batch_size=2", "--train.steps=12", "--train.eval_every=4"),
    *("--train.save_every=2", "--train.keep_checkpoints=2", "--train.eval_tokens=40", "--log.sample_tokens=4"),
)
"""Options of the run: 53 sequences, so that 12 steps of 8 are almost two epochs."""
MEASURED = ("tokens_per_second", "mfu", "peak_memory_mb")
"""Metrics that depend on the machine."""


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of the files of a checkpoint, without the program's own reader; empty if its manifest has others."""
    try:
        files = json.loads((folder / "manifest.json").read_text())["files"]
        found = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in files}
        return found if found == {name: listed["sha256"] for name, listed in files.items()} else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def named(run: Path) -> list[Path]:
    """The checkpoints, good or not, oldest first."""
    return sorted(path for path in (run / "checkpoints").glob("*") if path.name.isdecimal())


def checkpoints(run: Path) -> list[Path]:
    """The good checkpoints, oldest first."""
    return [path for path in named(run) if len(hashes(path)) >= 4]


def committed(run: Path) -> int:
    """The newest step with a good checkpoint; -1 without one."""
    return max((int(path.name) for path in checkpoints(run)), default=-1)


def steps_done(run: Path) -> int:
    """The last step of metrics.jsonl that has a loss; 0 before the first."""
    return max((line["step"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line), default=0)


def newest_state(run: Path) -> tuple[str, str, dict[str, Any]]:
    """sha256 of the weights and of the optimizer state in the newest good checkpoint; its step, tokens, best loss, ..."""
    newest = checkpoints(run)[-1]
    found, state = hashes(newest), json.loads((newest / "state.json").read_text())["state"]
    return found["model.safetensors"], found["optimizer.safetensors"], state


def numbers(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what is measured. Fails for a line that is not JSON."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]


@dataclass(frozen=True)
class Reference:
    """An uninterrupted run; others must end like it. `argv`: its options without `--run.dir`."""

    run: Path
    argv: tuple[str, ...]

    @classmethod
    def make(cls, run: Path, argv: tuple[str, ...]) -> "Reference":
        done = run_script(*argv, f"--run.dir={run}")
        assert done.returncode == 0, done.stderr
        return cls(run, argv)

    def stopped_at(self, step: int, run: Path, *changes: str) -> Path:
        """The same run in another folder, stopped after a step."""
        done = run_script(*self.argv, *changes, f"--run.dir={run}", f"--run.stop_at_step={step}")
        assert done.returncode == 0 and committed(run) == step, done.stderr
        return run

    def command(self, run: Path) -> list[str]:
        """Options that start the run in another folder, or resume it there; without config.toml it is not a run yet."""
        if (run / "config.toml").is_file():
            return [f"--run.resume={run}", *(option for option in self.argv if option.startswith("--run.stop_at_step"))]
        return [*self.argv, f"--run.dir={run}"]

    def resume(self, run: Path) -> None:
        """What a user does after an interruption; the run must end like this one."""
        done = run_script(*self.command(run))
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
        self.check(run)

    def same_weights(self, run: Path) -> bool:
        """Whether a finished run has the same weights, optimizer state and train state."""
        return newest_state(run) == newest_state(self.run)

    def check(self, run: Path) -> None:
        """Assert that a finished run equals this one: weights, metrics, samples, attention files."""
        assert self.same_weights(run), f"{run}: {newest_state(run)} instead of {newest_state(self.run)}"
        assert numbers(run) == numbers(self.run)
        assert (run / "samples.txt").read_text() == (self.run / "samples.txt").read_text()
        files, expected_files = ({path.name for path in (at / "attention").iterdir()} for at in (run, self.run))
        assert files >= expected_files, files  # perhaps also of the step that it was resumed from
        assert not list(run.rglob(".*")), "temporary files are left"
