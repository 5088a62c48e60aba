"""A hundred kills at random moments, and one at each file operation of a run: what is resumed ends the same.

Each run (start, SIGKILL, resume, SIGKILL, ... until it is complete) has a cache of its own, so that preparing data is
interrupted too.
"""

import itertools
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.faults.harness import FAULTY, Reference, committed
from tests.faults.hook import Hook
from tests.faults.processes import KILLED, run_script, start

KILLS = 50
LONGER = ("--train.steps=60", "--train.eval_every=6", "--train.save_every=4", "--optim.decay_fraction=0.3")


@pytest.mark.parametrize("seed", [1, 2])
def test_fifty_random_kills(seed: int, corpus: Path, tmp_path: Path) -> None:
    draw, kills, runs, began = random.Random(seed), 0, 0, time.monotonic()
    whole = Reference.make(tmp_path / "whole", (*FAULTY, *LONGER, f"--data.source={corpus}"))
    length = time.monotonic() - began
    while kills < KILLS:
        runs += 1
        run, env = tmp_path / str(runs) / "run", {"GLASSGPT_CACHE": str(tmp_path / str(runs) / "cache")}
        newest, starts, share = -1, 0, draw.choice((0.2, 0.5, 1.0))
        code: int | None = KILLED
        while code:
            # Killed early and often at first, then later and later: from the first files to the last picture.
            starts += 1
            child = start(*whole.command(run), env=env)
            moment = draw.uniform(0, share + starts / 15) * length
            code = child.poll(moment) if kills < KILLS else child.end().returncode
            if code is None:
                child.send(signal.SIGKILL)
                code = child.end().returncode
                kills += code == KILLED
            assert code in (0, KILLED) and starts < 60, child.texts()
            assert committed(run) >= newest, "a saved step was lost"
            newest = committed(run)
        whole.check(run)


@pytest.mark.parametrize("first", [1, 2])
def test_killed_before_each_file_operation_of_a_new_run(first: int, corpus: Path, tmp_path: Path) -> None:
    """Two saves and an evaluation, without the report at the end. Saves of checkpoints are in test_saves.py."""
    run, options = tmp_path / "run", (*FAULTY, "--run.stop_at_step=4", f"--data.source={corpus}")
    short = Reference.make(tmp_path / "short", options)
    for at in itertools.count(first, 2):
        code = run_script(*short.command(run), hook=Hook(at, path=f"{run}/(?!checkpoints)")).returncode
        if code == 0:  # it has fewer operations
            break
        assert code == KILLED, at
        short.resume(run)
        shutil.rmtree(run)
    assert at > 20
