"""Full disks and read-only folders: exit code 6 and one line, and with space again the run continues as if nothing was.

A small tmpfs is a disk that can be filled to the last page; those tests need the right to mount.
"""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.forkserver import ForkServer
from tests.faults.harness import Reference, committed
from tests.runs import error_line

START = 4
PAGE = 4096


@contextlib.contextmanager
def disk(folder: Path, size: str) -> Iterator[Path]:
    """A disk of that size, mounted at `folder`."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path, free: int) -> Path:
    """A file that leaves so many bytes free."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file:
        info = os.statvfs(folder)
        file.write(b"\0" * max(0, info.f_bavail * info.f_frsize - free))
    return ballast


@pytest.fixture(scope="module")
def start(reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reference.stopped_at(START, tmp_path_factory.mktemp("start") / "run")


def test_disk_full_while_training(server: ForkServer, reference: Reference, start: Path, tmp_path: Path) -> None:
    """With more and more space: metrics, a sample, an attention file, a checkpoint, a picture is the first without."""
    refusals = pages = 0
    with disk(tmp_path / "disk", "4m") as small:
        while True:
            run = shutil.copytree(start, small / "run")
            ballast = fill(small, pages * PAGE)
            done = server.run(f"--run.resume={run}")
            if not done.returncode:
                break
            error_line(done, 6)
            assert committed(run) >= START
            ballast.unlink()
            reference.resume(run)
            shutil.rmtree(run)
            refusals, pages = refusals + 1, pages + 2 + pages // 2
    assert refusals > 4


@pytest.mark.parametrize("pages", [0, 9])
def test_disk_full_from_the_start(pages: int, server: ForkServer, reference: Reference, tmp_path: Path) -> None:
    """The same command starts the run once there is space."""
    with disk(tmp_path / "disk", "2m") as small:
        run = small / "run"
        ballast = fill(small, pages * PAGE)
        error_line(server.run(*reference.argv, f"--run.dir={run}"), 6)
        assert (run / "config.toml").is_file() <= (committed(run) >= 0)
        ballast.unlink()
        reference.resume(run)


def test_cache_disk_full(server: ForkServer, reference: Reference, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with disk(tmp_path / "cache", "256k") as small:
        env = {"GLASSGPT_CACHE": str(small)}
        ballast = fill(small, 2 * PAGE)
        assert str(small) in error_line(server.run(*reference.argv, f"--run.dir={run}", env=env), 6)
        assert not (run / "config.toml").exists()
        ballast.unlink()
        assert server.run(*reference.argv, f"--run.dir={run}", env=env).returncode == 0
    reference.check(run)


@pytest.mark.parametrize("part", ["", "checkpoints"])
def test_folder_without_write_permission(
    part: str, server: ForkServer, reference: Reference, start: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(start, tmp_path / "run")
    (run / part).chmod(0o555)
    error_line(server.run(f"--run.resume={run}", powerless=True), 6)
    assert committed(run) >= START
    (run / part).chmod(0o755)
    reference.resume(run)


def test_unreadable_checkpoints(server: ForkServer, reference: Reference, start: Path, tmp_path: Path) -> None:
    """Nothing is trained again; with the permission the run continues."""
    run = shutil.copytree(start, tmp_path / "run")
    weights = list(run.glob("checkpoints/*/model.safetensors"))
    for path in weights:
        path.chmod(0)
    error_line(server.run(f"--run.resume={run}", powerless=True), 4)
    for path in weights:
        path.chmod(0o644)
    reference.resume(run)
