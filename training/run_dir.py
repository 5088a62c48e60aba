"""The run folder: its name, its lock, and `config.toml`, which makes it a run. Imports no torch: refuses at once."""

import contextlib
import dataclasses
import itertools
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from common.errors import CHECKPOINT, CONFIG, DISK_OR_MEMORY, IN_USE, UserError, quote_arg
from common.files import write_atomic
from training.config import RunConfig, to_toml

LOCK, OWNER = "lock", "lock-owner"  # two files: on Windows nobody else can read a locked one
CONFIG_FILE = "config.toml"  # makes a folder a run that can be resumed; written after the first checkpoint


@contextlib.contextmanager
def open_run_dir(config: RunConfig, name: str) -> Iterator[RunConfig]:
    """The config with its folder decided, which is locked while the body runs; only rank 0 does this.

    The folder is the resumed run's, `run.dir`, or the first free one of runs/NAME, runs/NAME-2, ...

    Raises UserError if the folder already holds a run or other files (2) or checkpoints without a config (4), cannot be
    written (6), or is in use by another process (7).
    """
    if os.environ.get("RANK", "0") != "0":
        yield config
        return
    given = config.run.resume or config.run.dir
    numbered = (Path("runs") / (name if number == 1 else f"{name}-{number}") for number in itertools.count(1))
    for folder in [Path(given)] if given else numbered:
        try:
            resume = config.run.resume or (str(folder) if is_restart(folder) else "")
            made = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
            lock = lock_folder(folder)
            break
        except UserError as error:
            if given or error.exit_code == DISK_OR_MEMORY:
                raise
    run = dataclasses.replace(config.run, dir=str(folder), resume=resume)
    with lock:
        try:
            yield dataclasses.replace(config, run=run)
        except BaseException:  # a start that failed leaves no folder
            with contextlib.suppress(OSError):
                if made and {*os.listdir(folder)} == {LOCK, OWNER}:
                    (folder / OWNER).unlink()
                    (folder / LOCK).unlink()
                    for path in made:
                        path.rmdir()
            raise


def is_restart(folder: Path) -> bool:
    """Whether the folder holds the run of this same job, which torchrun has restarted; False if it is free. Raises UserError
    if it holds another run (2), or checkpoints without a config (4), but for step 0's."""
    if os.path.exists(folder / CONFIG_FILE):
        if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and _lock_owner(folder)[1:] == [_job_name()]:
            return True
        message = f"{folder} already holds a run; continue it with --run.resume {quote_arg(folder)}, or choose another --run.dir"
        raise UserError(message, CONFIG)
    steps = (folder / "checkpoints").glob("*") if os.access(folder, os.X_OK) else ()
    if any(path.name.isdecimal() and int(path.name) > 0 for path in steps):
        message = f"{folder} has checkpoints but no {CONFIG_FILE}; restore that file, or choose another --run.dir"
        raise UserError(message, CHECKPOINT)
    return False


def _job_name() -> str:
    """torchrun's name for this job, the same after a restart; without one, its host and parent process."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return f"{socket.gethostname()}-{os.getppid()}" if name == "none" else name


def _lock_owner(folder: Path) -> list[str]:
    """Process id and job of the last owner of the folder."""
    with contextlib.suppress(OSError):
        return (folder / OWNER).read_text(encoding="utf-8", errors="replace").splitlines()
    return []


def lock_folder(folder: Path) -> contextlib.AbstractContextManager[object]:
    """Create and lock the folder, until `with` the result ends or the process does. Raises UserError (2, 6 or 7)."""
    from filelock import FileLock, Timeout  # `--help` does not wait for it

    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
        if names and not {LOCK, CONFIG_FILE} & {*names}:  # a start that was killed has left a lock
            message = f"{folder} holds other files, such as {names[0]}; choose a new or empty folder with --run.dir"
            raise UserError(message, CONFIG)
        lock = FileLock(folder / LOCK, blocking=False).acquire()
        (folder / OWNER).write_text(f"{os.getpid()}\n{_job_name()}\n", encoding="utf-8")
    except Timeout as error:
        process = (_lock_owner(folder) or ["unknown"])[0]
        message = f"{folder} is in use by process {process}; wait for it, or choose another --run.dir"
        raise UserError(message, IN_USE) from error
    except OSError as error:
        message = f"cannot write the run folder {folder}: {error.strerror}; choose another with --run.dir"
        raise UserError(message, DISK_OR_MEMORY) from error
    return lock


def save_config(config: RunConfig) -> None:
    """Write `config.toml`, which marks the folder as resumable. Raises UserError (6)."""
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, resume="", stop_at_step=0))
    write_atomic(Path(config.run.dir) / CONFIG_FILE, [to_toml(config).encode(errors="surrogateescape")])
