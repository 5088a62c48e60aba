"""How tokens lie on disk: plain `.npy` shards of one split, and a view over them that reads like one long
array.

Where this stands: `prepare.py` writes shards, `manifest.py` describes and opens them, `batches.py` and `baselines.py`
read them. Nothing here knows text.

The stream of a split is `EOT d1 EOT d2 EOT ... dn EOT`: end-of-text stands before every document and after
the last. A document *starts* at its EOT, so that its first token is predicted from something, and its end is
learned too.
"""

from __future__ import annotations

import os
from array import array
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import IO, Any, NoReturn, Protocol

import numpy as np

from common.errors import DATA, DISK_OR_MEMORY, UserError, escape_control_chars
from data.held import ChecksummedFile, DamagedShards

SHARD_TOKENS = 64 * 1024 * 1024
"""Most tokens in one shard: 128 MiB of uint16, small enough to copy and to hash without waiting."""

_MAGIC = b"\x93NUMPY\x01\x00"
_PIECE = 1 << 20
"""Document starts that are read at a time."""


class Shard(Protocol):
    """What a split is made of: a `ShardFile`, or any one-dimensional NumPy array."""

    @property
    def dtype(self) -> np.dtype: ...
    def __len__(self) -> int: ...
    def __getitem__(self, wanted: slice, /) -> np.ndarray: ...


class ShardFile:
    """A one-dimensional `.npy` file as a row of numbers, of which only what is asked for is read."""

    def __init__(self, file: ChecksummedFile, dtype: np.dtype, length: int) -> None:
        self.path, self.dtype = file.path, dtype
        self._file, self._length = file, length
        self._first = self._header()

    def _header(self) -> int:
        """Where the numbers begin. The header has to be, letter for letter, the one that `ArrayFile` writes: so there
        is nothing to interpret, and no other kind of file passes for it."""
        written = f"{{'descr': '{self.dtype.str}', 'fortran_order': False, 'shape': ({self._length},), }}"
        start = self._file.read(0, len(_MAGIC) + 2)
        header = self._file.read(len(start), int.from_bytes(start[-2:], "little"))
        first = len(start) + len(header)
        fits = self._file.size == first + self._length * self.dtype.itemsize
        if start[:-2] != _MAGIC or header.rstrip(b" \n") != written.encode() or not fits:
            raise DamagedShards(f"{self.path.name} is not what the manifest says")
        return first

    def __len__(self) -> int:
        return self._length

    def row(self, start: int, stop: int) -> np.ndarray:
        """Numbers `start <= i < stop`, which must lie within. Read-only. Raises DamagedShards or OSError."""
        size = self.dtype.itemsize
        return np.frombuffer(self._file.read(self._first + start * size, (stop - start) * size), self.dtype)

    def __getitem__(self, wanted: slice, /) -> np.ndarray:
        """As slicing an array. Raises `UserError`: it is not what it was at the start (3), or cannot be read (6)."""
        start, stop, step = wanted.indices(self._length)
        assert step == 1
        try:
            return self.row(start, max(start, stop))
        except DamagedShards as damage:
            message = f"{escape_control_chars(self.path)} was damaged while it was in use ({damage}): {self.remedy()}"
            raise UserError(message, DATA) from damage
        except OSError as error:
            message = f"cannot read {escape_control_chars(self.path)} ({error.strerror}): look after the disk, or {self.remedy()}"
            raise UserError(message, DISK_OR_MEMORY) from error

    def remedy(self) -> str:
        """What a user can do when this file fails."""
        return f"remove the folder {escape_control_chars(self.path.parent.name)}, it is prepared again; then go on with --run.resume"


@dataclass(frozen=True, eq=False)
class TokenSplit:
    """One split as one long row of tokens, however many shards it lies in. Only what is read is loaded."""

    shards: tuple[Shard, ...]
    """The tokens, uint16 or uint32, in order."""
    document_starts: np.ndarray
    """int64 positions of the EOT that begins each document, ascending, the first 0."""
    n_bytes: int
    """Bytes of UTF-8 text that the tokens encode; end-of-text counts none. For bits per byte."""
    vocab_size: int = 1 << 32
    """Every token lies below it, or reading it is an error. Unless told, whatever a shard can hold may be read."""

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(len(shard) for shard in self.shards))

    def __len__(self) -> int:
        return self._ends[-1] if self.shards else 0

    @property
    def n_documents(self) -> int:
        return len(self.document_starts)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens `start <= position < stop`, in the shards' own dtype, clipped to the split like any slice.
        Read-only.

        Raises `UserError`: a token outside the vocabulary, or a file that is no longer what it was (3); a file that
        cannot be read (6).
        """
        start, stop = max(start, 0), min(stop, len(self))
        if stop <= start:
            return np.zeros(0, self.shards[0].dtype)
        parts, position = [], start
        while position < stop:
            at = bisect_right(self._ends, position)
            base, end = self._ends[at] - len(self.shards[at]), self._ends[at]
            parts.append(self.shards[at][position - base : min(stop, end) - base])
            position = end
        tokens = parts[0] if len(parts) == 1 else np.concatenate(parts)
        if int(tokens.max()) >= self.vocab_size:
            self._refuse(start, tokens)
        return tokens

    def _refuse(self, start: int, tokens: np.ndarray) -> NoReturn:
        """Say which token, of those read from `start` on, lies outside the vocabulary."""
        first = int(np.argmax(tokens >= self.vocab_size))
        at = bisect_right(self._ends, start + first)
        shard, position = self.shards[at], start + first - self._ends[at] + len(self.shards[at])
        message = f"token {tokens[first]} at position {position} is not in the vocabulary of {self.vocab_size}"
        if isinstance(shard, ShardFile):
            message = f"{escape_control_chars(shard.path)} is damaged ({message}): {shard.remedy()}"
        raise UserError(message, DATA)


def load_document_starts(file: ShardFile, n_tokens: int) -> np.ndarray:
    """The document starts of a split of `n_tokens` tokens, int64, read-only. Raises `DamagedShards` unless they ascend
    from 0 and lie within.

    Read in pieces that are looked at before the next: a file of zeros that only claims to be large takes no memory.
    """
    starts, before = array("q"), -1
    for first in range(0, len(file), _PIECE):
        piece = file.row(first, min(first + _PIECE, len(file))).astype(np.int64)
        begins = int(piece[0]) > before if first else piece[0] == 0
        if not begins or not (piece[1:] > piece[:-1]).all() or piece[-1] >= n_tokens - 1:
            raise DamagedShards(f"{file.path.name} holds no document starts")
        starts.frombytes(piece.tobytes())
        before = int(piece[-1])
    found = np.frombuffer(starts, np.int64) if starts else np.zeros(0, np.int64)
    found.flags.writeable = False
    return found


def token_dtype(vocab_size: int) -> np.dtype:
    """The narrowest type that holds every id: uint16 up to 65,536 tokens, else uint32."""
    return np.dtype("<u2") if vocab_size <= 65_536 else np.dtype("<u4")


def shard_name(split: str, number: int) -> str:
    """The file of a split's shard; they are numbered from 0."""
    return f"{split}-{number:05d}.npy"


def documents_name(split: str) -> str:
    """The file of a split's document starts."""
    return f"{split}-documents.npy"


class ArrayFile:
    """A one-dimensional `.npy` file that grows: the header is written again with the true length when it is
    closed.

    Ordinary writes rather than a memory map, so that writing a shard needs no memory for it.
    """

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self.path, self.dtype, self.length = path, np.dtype(dtype), 0
        self._file = path.open("wb")
        self._write_header()
        self._header_bytes = self._file.tell()

    def _write_header(self) -> None:
        # numpy pads this header with room for a longer length, just so that it can be written again in place.
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(self._file, header)

    def append(self, values: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(values, dtype=self.dtype).data)
        self.length += len(values)

    def close(self) -> None:
        self._file.seek(0)
        self._write_header()
        assert self._file.tell() == self._header_bytes, "numpy changed the size of the header"
        reach_disk(self._file)
        self._file.close()

    def abandon(self) -> None:
        """Let go of the file without finishing it."""
        self._file.close()


class SplitWriter:
    """Writes one split: token shards `<split>-00000.npy`, ... and `<split>-documents.npy`.

    `append` takes what follows the leading EOT: documents each *followed* by end-of-text, in pieces of any
    size.
    """

    def __init__(
        self, folder: Path, split: str, dtype: np.dtype, end_of_text: int, shard_tokens: int = SHARD_TOKENS
    ) -> None:
        self._folder, self._split, self.dtype = folder, split, dtype
        self._end_of_text, self._shard_tokens = end_of_text, shard_tokens
        self.shards: list[ArrayFile] = []
        self.documents = ArrayFile(folder / documents_name(split), np.dtype("<i8"))
        self.n_tokens, self.n_bytes = 0, 0
        # Start of the document that is being written; it counts once its end has come.
        self._open_start = 0
        self._write(np.array([end_of_text], dtype))

    def _write(self, tokens: np.ndarray) -> None:
        while len(tokens):
            if not self.shards or self.shards[-1].length == self._shard_tokens:
                if self.shards:
                    self.shards[-1].close()
                path = self._folder / shard_name(self._split, len(self.shards))
                self.shards.append(ArrayFile(path, self.dtype))
            room = self._shard_tokens - self.shards[-1].length
            self.shards[-1].append(tokens[:room])
            self.n_tokens += len(tokens[:room])
            tokens = tokens[room:]

    def append(self, tokens: np.ndarray, n_bytes: int) -> None:
        """Add tokens and the bytes of text that they encode. Each end-of-text among them ends a document."""
        ends = np.flatnonzero(tokens == self._end_of_text).astype(np.int64) + self.n_tokens
        if len(ends):
            self.documents.append(np.concatenate([[self._open_start], ends[:-1]]))
            self._open_start = int(ends[-1])
        self._write(tokens)
        self.n_bytes += n_bytes

    def close(self) -> None:
        """Finish the files; a document that is still open is ended."""
        if self.n_tokens > self._open_start + 1:
            self.append(np.array([self._end_of_text], self.dtype), 0)
        self.shards[-1].close()
        self.documents.close()

    def abandon(self) -> None:
        """Let go of the files without finishing them."""
        for file in (*self.shards, self.documents):
            file.abandon()


def reach_disk(file: IO[Any]) -> None:
    """Have a file's content on the disk before its folder gets its name, so that a power cut leaves no half
    of it."""
    file.flush()
    os.fsync(file.fileno())
