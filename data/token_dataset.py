"""Token files: one `.npy` per split, memory-mapped, and the positions where its documents start.

The tokens of a split are `EOT d1 EOT d2 EOT ... dn EOT`, with EOT the end-of-text token. A document starts at the EOT
before it, so that its first token is predicted from something; the EOT after it is its last target.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True, eq=False)
class TokenSplit:
    """The tokens of one split."""

    tokens: np.ndarray
    """(n,) uint16 or uint32, usually memory-mapped."""
    document_starts: np.ndarray
    """int64 positions of the EOT before each document, ascending, the first 0."""
    n_bytes: int
    """Bytes of UTF-8 text that the tokens encode, without end-of-text. For bits per byte."""

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def n_documents(self) -> int:
        return len(self.document_starts)


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest dtype for all ids: uint16 up to 65,536 tokens, else uint32."""
    return np.dtype("<u2") if vocab_size <= 65_536 else np.dtype("<u4")


def load_split(folder: Path, split: str, n_bytes: int) -> TokenSplit:
    """Open a split that `SplitWriter` wrote. Raises OSError or ValueError if the files are damaged."""
    tokens = np.load(folder / f"{split}.npy", mmap_mode="r")
    return TokenSplit(tokens, np.load(folder / f"{split}_documents.npy"), n_bytes)


class ArrayWriter:
    """A one-dimensional `.npy` file that grows: `close` writes the header again with the final length."""

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self.dtype, self.length = np.dtype(dtype), 0
        self._file = path.open("wb")
        self._write_header()

    def _write_header(self) -> None:
        # numpy pads this header so that it can be rewritten in place with a larger length.
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(self._file, header)

    def append(self, values: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(values, dtype=self.dtype).data)
        self.length += len(values)

    def close(self) -> None:
        """Write the final header, flush to disk and close."""
        with self._file:
            self._file.seek(0)
            self._write_header()
            self._file.flush()
            os.fsync(self._file.fileno())


class SplitWriter:
    """Writes the two files of a split."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype, end_of_text: int) -> None:
        self._tokens = ArrayWriter(folder / f"{split}.npy", dtype)
        self._starts = ArrayWriter(folder / f"{split}_documents.npy", np.dtype("<i8"))
        self._end_of_text, self.n_bytes = end_of_text, 0
        # Start of the current document; written once its end has come.
        self._start = 0
        self._tokens.append(np.array([end_of_text]))

    @property
    def n_documents(self) -> int:
        return self._starts.length

    def append(self, tokens: np.ndarray, n_bytes: int) -> None:
        """Add tokens, each document followed by end-of-text, and the number of bytes of text that they encode."""
        ends = np.flatnonzero(tokens == self._end_of_text).astype(np.int64) + self._tokens.length
        if len(ends):
            self._starts.append(np.concatenate([[self._start], ends[:-1]]))
            self._start = int(ends[-1])
        self._tokens.append(tokens)
        self.n_bytes += n_bytes

    def close(self) -> None:
        try:
            self._tokens.close()
        finally:
            self._starts.close()
