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

from tests.faults.harness import Reference, committed
from tests.faults.hook import Hook
from tests.faults.processes import run_script
from tests.runs import error_line

START = 6
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


def test_disk_full_while_training(reference: Reference, at_step_6: Path, tmp_path: Path) -> None:
    """With more and more space: metrics, a sample, an attention file, a checkpoint, a picture is the first without."""
    refusals = pages = 0
    with disk(tmp_path / "disk", "4m") as small:
        while True:
            run = shutil.copytree(at_step_6, small / "run")
            ballast = fill(small, pages * PAGE)
            done = run_script(f"--run.resume={run}")
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
def test_disk_full_from_the_start(pages: int, reference: Reference, tmp_path: Path) -> None:
    """The same command starts the run once there is space."""
    with disk(tmp_path / "disk", "2m") as small:
        run = small / "run"
        ballast = fill(small, pages * PAGE)
        error_line(run_script(*reference.argv, f"--run.dir={run}"), 6)
        assert (run / "config.toml").is_file() <= (committed(run) >= 0)
        ballast.unlink()
        reference.resume(run)


def test_cache_disk_full(reference: Reference, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with disk(tmp_path / "cache", "256k") as small:
        env = {"GLASSGPT_CACHE": str(small)}
        ballast = fill(small, 2 * PAGE)
        assert str(small) in error_line(run_script(*reference.argv, f"--run.dir={run}", env=env), 6)
        assert not (run / "config.toml").exists()
        ballast.unlink()
        assert run_script(*reference.argv, f"--run.dir={run}", env=env).returncode == 0
    reference.check(run)


@pytest.mark.parametrize("part", ["", "/checkpoints"])
def test_folder_without_write_permission(part: str, reference: Reference, at_step_6: Path, tmp_path: Path) -> None:
    run = shutil.copytree(at_step_6, tmp_path / "run")
    error_line(run_script(f"--run.resume={run}", hook=Hook(1, "EACCES", path=f"{run}{part}", lasting=True)), 6)
    assert committed(run) >= START
    reference.resume(run)
