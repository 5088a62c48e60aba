"""Every crash point of a save, and every failure of the disk in it: the last good checkpoint is never lost.

A run at step 6 continues and saves step 8 with only one checkpoint kept, so that step 6 is removed once step 8 is safe.
It is killed, or the disk fails, at each operation in turn: those that `training/checkpoint.py` announces
(`glassgpt.disk`), and the system calls (strace).
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.forkserver import ForkServer
from tests.faults.harness import Reference, checkpoints, committed, good
from tests.faults.hook import Hook
from tests.faults.started import KILLED
from tests.faults.strace import Call, calls, require_strace, under_strace
from tests.runs import error_line

START, SAVE, END = 6, 8, 10
ERRORS = {"write": "ENOSPC", "fsync": "EIO", "rename": "EIO", "mkdir": "ENOSPC", "remove": "EIO"}


class Bench:
    """A run at step 6, and what it must end as. `damage` is done to each fresh copy of the run."""

    def __init__(
        self, server: ForkServer, whole: Reference, start: Path, scratch: Path, damage: Callable[[Path], None] | None
    ) -> None:
        self.server, self.whole, self.start, self.scratch = server, whole, start, scratch
        self.damage, self.run = damage, scratch / "run"
        self.resumed: set[object] = set()

    def resume(self, step: int) -> tuple[str, str]:
        return f"--run.resume={self.run}", f"--run.stop_at_step={step}"

    def copy(self) -> None:
        shutil.rmtree(self.run, ignore_errors=True)
        shutil.copytree(self.start, self.run)
        if self.damage is not None:
            self.damage(self.run)
        assert committed(self.run) == START

    def save(self, hook: Hook | None) -> subprocess.CompletedProcess[str]:
        """Train a fresh copy to step 8 and save."""
        self.copy()
        return self.server.run(*self.resume(SAVE), hook=hook)

    def save_under_strace(self, log: Path, *options: str) -> subprocess.CompletedProcess[str]:
        """The same under strace, from the first operation of the save on."""
        self.copy()
        child = self.server.start(*self.resume(SAVE), hook=Hook(at=1, do="SIGSTOP"))
        self.pid = child.pid
        return under_strace(child, log, options)

    def operations(self) -> list[str]:
        """The operations that a save announces."""
        log = self.scratch / "operations"
        log.unlink(missing_ok=True)
        done = self.save(Hook(log=str(log)))
        assert done.returncode == 0, done.stderr
        assert [int(path.name) for path in checkpoints(self.run)] == [SAVE]
        return [line.split(maxsplit=1)[0] for line in log.read_text().splitlines()]

    def changes(self) -> list[Call]:
        """The system calls of a save that change the disk."""
        require_strace()
        log = self.scratch / "strace"
        assert self.save_under_strace(log).returncode == 0
        found = [call for call in calls(log, self.run / "checkpoints", self.pid) if call.changes]
        assert len(found) > 20
        return found

    def check(self, what: object) -> None:
        """After a fault nothing is lost, and the resumed run ends as if nothing had happened."""
        assert committed(self.run) in (START, SAVE), what
        root = self.run / "checkpoints"
        broken = [p for p in root.iterdir() if p.name.isdecimal() and not good(p)]
        assert not broken or self.damage is not None, what
        left = tuple((p.name, good(p), tuple(sorted(f.name for f in p.iterdir()))) for p in sorted(root.iterdir()))
        if left in self.resumed:  # once for each state of the disk
            return
        self.resumed.add(left)
        done = self.server.run(*self.resume(END))
        assert done.returncode == 0 and "Traceback" not in done.stderr, f"{what}: {done.stderr}"
        self.whole.check(self.run)


def cut_step_8(run: Path) -> None:
    """There is a damaged step 8 already."""
    folder = shutil.copytree(run / "checkpoints" / f"{START:06d}", run / "checkpoints" / f"{SAVE:06d}")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])


DAMAGES = {"clean": None, "over a damaged one": cut_step_8}


@pytest.fixture(scope="module")
def start(server: ForkServer, reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reference.stopped_at(START, server, tmp_path_factory.mktemp("start") / "run", "--train.keep_checkpoints=1")


@pytest.fixture(scope="module")
def whole(server: ForkServer, reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """The uninterrupted run up to step 10."""
    options = (*reference.argv, "--train.keep_checkpoints=1", f"--run.stop_at_step={END}")
    return Reference.make(server, tmp_path_factory.mktemp("whole") / "run", options)


@pytest.fixture
def bench(server: ForkServer, whole: Reference, start: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Bench:
    return Bench(server, whole, start, tmp_path, DAMAGES[getattr(request, "param", "clean")])


@pytest.mark.parametrize("bench", DAMAGES, indirect=True)
def test_killed_before_each_operation_of_a_save(bench: Bench) -> None:
    operations = bench.operations()
    assert set(ERRORS) <= set(operations)
    for at, operation in enumerate(operations, 1):
        assert bench.save(Hook(at=at)).returncode == KILLED, (at, operation)
        bench.check((at, operation))


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from then on"])
def test_each_operation_of_a_save_fails(bench: Bench, lasting: bool) -> None:
    operations = bench.operations()
    removing = operations.index("rename", operations.index("rename") + 1)  # from here on step 8 is safe
    for at, operation in enumerate(operations, 1):
        hook = Hook(at, ERRORS[operation])
        if lasting:
            hook = Hook(operations[:at].count(operation), ERRORS[operation], operation, lasting=True)
        done = bench.save(hook)
        if at <= removing:
            assert "cannot write the checkpoint" in error_line(done, 6), (at, operation)
            assert good(bench.run / "checkpoints" / f"{START:06d}"), (at, operation)
        else:  # old checkpoints that cannot be removed are only a warning
            assert done.returncode == 0 and "cannot remove" in done.stderr, (at, operation, done.stderr)
        bench.check((at, operation))


def test_killed_at_each_system_call_of_a_save(bench: Bench) -> None:
    for call in bench.changes():
        done = bench.save_under_strace(bench.scratch / "killed", *call.as_nth("signal=KILL"))
        assert done.returncode == KILLED, call.text
        bench.check(call.text)


def test_each_system_call_of_a_save_fails(bench: Bench) -> None:
    """EIO for fsync and rename, ENOSPC for the others."""
    log = bench.scratch / "failed"
    targets = [call for call in bench.changes() if not call.name.startswith(("unlink", "rmdir"))]
    for call in targets:
        error = "EIO" if call.name.startswith(("fsync", "fdatasync", "rename")) else "ENOSPC"
        done = bench.save_under_strace(log, *call.as_nth(f"error={error}"))
        assert "(INJECTED)" in log.read_text(), call.text
        if done.returncode:
            error_line(done, 6)
            assert good(bench.run / "checkpoints" / f"{START:06d}"), call.text
        else:
            assert good(bench.run / "checkpoints" / f"{SAVE:06d}") and "Traceback" not in done.stderr, call.text
        bench.check(call.text)


def test_order_of_a_save_as_the_kernel_sees_it(bench: Bench) -> None:
    """Files, their fsync, manifest, its fsync, the folder's, rename, the parent's fsync, read back, remove the old."""
    require_strace()
    log = bench.scratch / "strace"
    assert bench.save_under_strace(log).returncode == 0
    found = calls(log, bench.run / "checkpoints", bench.pid)
    root = str(bench.run / "checkpoints")
    writing, final, old = f"{root}/.writing-{SAVE:06d}", f"{root}/{SAVE:06d}", f"{root}/{START:06d}"

    def positions(name: str, path: str) -> list[int]:
        return [i for i, call in enumerate(found) if call.name.startswith(name) and call.paths[0] == path]

    (renamed,) = [i for i in positions("rename", writing) if found[i].paths[-1] == final]
    names = ("manifest.json", "model.safetensors", "optimizer.safetensors", "state.json", "vocabulary.json")
    files = [f"{writing}/{name}" for name in names]
    synced = [positions("fsync", file)[-1] for file in files]
    for file, at in zip(files, synced, strict=True):  # safetensors writes to a temporary file and renames it
        changed = [i for i, call in enumerate(found) if call.changes and call.paths[-1] == file and i not in synced]
        assert changed and max(changed) < at < renamed
    assert all(at < min(positions("write", files[0])) for at in synced[1:])
    assert synced[0] < positions("fsync", writing)[-1] < renamed
    removed = [i for i, call in enumerate(found) if call.changes and any(p.startswith(old) for p in call.paths)]
    assert removed and min(i for i in positions("fsync", root) if i > renamed) < min(removed)
    for name in names:
        read = [i for i in positions("open", f"{final}/{name}") if not found[i].changes]
        assert read and renamed < read[0] < min(removed)
