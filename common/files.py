"""Files that are written atomically, and the readers of JSON files and of `metrics.jsonl`."""

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from common.errors import CHECKPOINT, DISK_OR_MEMORY, RemovedError, UserError, is_out_of_memory

MAX_JSON_BYTES = 1 << 25  # of a file that is parsed: a damaged or foreign one could take all memory


def write_atomic(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Replace a file in one step, once the chunks are on the disk; its folder is created if needed. If that fails, the previous
    file stays, and UserError is raised (exit code 6)."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:100]}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.writelines(chunks)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)  # mkstemp allows only the owner to read
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}", DISK_OR_MEMORY) from error


@contextlib.contextmanager
def reading(path: Path | str, what: str, hint: str = "") -> Iterator[None]:
    """Turn what a missing or damaged file raises in the body, which reads it, into a UserError (exit code 4), or RemovedError if
    `path` does not exist. `what` it should be, such as "attention file"; `hint` says what to do about a damaged one."""
    try:
        yield
    except OSError as error:
        kind = UserError if Path(path).exists() else RemovedError
        raise kind(f"cannot read {error.filename or path}: {error.strerror or error}", CHECKPOINT) from error
    except _damage_errors() as error:
        if is_out_of_memory(error):
            raise
        reason = f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())[:2000]
        message = f"{path} is not a readable {what}: {reason}" + (f"; {hint}" if hint else "")
        raise UserError(message, CHECKPOINT) from error


def _damage_errors() -> tuple[type[Exception], ...]:
    """What readers of damaged files raise. safetensors is loaded only then, not while a script starts."""
    from safetensors import SafetensorError

    return SafetensorError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError


def retry_if_removed(main: Callable[[list[str]], None]) -> Callable[[list[str]], None]:
    """Decorate a script's `main` that reads a run: it starts again if training removed a file between listing and reading."""

    def retrying(argv: list[str]) -> None:
        for _ in range(9):
            with contextlib.suppress(RemovedError):
                main(argv)
                return
        main(argv)

    return retrying


def remove_temporary_files(folder: Path) -> None:
    """Remove the temporary files that `write_atomic` leaves in a folder when its process is killed."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if re.fullmatch(r"\..+\.[a-z0-9_]{8}", path.name) and path.is_file():
            with contextlib.suppress(OSError):
                path.unlink()


def read_json(path: Path) -> Any:
    """The content of a JSON file of bounded size; raises ValueError or OSError."""
    with path.open("rb") as file:
        data = file.read(MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        raise ValueError(f"it has more than {MAX_JSON_BYTES:,} bytes of JSON")
    return json.loads(data)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, if there is one, up to the first that is not a JSON object with a step."""
    lines: list[dict[str, Any]] = []
    with contextlib.suppress(OSError, ValueError, RecursionError):
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
            line = json.loads(text)
            if not isinstance(line, dict) or not isinstance(line.get("step"), int):
                break
            lines.append(line)
    return lines
