"""Token files: the tokens of a split, memory-mapped, and the positions where its documents start.

The tokens of a split are `EOT d1 EOT d2 EOT ... dn EOT`, with EOT the end-of-text token. A document starts at the EOT
before it, so that its first token is predicted from something; the EOT after it is its last target.
"""

import itertools
from collections.abc import Iterable
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


def write_split(
    folder: Path, split: str, results: Iterable[tuple[np.ndarray, int]], dtype: np.dtype, end_of_text: int
) -> tuple[int, int]:
    """Write the two files of a split; returns its number of documents and of bytes of text.

    `results` are tokens, each document followed by `end_of_text`, and the number of bytes that they encode.
    """
    ends, length, n_bytes = [], 0, 0
    with (folder / f"{split}.bin").open("wb") as file:
        for tokens, n in itertools.chain([(np.array([end_of_text]), 0)], results):
            file.write(tokens.astype(dtype).data)
            ends.append(np.flatnonzero(tokens == end_of_text) + length)
            length += len(tokens)
            n_bytes += n
    starts = np.concatenate(ends)[:-1]  # nothing starts at the last EOT
    np.save(folder / f"{split}_documents.npy", starts)
    return len(starts), n_bytes


def load_split(folder: Path, split: str, dtype: np.dtype, n_bytes: int) -> TokenSplit:
    """Open a split that `write_split` wrote. Raises OSError or ValueError if the files are damaged."""
    tokens = np.memmap(folder / f"{split}.bin", dtype, "r")
    return TokenSplit(tokens, np.load(folder / f"{split}_documents.npy"), n_bytes)
