"""Files that are replaced whole or not at all: a reader never meets half of one."""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from common.errors import DISK_OR_MEMORY, UserError


def write_atomic(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Put the chunks in the place of `path` in one step, once they are safely on disk; its folder is made if need be.

    Raises:
        UserError: if the file cannot be written (exit code 6); what was there before stays.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:100]}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.writelines(chunks)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)  # mkstemp lets nobody else read
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}", DISK_OR_MEMORY) from error


def remove_temporary_files(folder: Path) -> None:
    """Remove what `write_atomic` had begun beside its files when its process was killed."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if re.fullmatch(r"\..+\.[a-z0-9_]{8}", path.name) and path.is_file():
            with contextlib.suppress(OSError):  # a leftover does no harm
                path.unlink()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl` up to the first that is not a JSON object with a step; a crash may cut the last.

    A file that is missing, unreadable or not a regular file has no lines.
    """
    lines: list[dict[str, Any]] = []
    with contextlib.suppress(OSError, ValueError, RecursionError):
        texts = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
        for text in texts:
            line = json.loads(text)
            if not isinstance(line, dict) or not isinstance(line.get("step"), int):
                break
            lines.append(line)
    return lines
