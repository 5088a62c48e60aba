"""Full, failing and forbidden disks: exit 6 and one line, and after making room the run goes on as if nothing was.

A tmpfs of a megabyte is a disk that can be filled to the last page. It is mounted where the tests may mount.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.forkserver import ForkServer
from tests.faults.harness import Reference, committed, good
from tests.runs import said

STANDS = 4
PAGE = 4096


@contextlib.contextmanager
def disk(folder: Path, size: str) -> Iterator[Path]:
    """A disk of that size, mounted at `folder`; the test is skipped where mounting is not allowed."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path, room: int) -> Path:
    """A file that leaves so many bytes of a disk."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file:
        free = os.statvfs(folder)
        file.write(b"\0" * max(0, free.f_bavail * free.f_frsize - room))
    return ballast


@pytest.fixture(scope="module")
def stands(server: ForkServer, reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reference.stopped_at(STANDS, server, tmp_path_factory.mktemp("stands") / "run")


def refused(done: subprocess.CompletedProcess[str], run: Path) -> None:
    """One line, exit code 6, and the checkpoint that was there is as good as before."""
    said(done, 6)
    now = committed(run)
    assert now >= STANDS and good(run / "checkpoints" / f"{now:06d}")


def goes_on(server: ForkServer, reference: Reference, run: Path) -> None:
    """Resumed, the run ends like the one that nothing disturbed."""
    done = server.run(f"--run.resume={run}", "--run.stop_at_step=0")
    assert done.returncode == 0, done.stderr
    reference.check(run)


@pytest.mark.parametrize("share", range(2))
def test_a_full_disk(share: int, server: ForkServer, reference: Reference, stands: Path, tmp_path: Path) -> None:
    """With ever more room: the metrics, a sample, a dump, a checkpoint, a picture is the first that finds none."""
    refusals, pages = 0, share
    with disk(tmp_path / "disk", "4m") as small:
        while True:
            run = shutil.copytree(stands, small / "run")
            ballast = fill(small, pages * PAGE)
            done = server.run(f"--run.resume={run}", "--run.stop_at_step=0")
            if not done.returncode:
                break
            refused(done, run)
            ballast.unlink()
            goes_on(server, reference, run)
            shutil.rmtree(run)
            refusals, pages = refusals + 1, pages + 2 + pages // 3
    assert refusals > 4


def test_a_disk_that_is_full_from_the_start(server: ForkServer, reference: Reference, tmp_path: Path) -> None:
    """The same command starts the run once there is room."""
    with disk(tmp_path / "disk", "2m") as small:
        run = small / "run"
        for pages in range(0, 12):
            ballast = fill(small, pages * PAGE)
            done = server.run(*reference.argv, f"--run.dir={run}")
            said(done, 6)
            assert (run / "config.toml").is_file() <= (committed(run) >= 0)
            ballast.unlink()
            if (run / "config.toml").is_file():
                break
            shutil.rmtree(run, ignore_errors=True)
        begun = (run / "config.toml").is_file()
        done = server.run(*([f"--run.resume={run}"] if begun else [*reference.argv, f"--run.dir={run}"]))
        assert done.returncode == 0, done.stderr
        reference.check(run)


@pytest.mark.parametrize("pages", [0, 1, 2, 4])
def test_a_full_cache(pages: int, server: ForkServer, reference: Reference, tmp_path: Path) -> None:
    """The prepared tokens find no room; there is no run then, and the same command starts it later."""
    run = tmp_path / "run"
    with disk(tmp_path / "cache", "256k") as small:
        env = {"GLASSGPT_CACHE": str(small)}
        ballast = fill(small, pages * PAGE)
        line = said(server.run(*reference.argv, f"--run.dir={run}", env=env), 6)
        assert str(small) in line
        assert not (run / "config.toml").exists()
        ballast.unlink()
        done = server.run(*reference.argv, f"--run.dir={run}", env=env)
        assert done.returncode == 0, done.stderr
    reference.check(run)


@pytest.mark.parametrize("limit", [1500, 4000, 6000, 12_000])
def test_a_limit_on_the_size_of_files(
    limit: int, server: ForkServer, reference: Reference, stands: Path, tmp_path: Path
) -> None:
    """RLIMIT_FSIZE: EFBIG at whatever grows beyond it."""
    run = tmp_path / "run"
    shutil.copytree(stands, run)
    refused(server.run(f"--run.resume={run}", "--run.stop_at_step=0", largest_file=limit), run)
    goes_on(server, reference, run)


@pytest.mark.parametrize("part", ["", "checkpoints", "attention"])
def test_a_folder_that_may_not_be_written(
    part: str, server: ForkServer, reference: Reference, stands: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(stands, run)
    (run / part).chmod(0o555)
    refused(server.run(f"--run.resume={run}", "--run.stop_at_step=0", powerless=True), run)
    (run / part).chmod(0o755)
    goes_on(server, reference, run)


def test_a_disk_that_can_only_be_read(server: ForkServer, reference: Reference, stands: Path, tmp_path: Path) -> None:
    """As a disk is after an error, mounted anew; sampling still works."""
    with disk(tmp_path / "disk", "2m") as small:
        run = small / "run"
        shutil.copytree(stands, run)
        subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
        refused(server.run(f"--run.resume={run}", "--run.stop_at_step=0"), run)
        done = server.run(run, "--tokens=4", script="sample.py")
        assert done.returncode == 0, done.stderr
        subprocess.run(["mount", "-o", "remount,rw", str(small)], check=True)
        goes_on(server, reference, run)


def test_checkpoints_that_may_not_be_read(
    server: ForkServer, reference: Reference, stands: Path, tmp_path: Path
) -> None:
    """Unreadable is not damaged beyond repair: nothing is trained anew, and with the right it goes on."""
    run = tmp_path / "run"
    shutil.copytree(stands, run)
    weights = list(run.glob("checkpoints/*/model.safetensors"))
    for path in weights:
        path.chmod(0)
    said(server.run(f"--run.resume={run}", "--run.stop_at_step=0", powerless=True), 4)
    for path in weights:
        path.chmod(0o644)
    goes_on(server, reference, run)
