"""The real wandb: training ends with the same weights, and in time, whatever happens to it."""

import signal
import time
from pathlib import Path

import pytest

from tests.faults.harness import Reference, steps_done
from tests.faults.processes import allowed, nobody_left, train
from training.trackers import TIMEOUT_SECONDS

pytest.importorskip("wandb")


def test_unreachable_server_costs_one_line_and_its_timeout(reference: Reference, run: Path, tmp_path: Path) -> None:
    env = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0123456789" * 4, "HOME": str(tmp_path)}
    start = time.monotonic()
    done = train(*reference.argv, f"--run.dir={run}", "--log.wandb=online", env=env).end()
    nobody_left()
    assert done.returncode == 0, done.stderr
    reference.check(run)
    assert time.monotonic() - start < 2 * TIMEOUT_SECONDS + allowed(30)
    (line,) = (line for line in done.stderr.splitlines() if line.strip())
    assert line.startswith("wandb failed (CommError: ") and line.endswith("training continues without it")


def test_ctrl_c_with_wandb_saves_and_exits_with_130(reference: Reference, run: Path) -> None:
    running = train(*reference.argv, f"--run.dir={run}", "--log.wandb=offline", "--train.steps=100000")
    running.until(lambda: steps_done(run) > 3, "some steps")
    running.send(signal.SIGINT)
    done = running.end(60)
    nobody_left()
    assert done.returncode == 130 and "resume with" in done.stdout and "wandb" not in done.stderr, done.stderr
