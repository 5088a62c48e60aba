"""How tokens lie on disk: plain `.npy` shards of one split, and a view over them that reads like one long
array.

Where this stands: `prepare.py` writes shards, `batches.py` and `baselines.py` read them. Nothing here knows
text.

The stream of a split is `EOT d1 EOT d2 EOT ... dn EOT`: end-of-text stands before every document and after
the last. A document *starts* at its EOT, so that its first token is predicted from something, and its end is
learned too.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np

FORMAT = 1
"""Of the folder, the stream and the cutting of documents. Changing any of them makes old folders be ignored.
"""

SHARD_TOKENS = 64 * 1024 * 1024
"""Most tokens in one shard: 128 MiB of uint16, small enough to copy and to hash without waiting."""


@dataclass(frozen=True, eq=False)
class TokenSplit:
    """One split as one long row of tokens, however many shards it lies in. Memory-mapped: only what is read
    is loaded."""

    shards: tuple[np.ndarray, ...]
    """The tokens, uint16 or uint32, in order."""
    document_starts: np.ndarray
    """int64 positions of the EOT that begins each document, ascending, the first 0."""
    n_bytes: int
    """Bytes of UTF-8 text that the tokens encode; end-of-text counts none. For bits per byte."""

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum([len(shard) for shard in self.shards], dtype=np.int64)

    @cached_property
    def _length(self) -> int:
        return int(self._ends[-1]) if self.shards else 0

    def __len__(self) -> int:
        return self._length

    @property
    def n_documents(self) -> int:
        return len(self.document_starts)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens `start <= position < stop`, in the shards' own dtype, clipped to the split like any slice.
        Read-only."""
        start, stop = max(start, 0), min(stop, len(self))
        if stop <= start:
            return self.shards[0][:0]
        first = int(np.searchsorted(self._ends, start, side="right"))
        parts = []
        while start < stop:
            end = int(self._ends[first])
            base = end - len(self.shards[first])
            parts.append(self.shards[first][start - base : min(stop, end) - base])
            start, first = end, first + 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def token_dtype(vocab_size: int) -> np.dtype:
    """The narrowest type that holds every id: uint16 up to 65,536 tokens, else uint32."""
    return np.dtype("<u2") if vocab_size <= 65_536 else np.dtype("<u4")


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
        _reach_disk(self._file)
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
        self.documents = ArrayFile(folder / f"{split}-documents.npy", np.dtype("<i8"))
        self.n_tokens, self.n_bytes = 0, 0
        # Start of the document that is being written; it counts once its end has come.
        self._open_start = 0
        self._write(np.array([end_of_text], dtype))

    def _write(self, tokens: np.ndarray) -> None:
        while len(tokens):
            if not self.shards or self.shards[-1].length == self._shard_tokens:
                if self.shards:
                    self.shards[-1].close()
                name = f"{self._split}-{len(self.shards):05d}.npy"
                self.shards.append(ArrayFile(self._folder / name, self.dtype))
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


class DamagedShards(Exception):
    """A prepared folder that is not what its manifest says. Never a user's fault: it is prepared again."""


def write_manifest(folder: Path, key: str, tokenizer: dict[str, object], splits: dict[str, SplitWriter]) -> None:
    """Describe a folder of finished splits. Written last: a folder without a manifest is not finished."""
    described = {
        name: {
            "tokens": writer.n_tokens,
            "documents": writer.documents.length,
            "text_bytes": writer.n_bytes,
            "dtype": writer.dtype.str,
            "shards": [{"name": shard.path.name, "tokens": shard.length} for shard in writer.shards],
            "document_starts": writer.documents.path.name,
        }
        for name, writer in splits.items()
    }
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in sorted(folder.iterdir())}
    manifest = {"format": FORMAT, "key": key, "tokenizer": tokenizer, "splits": described, "files": files}
    with (folder / "manifest.json").open("w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1)
        _reach_disk(file)


def load_shards(folder: Path, key: str, check_sha256: bool = False) -> dict[str, TokenSplit]:
    """The splits of a prepared folder, once its files have the sizes (on request also the sha256) of the
    manifest.

    Raises `DamagedShards`, which says what is wrong.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT or manifest["key"] != key:
            raise DamagedShards("its manifest belongs to something else")
        for name, expected in manifest["files"].items():
            if (folder / name).stat().st_size != expected["bytes"]:
                raise DamagedShards(f"{name} has the wrong size")
            if check_sha256 and sha256_of(folder / name) != expected["sha256"]:
                raise DamagedShards(f"{name} has the wrong sha256")
        return {name: _load_split(folder, entry) for name, entry in manifest["splits"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedShards(f"{type(error).__name__}: {error}") from error


def _load_split(folder: Path, entry: dict[str, Any]) -> TokenSplit:
    shards = tuple(_open_array(folder / s["name"], entry["dtype"], s["tokens"]) for s in entry["shards"])
    starts = _open_array(folder / entry["document_starts"], "<i8", entry["documents"])
    split = TokenSplit(shards, starts, entry["text_bytes"])
    if len(split) != entry["tokens"]:
        raise DamagedShards("its shards do not add up")
    return split


def _open_array(path: Path, dtype: str, length: int) -> np.ndarray:
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if array.dtype.str != dtype or array.shape != (length,):
        raise DamagedShards(f"{path.name} is not what the manifest says")
    # A plain view: slicing a np.memmap costs several times more than slicing an array.
    return array.view(np.ndarray)


def sha256_of(path: Path) -> str:
    """The sha256 of a file, read in small blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _reach_disk(file: IO[Any]) -> None:
    """Have a file's content on the disk before its folder gets its name, so that a power cut leaves no half
    of it."""
    file.flush()
    os.fsync(file.fileno())
