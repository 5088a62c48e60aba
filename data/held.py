"""A file of a prepared folder, held open for as long as a run reads from it.

Where this stands: `manifest.py` opens every file that it lists as a `ChecksummedFile`; `shards.py` reads the tokens through
it. Reading is `pread`, never a memory map: where a file shrinks or its disk fails, a map ends the process with SIGBUS,
before anybody can say what happened; `pread` returns an error.

What is held is the file, not its name: a folder that another process removes or prepares again can still be read.
"""

from __future__ import annotations

import hashlib
import os
import stat
import weakref
from collections.abc import Callable
from pathlib import Path

BLOCK = 256 * 1024
"""Bytes that are hashed at a time."""


class DamagedShards(Exception):
    """A prepared folder that is not what its manifest says. Never a user's fault: it is prepared again."""


class ChecksummedFile:
    """A regular file of a known size, open for reading; the descriptor is closed together with this object.

    Raises `DamagedShards` where the file is another than was promised, and OSError where it cannot be read.
    """

    def __init__(self, path: Path, size: int, sha256: str) -> None:
        self.path, self.size, self.sha256 = path, size, sha256
        self._descriptor = _open(path)
        weakref.finalize(self, os.close, self._descriptor)
        status = os.fstat(self._descriptor)
        if status.st_size != size:
            raise DamagedShards(f"{path.name} has the wrong size")
        self._changed = status.st_mtime_ns

    def read(self, offset: int, n_bytes: int) -> bytes:
        """`n_bytes` bytes from `offset` on. Where the file was written to since, its sha256 is looked at first."""
        data = self._bytes(offset, n_bytes)
        changed = os.fstat(self._descriptor).st_mtime_ns
        if changed != self._changed:
            self.verify()
            # Taken before the verification: a change during it is looked at the next time.
            self._changed = changed
        return data

    def verify(self, told: Callable[[int], object] = lambda n_bytes: None) -> None:
        """Compare the content with its sha256; `told` hears of the bytes of each block that was read."""
        digest = hashlib.sha256()
        for offset in range(0, self.size, BLOCK):
            block = self._bytes(offset, min(BLOCK, self.size - offset))
            digest.update(block)
            told(len(block))
        if digest.hexdigest() != self.sha256 or os.fstat(self._descriptor).st_size != self.size:
            raise DamagedShards(f"{self.path.name} has the wrong sha256")

    def _bytes(self, offset: int, n_bytes: int) -> bytes:
        try:
            data = os.pread(self._descriptor, n_bytes, offset)
            # The system hands out 2 GiB at a time at most, and may always hand out less.
            while len(data) < n_bytes and (more := os.pread(self._descriptor, n_bytes - len(data), offset + len(data))):
                data += more
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        if len(data) < n_bytes:
            raise DamagedShards(f"{self.path.name} became shorter")
        return data


def read_small(path: Path, most: int) -> bytes:
    """A whole regular file of at most `most` bytes. Raises `DamagedShards` or OSError."""
    with os.fdopen(_open(path), "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise DamagedShards(f"{path.name} is larger than {most} bytes")
    return data


def _open(path: Path) -> int:
    """A descriptor of a regular file. No link is followed out of the folder, no pipe is waited for, and programs that
    are started later do not inherit it."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DamagedShards(f"{path.name} is no regular file")
    return descriptor
