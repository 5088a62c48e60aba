"""Every crash point of a save, and every failure of the disk in it: the last good checkpoint is never lost.

A run at step 6 continues and saves step 8 with only one checkpoint kept, so that step 6 is removed once step 8 is safe.
It is killed, or the disk fails, at each file operation of the save in turn.
"""

import itertools
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.harness import Reference, checkpoints, committed, named
from tests.faults.hook import Hook
from tests.faults.processes import KILLED, run_script
from tests.runs import error_line

START, SAVE = 6, 8


@pytest.fixture(scope="module")
def start(reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reference.stopped_at(START, tmp_path_factory.mktemp("start") / "run", "--train.keep_checkpoints=1")


def saves(
    run: Path, start: Path, whole: Reference, damaged: bool = False, **fault: Any
) -> Iterator[subprocess.CompletedProcess[str]]:
    """Train a copy of the run at step 6 to step 8 and save, with the fault at each operation of the save in turn.

    After each, no checkpoint is lost, and the resumed run ends as if nothing had happened. `damaged`: with a cut
    checkpoint of step 8.
    """
    root, resumed = run / "checkpoints", list[object]()
    for at in itertools.count(1):
        shutil.copytree(start, run)
        if damaged:
            shutil.copytree(root / f"{START:06d}", root / f"{SAVE:06d}")
            (root / f"{SAVE:06d}" / "model.safetensors").write_bytes(b"cut")
        done = run_script(f"--run.resume={run}", f"--run.stop_at_step={SAVE}", hook=Hook(at, path=str(root), **fault))
        yield done
        assert committed(run) in (START, SAVE), at
        good = checkpoints(run)
        assert damaged or named(run) == good, at
        left = [(p.name, p in good, sorted(f.name for f in p.iterdir())) for p in sorted(root.iterdir())]
        if left not in resumed:  # once for each state of the disk
            resumed.append(left)
            whole.resume(run)
        shutil.rmtree(run)
        if done.returncode == 0 and "cannot remove" not in done.stderr:  # the save has fewer operations
            assert at > 20
            return


@pytest.mark.parametrize("damaged", [False, True], ids=["clean", "over a damaged one"])
def test_killed_at_each_operation_of_a_save(damaged: bool, to_step_10: Reference, start: Path, tmp_path: Path) -> None:
    for done in saves(tmp_path / "run", start, to_step_10, damaged):
        assert done.returncode in (0, KILLED), done.stderr


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from then on"])
def test_each_operation_of_a_save_fails(lasting: bool, to_step_10: Reference, start: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for done in saves(run, start, to_step_10, do="ENOSPC", lasting=lasting):
        if done.returncode:  # else there is no fault, or only a warning that an old checkpoint cannot be removed
            assert "cannot write the checkpoint" in error_line(done, 6)
            assert START in [int(path.name) for path in checkpoints(run)]
