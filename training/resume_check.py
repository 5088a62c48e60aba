"""`train.py --run.resume RUN --check`: check that an interrupted and resumed run ends with the same bits.

From the same checkpoint one process trains some steps, and two others the same steps with an interruption in between.
Weights and optimizer state must have the same sha256. Everything happens in a temporary folder inside RUN.
"""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from common.errors import CONFIG, UserError, escape_control_chars
from training.checkpoint import MODEL, OPTIMIZER, list_checkpoints, sha256_of_file, verify_checkpoint
from training.config import RunConfig, to_toml

STEPS = 8
INTERRUPTED_AFTER = 3
TRAIN = Path(__file__).parent.parent / "train.py"


def check_resume(config: RunConfig) -> None:
    """Train the same steps with and without an interruption, and print both hashes.

    Raises:
        UserError: if there is no run to resume (2), or a process fails (its own exit code).
        SystemExit: 1 if the bits differ.
    """
    run = Path(config.run.resume)
    if not config.run.resume:
        raise UserError("--check needs a run to resume: python train.py --run.resume RUN --check", CONFIG)
    steps = min(STEPS, config.train.steps - 1)
    if steps < 2:
        raise UserError(f"train.steps is {config.train.steps}; --check needs at least 3", CONFIG)
    start = _find_start(run, config.train.steps - steps - 1)
    middle = min(INTERRUPTED_AFTER, steps - 1)
    first = int(start.name) if start else 0
    where = f"step {first} of {run}" if start else f"the beginning of {run} (it has no checkpoint early enough)"
    print(
        f"from {escape_control_chars(where)}: {steps} steps uninterrupted, and {middle} + {steps - middle} steps in "
        "two processes",
        flush=True,
    )
    with tempfile.TemporaryDirectory(prefix=".check-", dir=run) as temporary:
        hashes: list[str] = []
        for name, stops in (("uninterrupted", [steps]), ("resumed", [middle, steps])):
            folder = Path(temporary) / name
            argument = _prepare(folder, config, start)
            for stop in stops:
                _train(argument, first + stop)
                argument = f"--run.resume={folder}"
            last = folder / "checkpoints" / f"{first + steps:06d}"
            hashes += [sha256_of_file(last / MODEL), sha256_of_file(last / OPTIMIZER)]
            print(f"{name:<14} weights         {hashes[-2]}", flush=True)
            print(f"{'':<14} optimizer state {hashes[-1]}", flush=True)
    if hashes[:2] != hashes[2:]:
        print("different bits: this run does not resume exactly on this machine")
        sys.exit(1)
    print("same bits: the resumed run is identical to the uninterrupted one")


def _find_start(run: Path, latest: int) -> Path | None:
    """The newest intact checkpoint up to step `latest`, or None."""
    early = (folder for folder in list_checkpoints(run / "checkpoints")[::-1] if int(folder.name) <= latest)
    return next((folder for folder in early if verify_checkpoint(folder) is None), None)


def _prepare(folder: Path, config: RunConfig, start: Path | None) -> str:
    """Make a run folder with the checkpoint `start`, or a config to start with; the argument for train.py."""
    folder.mkdir()
    run = dataclasses.replace(config.run, dir=str(folder), resume="", stop_at_step=0)
    log = dataclasses.replace(config.log, wandb="disabled")
    file = folder / ("config.toml" if start else "start.toml")
    file.write_text(to_toml(dataclasses.replace(config, run=run, log=log)), encoding="utf-8")
    if start is None:
        return str(file)
    shutil.copytree(start, folder / "checkpoints" / start.name)
    return f"--run.resume={folder}"


def _train(argument: str, stop_at_step: int) -> None:
    """Train up to a step in a process of its own."""
    command = [sys.executable, str(TRAIN), argument, f"--run.stop_at_step={stop_at_step}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        error = (done.stderr.strip().splitlines() or ["no message"])[-1].removeprefix("error: ")
        raise UserError(f"training up to step {stop_at_step} failed: {error}", max(done.returncode, 1))
