"""The run folder: its name, the lock that keeps a second trainer out, and `config.toml`, which makes it a run.

Imports no torch, so that a folder in use is reported at once. Of several processes only rank 0 opens the folder; the
others receive its name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import itertools
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from common.errors import CHECKPOINT, CONFIG, DISK_OR_MEMORY, IN_USE, UserError, escape_control_chars
from common.files import write_atomic
from training.config import RunConfig, to_toml

CONFIG_FILE = "config.toml"
"""A folder with this file is a run that can be resumed; it is written after the first checkpoint."""


@contextlib.contextmanager
def open_run_dir(config: RunConfig, name: str) -> Iterator[RunConfig]:
    """The config with its folder decided, which is locked while the body runs; only rank 0 does this.

    Args:
        name: of the config file or text; the folder is named after it unless `run.dir` names one.

    Raises:
        UserError: if the folder already holds a run (2) or checkpoints without a config (4), cannot be written (6), or
            is in use by another process (7).
    """
    if os.environ.get("RANK", "0") != "0":
        yield config
        return
    config, lock = claim_run_dir(config, name)
    try:
        yield config
    finally:
        lock.close()


def claim_run_dir(config: RunConfig, name: str) -> tuple[RunConfig, IO[str]]:
    """Choose and lock the folder: the resumed run's, `run.dir`, or the first free one of runs/NAME, runs/NAME-2, ..."""
    if config.run.resume:
        return config, lock_folder(Path(config.run.resume))
    if config.run.dir:
        folder = Path(config.run.dir)
        shown = escape_control_chars(folder)
        if _has_checkpoints(folder) and not _is_run(folder):
            message = f"{shown} has checkpoints but no {CONFIG_FILE}; restore that file, or choose another --run.dir"
            raise UserError(message, CHECKPOINT)
        if _is_run(folder) and not _is_restart_of(folder):
            message = f"{shown} already holds a run; continue it with --run.resume {shown}, or choose another --run.dir"
            raise UserError(message, CONFIG)
        return _with_folder(config, folder), lock_folder(folder)
    for number in itertools.count(1):
        folder = Path("runs") / (name if number == 1 else f"{name}-{number}")
        if (_is_run(folder) or _has_checkpoints(folder)) and not _is_restart_of(folder):
            continue
        try:
            return _with_folder(config, folder), lock_folder(folder)
        except UserError as error:  # another trainer has just started there
            if error.exit_code != IN_USE:
                raise
    raise AssertionError("unreachable")


def _with_folder(config: RunConfig, folder: Path) -> RunConfig:
    """The config with its folder; a job that torchrun has restarted resumes the run that it had started."""
    resume = str(folder) if _is_run(folder) and _is_restart_of(folder) else ""
    return dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(folder), resume=resume))


def _is_run(folder: Path) -> bool:
    return (folder / CONFIG_FILE).exists()


def _has_checkpoints(folder: Path) -> bool:
    """Whether there is a checkpoint after step 0, which a new run writes before its `config.toml`."""
    return any(path.name.isdecimal() and int(path.name) > 0 for path in (folder / "checkpoints").glob("*"))


def _is_restart_of(folder: Path) -> bool:
    """Whether torchrun has restarted this job, and the folder was last locked by this same job."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and _lock_owner(folder)[1:] == [_job_name()]


def _job_name() -> str:
    """torchrun's name for this job, the same after a restart; a job without a name is named by host and parent process."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return f"{socket.gethostname()}-{os.getppid()}" if name == "none" else name


def _lock_owner(folder: Path) -> list[str]:
    """What the last owner of the folder wrote to its lock: process id and job."""
    try:
        return (folder / "lock").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def lock_folder(folder: Path) -> IO[str]:
    """Create and lock the folder; the lock ends when it is closed, or with the process.

    Raises:
        UserError: if it cannot be written (6), or another process trains in it (7).
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("a+", encoding="utf-8")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.close()
            process = (_lock_owner(folder) or ["unknown"])[0]
            raise UserError(
                f"{folder} is in use by process {process}; wait for it, or choose another --run.dir", IN_USE
            ) from error
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n{_job_name()}\n")
        lock.flush()
        (folder / "attention").mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write the run folder {folder}: {error.strerror}; choose another with --run.dir", DISK_OR_MEMORY
        ) from error
    return lock


def save_config(config: RunConfig) -> None:
    """Write `config.toml`, which marks the folder as resumable. Raises UserError (6)."""
    run = dataclasses.replace(config.run, resume="", stop_at_step=0)
    write_atomic(Path(config.run.dir) / CONFIG_FILE, [to_toml(dataclasses.replace(config, run=run)).encode()])
