"""`train.py --run.resume RUN --check`: proof that a resumed run learns what an uninterrupted one does.

From the same checkpoint one process makes some steps at a stretch; two others make them with an interruption between
them. Weights and moments must have the same bits. Everything happens on this machine, in a folder inside RUN that is
removed again.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from common.errors import CHECKPOINT, CONFIG, UserError, escape_control_chars
from training.checkpoint import FILES, MANIFEST, list_checkpoints, verify_checkpoint
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
        raise UserError(f"train.steps is {config.train.steps}; two steps must fit before the last", CONFIG)
    start = start_of(run, config.train.steps - steps - 1)
    middle = min(INTERRUPTED_AFTER, steps - 1)
    first = int(start.name) if start else 0
    where = f"step {first} of {run}" if start else f"the beginning of {run} (it has no checkpoint early enough)"
    print(
        f"from {escape_control_chars(where)}: {steps} steps at a stretch, against {middle}, a new process, and {steps - middle}",
        flush=True,
    )
    with tempfile.TemporaryDirectory(prefix=".check-", dir=run) as place:
        hashes = []
        for name, stops in (("at a stretch", [steps]), ("interrupted", [middle, steps])):
            folder = Path(place) / name.replace(" ", "-")
            argument = prepared(folder, config, start)
            for stop in stops:
                train(argument, first + stop)
                argument = f"--run.resume={folder}"
            hashes.append(digests(folder / "checkpoints" / f"{first + steps:06d}"))
            print(f"{name:<13} weights {hashes[-1][0]}\n{'':<13} moments {hashes[-1][1]}", flush=True)
    if hashes[0] != hashes[1]:
        print("not the same bits: this run does not resume exactly on this machine")
        sys.exit(1)
    print("the same bits: the resumed run learned exactly what the uninterrupted one did")


def start_of(run: Path, latest: int) -> Path | None:
    """The newest good checkpoint that is not beyond step `latest`; None if there is none."""
    good = (folder for folder in list_checkpoints(run / "checkpoints")[::-1] if int(folder.name) <= latest)
    return next((folder for folder in good if verify_checkpoint(folder) is None), None)


def prepared(folder: Path, config: RunConfig, start: Path | None) -> str:
    """A run folder that stands at checkpoint `start`, or a config to start one with; the argument that begins it."""
    folder.mkdir()
    own = dataclasses.replace(config.run, dir=str(folder), resume="", stop_at_step=0)
    log = dataclasses.replace(config.log, wandb="disabled")
    file = folder / ("config.toml" if start else "start.toml")
    file.write_text(to_toml(dataclasses.replace(config, run=own, log=log)), encoding="utf-8")
    if start is None:
        return str(file)
    shutil.copytree(start, folder / "checkpoints" / start.name)
    return f"--run.resume={folder}"


def train(argument: str, stop_at_step: int) -> None:
    """Train up to a step in a process of its own."""
    done = subprocess.run(
        [sys.executable, str(TRAIN), argument, f"--run.stop_at_step={stop_at_step}"], capture_output=True, text=True
    )
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1].removeprefix("error: ")
        raise UserError(f"training up to step {stop_at_step} failed: {said}", max(done.returncode, 1))


def digests(folder: Path) -> tuple[str, str]:
    """The sha256 of the weights and of the moments in a checkpoint.

    Raises:
        UserError: if the checkpoint is not whole (exit code 4).
    """
    if fault := verify_checkpoint(folder):
        raise UserError(f"{folder}: {fault}", CHECKPOINT)
    files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    return files[FILES[0]]["sha256"], files[FILES[1]]["sha256"]
