"""`train.py --run.resume RUN --check`: check that an interrupted and resumed run ends with the same bits.

One process trains the first steps of the run, and two others the same steps with an interruption in between. Weights
and optimizer state must have the same sha256. Everything happens in a temporary folder inside RUN.
"""

import dataclasses
import subprocess
import sys
import tempfile
from pathlib import Path

from common.errors import CONFIG, UserError
from training.checkpoint import MODEL, OPTIMIZER, sha256_of_file
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
    if not config.run.resume or config.train.steps <= STEPS:
        raise UserError(
            f"--check needs a run of more than {STEPS} steps: python train.py --run.resume RUN --check", CONFIG
        )
    hashes = []
    with tempfile.TemporaryDirectory(prefix=".check-", dir=config.run.resume) as temporary:
        for name, stops in (("uninterrupted", [STEPS]), ("resumed", [INTERRUPTED_AFTER, STEPS])):
            folder = Path(temporary) / name
            train(folder, config, stops)
            last = folder / "checkpoints" / f"{STEPS:06d}"
            hashes.append([sha256_of_file(last / file) for file in (MODEL, OPTIMIZER)])
            print(f"{name:<14} weights         {hashes[-1][0]}\n{'':<14} optimizer state {hashes[-1][1]}", flush=True)
    if hashes[0] != hashes[1]:
        print("different bits: this run does not resume exactly on this machine")
        sys.exit(1)
    print("same bits: the resumed run is identical to the uninterrupted one")


def train(folder: Path, config: RunConfig, stops: list[int]) -> None:
    """Train in a new run folder from the beginning, in a process of its own up to each stop."""
    run = dataclasses.replace(config.run, dir=str(folder), resume="", stop_at_step=0)
    log = dataclasses.replace(config.log, wandb="disabled")
    file = folder.with_suffix(".toml")
    file.write_text(to_toml(dataclasses.replace(config, run=run, log=log)), encoding="utf-8", errors="surrogateescape")
    for stop in stops:
        start = f"--run.resume={folder}" if folder.exists() else str(file)
        command = [sys.executable, str(TRAIN), start, f"--run.stop_at_step={stop}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            error = (done.stderr.strip().splitlines() or ["no message"])[-1].removeprefix("error: ")
            raise UserError(f"training up to step {stop} failed: {error}", max(done.returncode, 1))
