"""The run folder: its name, the lock that keeps a second trainer out, and the config that it keeps."""

from __future__ import annotations

import dataclasses
import fcntl
import os
from pathlib import Path
from typing import IO

from runtime.config import RunConfig, to_toml
from runtime.errors import CONFIG, DISK_OR_MEMORY, IN_USE, UserError


def choose_folder(config: RunConfig, name: str) -> RunConfig:
    """The config with `run.dir` decided: as asked, the resumed run's, or the first free of runs/NAME, runs/NAME-2, …

    Raises:
        UserError: if the folder that was asked for already holds a run; nothing is ever overwritten.
    """
    if config.run.resume:
        return config
    if not config.run.dir:
        folder, number = Path("runs") / name, 1
        while (folder / "config.toml").exists():
            number += 1
            folder = Path("runs") / f"{name}-{number}"
    else:
        folder = Path(config.run.dir)
        if (folder / "config.toml").exists():
            raise UserError(
                f"{folder} already holds a run; go on with it by --run.resume {folder}, or choose another --run.dir",
                CONFIG,
            )
    return dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(folder)))


def open_folder(config: RunConfig) -> tuple[Path, IO[str]]:
    """Make the run folder, lock it for this process, and keep the config in it.

    Returns the folder and the lock, which holds until it is closed or its process ends.

    Raises:
        UserError: if it can't be written (exit code 6) or another process trains in it (7).
    """
    folder = Path(config.run.dir)
    try:
        (folder / "attention").mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("a+", encoding="utf-8")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            owner = lock.read().strip() or "unknown"
            lock.close()
            raise UserError(
                f"{folder} is in use by process {owner}; wait for it, or choose another --run.dir", IN_USE
            ) from error
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        saved = dataclasses.replace(config, run=dataclasses.replace(config.run, resume=""))
        temporary = folder / "config.writing"
        temporary.write_text(to_toml(saved), encoding="utf-8")
        temporary.replace(folder / "config.toml")
    except OSError as error:
        raise UserError(
            f"cannot write the run folder {folder}: {error.strerror}; choose another with --run.dir", DISK_OR_MEMORY
        ) from error
    return folder, lock
