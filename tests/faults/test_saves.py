"""Every crash point of a save, and every failure of the disk in it: the last good checkpoint is never lost.

A run that stands at step 6 trains on and saves step 8, with only one checkpoint kept, so that step 6 goes once step 8
is safe. In between it is killed, or the disk fails, before each of its operations in turn: first as the program
announces them (`glassgpt.disk`), then at the system calls themselves (strace).
"""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.forkserver import ForkServer
from tests.faults.harness import Reference, checkpoints, committed, good, sha
from tests.faults.hook import Hook
from tests.faults.strace import Call, calls, require_strace, under_strace
from tests.runs import said

STANDS, SAVES, ENDS = 6, 8, 10
SHARES = 3
ERRORS = {"write": "ENOSPC", "pwrite64": "ENOSPC", "fsync": "EIO", "rename": "EIO", "mkdir": "ENOSPC", "remove": "EIO"}


class Bench:
    """A run at step 6, and what it must come to.

    Args:
        damage: what is done to a copy of the run before it goes on; the copy stands at step 6 then.
    """

    def __init__(
        self, server: ForkServer, whole: Reference, stands: Path, scratch: Path, damage: Callable[[Path], None]
    ) -> None:
        self.server, self.whole, self.stands, self.scratch = server, whole, stands, scratch
        self.damage, self.run = damage, scratch / "run"

    def prepare(self) -> Path:
        """A fresh copy of the run."""
        shutil.rmtree(self.run, ignore_errors=True)
        shutil.copytree(self.stands, self.run)
        self.damage(self.run)
        assert committed(self.run) == STANDS
        return self.run

    def save(self, hook: Hook | None) -> subprocess.CompletedProcess[str]:
        """Train a fresh copy on to step 8 and save."""
        self.prepare()
        return self.server.run(*self.going_on(SAVES), hook=hook)

    def stopped_before_saving(self, log: Path, *options: str) -> subprocess.CompletedProcess[str]:
        """The same under strace, from the first operation of the save on."""
        self.prepare()
        child = self.server.start(*self.going_on(SAVES), hook=Hook(at=1, do="SIGSTOP"))
        self.pid = child.pid
        return under_strace(child, log, options)

    def going_on(self, step: int) -> tuple[str, str]:
        """Options that resume the run up to a step."""
        return f"--run.resume={self.run}", f"--run.stop_at_step={step}"

    def events(self) -> list[tuple[str, str]]:
        """(operation, thread) of each operation that a save announces."""
        log = self.scratch / "events"
        log.unlink(missing_ok=True)
        done = self.save(Hook(log=str(log)))
        assert done.returncode == 0, done.stderr
        assert [int(path.name) for path in checkpoints(self.run)] == [SAVES]  # step 6 was let go
        lines = [line.split(maxsplit=2) for line in log.read_text().splitlines()]
        return [(operation, thread) for operation, thread, _ in lines]

    def check(self, what: str) -> None:
        """After a fault: nothing is lost, what stands there is whole, and the run ends as if nothing had happened."""
        now = committed(self.run)
        assert now in (STANDS, SAVES), what
        halves = [path for path in (self.run / "checkpoints").iterdir() if path.name.isdecimal() and not good(path)]
        assert not halves or self.damage is not nothing, what
        done = self.server.run(*self.going_on(ENDS))
        assert done.returncode == 0, f"{what}: {done.stderr}"
        assert "Traceback" not in done.stderr, what
        assert sha(self.run) == sha(self.whole.run), what
        self.whole.check(self.run)


def nothing(run: Path) -> None:
    """No damage."""


def cut_step_8(run: Path) -> None:
    """Step 8 is there already, but cut short; it is to be moved aside."""
    folder = run / "checkpoints" / f"{SAVES:06d}"
    shutil.copytree(run / "checkpoints" / f"{STANDS:06d}", folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])


def half_written_step_8(run: Path) -> None:
    """A process that was killed has left half of step 8 under the name of what is being written."""
    folder = run / "checkpoints" / f".writing-{SAVES:06d}"
    folder.mkdir()
    (folder / "optimizer.safetensors").write_bytes(b"half of it")


DAMAGES = {"": nothing, "cut": cut_step_8, "left": half_written_step_8}


@pytest.fixture(scope="module")
def stands(server: ForkServer, reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reference.stopped_at(STANDS, server, tmp_path_factory.mktemp("stands") / "run", "--train.keep_checkpoints=1")


@pytest.fixture(scope="module")
def whole(server: ForkServer, reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """The same run, never disturbed, up to step 10."""
    options = (*reference.argv, "--train.keep_checkpoints=1", f"--run.stop_at_step={ENDS}")
    return Reference.make(server, tmp_path_factory.mktemp("whole") / "run", options)


@pytest.fixture
def bench(server: ForkServer, whole: Reference, stands: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Bench:
    return Bench(server, whole, stands, tmp_path, DAMAGES[getattr(request, "param", "")])


@pytest.mark.parametrize("share", range(SHARES))
@pytest.mark.parametrize("bench", DAMAGES, indirect=True, ids=["clean", "over a damaged one", "over a leftover"])
def test_killed_before_each_operation_of_a_save(bench: Bench, share: int) -> None:
    events = bench.events()
    assert {"mkdir", "write", "fsync", "rename", "remove"} <= {operation for operation, _ in events}
    for at in range(1 + share, len(events) + 1, SHARES):
        done = bench.save(Hook(at=at))
        assert done.returncode == -signal.SIGKILL, (at, events[at - 1])
        bench.check(f"killed before operation {at} {events[at - 1]}")


@pytest.mark.parametrize("lasting", [False, True])
def test_each_operation_of_a_save_fails(bench: Bench, lasting: bool) -> None:
    """Once, or from then on."""
    events = [operation for operation, thread in bench.events() if thread == "main"]
    for at, operation in enumerate(events, 1):
        hook = Hook(at=at, do=ERRORS[operation], thread="main")
        if lasting:
            hook = Hook(
                at=events[:at].count(operation), do=ERRORS[operation], operation=operation, thread="main", lasting=True
            )
        done = bench.save(hook)
        assert "cannot write the checkpoint" in said(done, 6), (at, operation)
        assert good(bench.run / "checkpoints" / f"{STANDS:06d}"), (at, operation)
        bench.check(f"{ERRORS[operation]} from operation {at} ({operation}), lasting: {lasting}")


def test_old_checkpoints_that_cannot_be_removed_stop_nobody(bench: Bench) -> None:
    events = [operation for operation, thread in bench.events() if thread == "other"]
    assert "remove" in events
    for at, operation in enumerate(events, 1):
        done = bench.save(Hook(at=at, do="EIO", thread="other"))
        assert done.returncode == 0 and "Traceback" not in done.stderr, (at, operation, done.stderr)
        bench.check(f"EIO at operation {at} ({operation}) of pruning")


# ---- the same at the system calls ----


def traced(bench: Bench) -> list[Call]:
    """The system calls of a save, those that only read included."""
    require_strace()
    log = bench.scratch / "strace"
    done = bench.stopped_before_saving(log)
    assert done.returncode == 0, done.stderr
    return calls(log, bench.run / "checkpoints", bench.pid)


def changes(bench: Bench) -> list[Call]:
    """Those that change the disk."""
    found = [call for call in traced(bench) if call.changes]
    assert len(found) > 20
    return found


@pytest.mark.parametrize("share", range(SHARES))
def test_killed_at_each_system_call_of_a_save(bench: Bench, share: int) -> None:
    log = bench.scratch / "killed"
    targets = changes(bench)
    for call in targets[share::SHARES]:
        done = bench.stopped_before_saving(log, *call.as_target("signal=KILL"))
        assert done.returncode == -signal.SIGKILL, (call.text, log.read_text())
        bench.check(f"killed at {call.text}")


@pytest.mark.parametrize("share", range(SHARES))
def test_each_system_call_of_a_save_fails(bench: Bench, share: int) -> None:
    """ENOSPC where something is written or made, EIO where it is forced to the disk or renamed."""
    log = bench.scratch / "failed"
    targets = [call for call in changes(bench) if not call.name.startswith(("unlink", "rmdir"))]
    for call in targets[share::SHARES]:
        error = "EIO" if call.name.startswith(("fsync", "fdatasync", "rename")) else "ENOSPC"
        done = bench.stopped_before_saving(log, *call.as_target(f"error={error}"))
        assert "(INJECTED)" in log.read_text(), call.text
        if done.returncode:  # what fails once step 8 stands, such as removing step 6, is only told
            said(done, 6)
            assert good(bench.run / "checkpoints" / f"{STANDS:06d}"), call.text
        else:
            assert good(bench.run / "checkpoints" / f"{SAVES:06d}") and "Traceback" not in done.stderr, call.text
            assert call.thread != "main", call.text
        bench.check(f"{error} at {call.text}")


def test_the_order_of_a_save_as_the_kernel_sees_it(bench: Bench) -> None:
    """Files, their fsync, the manifest, its fsync, the folder's, the rename, the parent's fsync; then all is read
    back, and only then the old one goes."""
    found = traced(bench)
    root = str(bench.run / "checkpoints")
    writing, final = f"{root}/.writing-{SAVES:06d}", f"{root}/{SAVES:06d}"

    def positions(name: str, path: str) -> list[int]:
        return [i for i, call in enumerate(found) if call.name.startswith(name) and call.paths[0] == path]

    (renamed,) = [i for i in positions("rename", writing) if found[i].paths[-1] == final]
    files = sorted({call.paths[0] for call in found[:renamed] if call.name.startswith(("write", "pwrite"))})
    assert [Path(file).name for file in files] == [
        *("manifest.json", "model.safetensors", "optimizer.safetensors", "state.json", "vocabulary.json")
    ]
    synced = {}
    for file in files:
        synced[file] = positions("fsync", file)[-1]
        assert positions("write", file)[-1] < synced[file] < renamed
    manifest = files[0]
    begun = min(i for i, call in enumerate(found) if manifest in call.paths)
    assert all(synced[file] < begun for file in files[1:])
    assert synced[manifest] < positions("fsync", writing)[-1] < renamed
    parent = min(i for i in positions("fsync", root) if i > renamed)
    old = f"{root}/{STANDS:06d}"
    touched = [i for i, call in enumerate(found) if call.changes and any(p.startswith(old) for p in call.paths)]
    assert touched and parent < min(touched)
    for name in map(Path, files):
        read = [i for i in positions("open", f"{final}/{name.name}") if not found[i].changes]
        assert read and renamed < read[0] < min(touched)
