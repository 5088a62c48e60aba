"""`train.py --run.resume RUN --check`: check that an interrupted and resumed run ends with the same bits.

From the same checkpoint one process trains some steps, and two others the same steps with an interruption in between.
Weights and optimizer state must have the same sha256. Everything happens in a temporary folder inside RUN.
"""

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
    if not config.run.resume:
        raise UserError("--check needs a run to resume: python train.py --run.resume RUN --check", CONFIG)
    run, steps = Path(config.run.resume), min(STEPS, config.train.steps - 1)
    if steps < 2:
        raise UserError(f"train.steps is {config.train.steps}; --check needs at least 3", CONFIG)
    latest, middle = config.train.steps - steps - 1, min(INTERRUPTED_AFTER, steps - 1)
    early = [folder for folder in list_checkpoints(run / "checkpoints") if int(folder.name) <= latest]
    start = next((folder for folder in early[::-1] if verify_checkpoint(folder) is None), None)
    first = int(start.name) if start else 0
    where = f"step {first} of {run}" if start else f"the beginning of {run} (it has no checkpoint early enough)"
    plan = f"{steps} steps uninterrupted, and {middle} + {steps - middle} steps in two processes"
    print(f"from {escape_control_chars(where)}: {plan}", flush=True)
    with tempfile.TemporaryDirectory(prefix=".check-", dir=run) as temporary:
        hashes: list[str] = []
        for name, stops in (("uninterrupted", [steps]), ("resumed", [middle, steps])):
            folder = Path(temporary) / name
            train(folder, config, start, [first + stop for stop in stops])
            last = folder / "checkpoints" / f"{first + steps:06d}"
            hashes += [sha256_of_file(last / MODEL), sha256_of_file(last / OPTIMIZER)]
            print(f"{name:<14} weights         {hashes[-2]}\n{'':<14} optimizer state {hashes[-1]}", flush=True)
    if hashes[:2] != hashes[2:]:
        print("different bits: this run does not resume exactly on this machine")
        sys.exit(1)
    print("same bits: the resumed run is identical to the uninterrupted one")


def train(folder: Path, config: RunConfig, start: Path | None, stops: list[int]) -> None:
    """Train in a new run folder, from the checkpoint `start` or the beginning, in a process of its own up to each stop."""
    folder.mkdir()
    run = dataclasses.replace(config.run, dir=str(folder), resume="", stop_at_step=0)
    log = dataclasses.replace(config.log, wandb="disabled")
    file = folder / "config.toml" if start else folder.with_suffix(".toml")
    file.write_text(to_toml(dataclasses.replace(config, run=run, log=log)), encoding="utf-8", errors="surrogateescape")
    if start is not None:
        shutil.copytree(start, folder / "checkpoints" / start.name)
    for stop in stops:
        argument = f"--run.resume={folder}" if start or stop != stops[0] else str(file)
        command = [sys.executable, str(TRAIN), argument, f"--run.stop_at_step={stop}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            error = (done.stderr.strip().splitlines() or ["no message"])[-1].removeprefix("error: ")
            raise UserError(f"training up to step {stop} failed: {error}", max(done.returncode, 1))
