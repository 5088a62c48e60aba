"""Which checkpoints stay, and the operations on the file system that a save consists of.

`saving.py` calls `sweep` when a run begins, and `prune` and `settle` once a new checkpoint is known to be on the disk.
No folder that bears a step's name is ever half there: it is renamed before it is removed.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from training.checkpoint import REPLACED, list_checkpoints, step_of_folder, verify_checkpoint

WRITING, REMOVING = ".writing-", ".removing-"


def announce(operation: str, path: Path) -> None:
    """Tell whoever listens what is about to happen to the file system."""
    sys.audit("glassgpt.disk", operation, str(path))


def settle(folder: Path) -> None:
    """Of a step's folder and the one that it took the place of, keep the new one; the old one if only that is whole."""
    replaced = folder.with_name(f"{REPLACED}{folder.name}")
    if not replaced.exists():
        return
    if folder.exists():
        if verify_checkpoint(folder) is None or verify_checkpoint(replaced) is not None:
            remove(replaced)
            return
        discard(folder)
    rename(replaced, folder)
    sync(folder.parent)


def sweep(root: Path) -> None:
    """Settle what a killed process left half-done."""
    for path in sorted(root.iterdir()):
        if path.name.startswith((WRITING, REMOVING)):
            remove(path)
        elif path.name.startswith(REPLACED):
            settle(path.with_name(path.name.removeprefix(REPLACED)))


def prune(root: Path, step: int, best: int, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints up to `step`, that one, and that of step `best`.

    Later ones can only be left from before a resumption that passed over them: they are replaced when their step comes.
    """
    past = [folder for folder in list_checkpoints(root) if (step_of_folder(folder) or 0) <= step]
    for folder in past[:-keep]:
        if step_of_folder(folder) not in (step, best):
            discard(folder)


def discard(folder: Path) -> None:
    """Remove a checkpoint: no folder with a step's name is ever half there."""
    removing = folder.with_name(f"{REMOVING}{step_of_folder(folder):06d}")
    remove(removing)
    rename(folder, removing)
    remove(removing)


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    announce("fsync", path)
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def rename(old: Path, new: Path) -> None:
    announce("rename", old)
    old.rename(new)


def remove(path: Path) -> None:
    """Remove a file or a whole folder, if it is there; a link is removed, and not followed."""
    if path.is_dir() and not path.is_symlink():
        for inside in path.iterdir():
            remove(inside)
        announce("remove", path)
        path.rmdir()
    elif path.is_symlink() or path.exists():
        announce("remove", path)
        path.unlink()
