"""Saves a few checkpoints in a process of its own and prints, as JSON, what that did to the file system.

    python -m tests.training.disk_log RUN

Each entry is [event, path, other]: what `saving.py` announces (its operation; other: the thread's name), and what
really happens, by Python's own audit events and by watching `os.fsync` (other: the size by then, or the new name).
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

REAL = {"os.rename", "os.mkdir", "os.remove", "os.rmdir"}


def main(run: str) -> None:
    from tests.training.checkpoints import write
    from training import saving

    log: list[tuple[str, str, Any]] = []

    def listen(event: str, args: tuple[Any, ...]) -> None:
        if event == "glassgpt.disk":
            log.append((args[0], args[1], threading.current_thread().name))
        elif event in REAL and str(args[0]).startswith(run):
            log.append((event, str(args[0]), str(args[1]) if event == "os.rename" else ""))
        elif event == "open" and str(args[0]).startswith(run) and (args[2] or 0) & os.O_CREAT:
            log.append(("created", str(args[0]), ""))

    def fsync(handle: int, real: Any = os.fsync) -> None:
        real(handle)
        log.append(("os.fsync", os.readlink(f"/proc/self/fd/{handle}"), os.fstat(handle).st_size))

    def verify_checkpoint(folder: Path, real: Any = saving.verify_checkpoint) -> str | None:
        fault: str | None = real(folder)
        log.append(("verified", str(folder), fault))
        return fault

    os.fsync, saving.verify_checkpoint = fsync, verify_checkpoint
    sys.addaudithook(listen)
    saver = saving.CheckpointWriter(Path(run), keep=1)
    for step in (1, 2):
        write(saver, step)
        saver.finish()
    sizes = {str(p): p.stat().st_size for p in Path(run).glob("checkpoints/*/*")}
    print(json.dumps({"log": log, "sizes": sizes}))


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main(sys.argv[1])
