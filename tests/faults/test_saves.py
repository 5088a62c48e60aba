"""Every crash point of a save, and every failure of the disk in it: the last good checkpoint is never lost.

A run at step 6 continues and saves step 8 with only one checkpoint kept, so that step 6 is removed once step 8 is safe.
It is killed, or the disk fails, at each file operation of the save in turn.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.faults.harness import Reference, checkpoints, committed, named
from tests.faults.hook import Hook
from tests.faults.processes import KILLED, run_script
from tests.runs import error_line

START, SAVE = 6, 8


class Bench:
    """A run at step 6, of which each save gets a fresh copy; `damaged`: with a cut checkpoint of step 8."""

    def __init__(self, whole: Reference, start: Path, folder: Path, damaged: bool = False) -> None:
        self.whole, self.start, self.damaged = whole, start, damaged
        self.run, self.log = folder / "run", folder / "log"
        self.resumed: set[object] = set()
        assert self.save(Hook(path=f"{self.run}/checkpoints", log=str(self.log))).returncode == 0
        assert [int(path.name) for path in checkpoints(self.run)] == [SAVE]
        self.operations = [line.split(maxsplit=1)[0] for line in self.log.read_text().splitlines()]

    def save(self, hook: Hook) -> subprocess.CompletedProcess[str]:
        """Train a fresh copy to step 8 and save."""
        shutil.rmtree(self.run, ignore_errors=True)
        shutil.copytree(self.start, self.run)
        if self.damaged:
            folder = self.run / "checkpoints" / f"{SAVE:06d}"
            shutil.copytree(folder.with_name(f"{START:06d}"), folder)
            (folder / "model.safetensors").write_bytes(b"cut")
        return run_script(f"--run.resume={self.run}", f"--run.stop_at_step={SAVE}", hook=hook)

    def check(self, what: object) -> None:
        """After a fault nothing is lost, and the resumed run ends as if nothing had happened."""
        assert committed(self.run) in (START, SAVE), what
        assert self.damaged or named(self.run) == checkpoints(self.run), what
        good, root = checkpoints(self.run), self.run / "checkpoints"
        left = tuple((p.name, p in good, tuple(sorted(f.name for f in p.iterdir()))) for p in sorted(root.iterdir()))
        if left not in self.resumed:  # once for each state of the disk
            self.resumed.add(left)
            self.whole.resume(self.run)


@pytest.fixture(scope="module")
def start(reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reference.stopped_at(START, tmp_path_factory.mktemp("start") / "run", "--train.keep_checkpoints=1")


@pytest.mark.parametrize("damaged", [False, True], ids=["clean", "over a damaged one"])
def test_killed_before_each_operation_of_a_save(
    damaged: bool, to_step_10: Reference, start: Path, tmp_path: Path
) -> None:
    bench = Bench(to_step_10, start, tmp_path, damaged)
    assert {"open", "mkdir", "chmod", "rename", "rmtree"} <= set(bench.operations)
    for at, operation in enumerate(bench.operations, 1):
        assert bench.save(Hook(at, path=f"{bench.run}/checkpoints")).returncode == KILLED, (at, operation)
        bench.check((at, operation))


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from then on"])
def test_each_operation_of_a_save_fails(lasting: bool, to_step_10: Reference, start: Path, tmp_path: Path) -> None:
    bench = Bench(to_step_10, start, tmp_path)
    operations = bench.operations
    safe = operations.index("rename") + 2  # after the rename and the fsync of its parent
    for at, operation in enumerate(operations, 1):
        error = "EIO" if operation in ("rename", "rmtree") else "ENOSPC"
        hook = Hook(operations[:at].count(operation), error, operation, f"{bench.run}/checkpoints", lasting)
        done = bench.save(hook)
        if at <= safe:
            assert "cannot write the checkpoint" in error_line(done, 6), (at, operation)
            assert START in [int(path.name) for path in checkpoints(bench.run)], (at, operation)
        else:  # old checkpoints that cannot be removed are only a warning
            assert done.returncode == 0 and "cannot remove" in done.stderr, (at, operation, done.stderr)
        bench.check((at, operation))
