"""The run folder: its name, the lock that keeps a second trainer out, and the config that marks it as a run.

Free of torch: a folder in use is said within a blink. Of several processes only the first owns the folder; the others
are told its name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from common.errors import CHECKPOINT, CONFIG, DISK_OR_MEMORY, IN_USE, UserError, escape_control_chars
from training.config import RunConfig, to_toml

MARK = "config.toml"
"""A folder that holds it is a run, and can be resumed; it is written once the first checkpoint is there."""


@contextlib.contextmanager
def open_run_dir(config: RunConfig, name: str) -> Iterator[RunConfig]:
    """The config with its folder decided, which is locked while the body runs; for the first of several processes.

    Args:
        name: of the config file or text; the folder is named after it unless `run.dir` names one.

    Raises:
        UserError: if the folder holds a run that was not asked for (2), links out of itself (4), can't be written (6)
            or is in use by another process (7).
    """
    if os.environ.get("RANK", "0") != "0":
        yield config
        return
    config, lock = claim(config, name)
    try:
        yield config
    finally:
        lock.close()


def claim(config: RunConfig, name: str) -> tuple[RunConfig, IO[str]]:
    """Decide on the folder and lock it: the resumed run's, the one asked for, or the first free of runs/NAME, -2, …"""
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if config.run.resume:
        return config, lock_folder(Path(config.run.resume))
    if config.run.dir:
        folder = Path(config.run.dir)
        restarted = restarted and owner(folder)[1:] == [job()]  # not somebody else's run, refused a moment ago
        if is_run(folder) and not restarted:
            raise UserError(
                f"{folder} already holds a run; go on with it by --run.resume {folder}, or choose another --run.dir",
                CONFIG,
            )
        if holds_steps(folder) and not is_run(folder):
            raise UserError(
                f"{escape_control_chars(folder)} holds checkpoints but no {MARK}; bring that back, or choose another --run.dir",
                CHECKPOINT,
            )
        return settled(config, folder, restarted), lock_folder(folder)
    number = 1
    while True:
        folder = Path("runs") / (name if number == 1 else f"{name}-{number}")
        number += 1
        ours = restarted and owner(folder)[1:] == [job()]
        if (is_run(folder) or holds_steps(folder)) and not ours:
            continue
        try:
            return settled(config, folder, restarted), lock_folder(folder)
        except UserError as error:  # another trainer has just begun there
            if error.exit_code != IN_USE:
                raise


def settled(config: RunConfig, folder: Path, restarted: bool) -> RunConfig:
    """The config with its folder; a job that torchrun has restarted goes on with the run that it had begun."""
    resume = str(folder) if restarted and is_run(folder) else ""
    return dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(folder), resume=resume))


def is_run(folder: Path) -> bool:
    """Whether the folder holds a run that can be resumed."""
    return (folder / MARK).exists()


def holds_steps(folder: Path) -> bool:
    """Whether something was learned there: a new run has but the checkpoint of step 0 until its mark is written."""
    return any(path.name.isdecimal() and int(path.name) > 0 for path in (folder / "checkpoints").glob("*"))


def job() -> str:
    """torchrun's name for this job, the same after a restart; a job that was given none is known by its agent."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return f"{socket.gethostname()}-{os.getppid()}" if name == "none" else name


def owner(folder: Path) -> list[str]:
    """What the last owner of the folder wrote into its lock: its process, then its job."""
    try:
        return (folder / "lock").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def lock_folder(folder: Path) -> IO[str]:
    """Make the folder and lock it; the lock is let go when it is closed, or with its process.

    Raises:
        UserError: if it links out of itself (4), can't be written (6) or another process trains in it (7).
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        check_links(folder)
        lock = (folder / "lock").open("a+", encoding="utf-8")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.close()
            process = (owner(folder) or ["unknown"])[0]
            raise UserError(
                f"{folder} is in use by process {process}; wait for it, or choose another --run.dir", IN_USE
            ) from error
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n{job()}\n")
        lock.flush()
        (folder / "attention").mkdir(exist_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from error
    return lock


def check_links(folder: Path) -> None:
    """Refuse a run folder in which a symbolic link leads out of it: a run writes into its own folder alone.

    Raises:
        UserError: naming the link (exit code 4).
    """
    inside = folder.resolve()
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(place) / name
            if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(inside):
                raise UserError(
                    f"{escape_control_chars(path)} is a link that leads out of the run folder; put a copy in its place, or "
                    "remove it",
                    CHECKPOINT,
                )
            kind = path.lstat().st_mode
            if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind) or stat.S_ISLNK(kind)):
                raise UserError(
                    f"{escape_control_chars(path)} is no file but a pipe or a device; remove it", CHECKPOINT
                )


def save_config(config: RunConfig) -> None:
    """Write `config.toml`, in one step: from now on the folder is a run.

    Raises:
        UserError: if it can't be written (exit code 6).
    """
    folder = Path(config.run.dir)
    own = dataclasses.replace(config.run, resume="", stop_at_step=0)
    temporary = folder / "config.writing"
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(to_toml(dataclasses.replace(config, run=own)))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(folder / MARK)
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        raise cannot_write(folder, error) from error


def cannot_write(folder: Path, error: OSError) -> UserError:
    """What to tell of a folder that is full or forbidden."""
    return UserError(
        f"cannot write the run folder {folder}: {error.strerror}; choose another with --run.dir", DISK_OR_MEMORY
    )
