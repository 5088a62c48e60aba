"""Token files: the tokens of a split, memory-mapped, and the positions where its documents start.

The tokens of a split are `EOT d1 EOT d2 EOT ... dn EOT`, with EOT the end-of-text token. A document starts at the EOT
before it, so that its first token is predicted from something; the EOT after it is its last target.
"""

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.files import write_atomic
from data.tokenizer import Tokenizer

PROGRESS = ".progress"  # suffix of the file that says how far a split is written
SAVE_EVERY = 64  # results, of about a megabyte of text each
BLOCK = 1 << 22  # tokens that are searched at a time


@dataclass(frozen=True, eq=False)
class TokenSplit:
    tokens: np.ndarray  # (n,) uint16 or uint32, usually memory-mapped.
    document_starts: np.ndarray  # int64 positions of the EOT before each document, ascending, the first 0.
    n_bytes: int  # Bytes of UTF-8 text that the tokens encode, without end-of-text. For bits per byte.

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def n_documents(self) -> int:
        return len(self.document_starts)


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest dtype for all ids: uint16 up to 65,536 tokens, else uint32."""
    return np.dtype("<u2") if vocab_size <= 65_536 else np.dtype("<u4")


def write_split(
    folder: Path, split: str, read: Callable[[int], Iterable[tuple[np.ndarray, int]]], tokenizer: Tokenizer, bar: tqdm
) -> tuple[int, int]:
    """Write the two files of a split; returns its number of documents and of bytes of text.

    Every `SAVE_EVERY` results the file is synced and its length noted, so that a later call continues after a kill.

    Args:
        read: the results from the n-th on: tokens, each document followed by `end_of_text`, and the bytes that they encode.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    path, progress = folder / f"{split}.bin", folder / f"{split}{PROGRESS}"
    n_results, length, n_bytes = json.loads(progress.read_bytes()) if progress.exists() else (0, 1, 0)
    with path.open("r+b" if progress.exists() else "wb") as file:
        if n_results == 0:
            file.write(np.array([tokenizer.end_of_text], dtype).data)
        file.truncate(length * dtype.itemsize)
        file.seek(0, os.SEEK_END)
        for tokens, n in read(n_results):
            file.write(tokens.astype(dtype).data)
            n_results, length, n_bytes = n_results + 1, length + len(tokens), n_bytes + n
            bar.update(n)
            if n_results % SAVE_EVERY == 0:
                file.flush()
                os.fsync(file.fileno())
                write_atomic(progress, [json.dumps([n_results, length, n_bytes]).encode()])
    ends = []
    for start in range(0, length, BLOCK):  # read, not mapped: the pages of a map stay in memory
        block = np.fromfile(path, dtype, BLOCK, offset=start * dtype.itemsize)
        ends.append(np.flatnonzero(block == tokenizer.end_of_text) + start)
    starts = np.concatenate(ends)[:-1]  # nothing starts at the last EOT
    np.save(folder / f"{split}_documents.npy", starts)
    write_atomic(progress, [json.dumps([n_results, length, n_bytes]).encode()])
    return len(starts), n_bytes


def load_split(folder: Path, split: str, dtype: np.dtype, n_bytes: int) -> TokenSplit:
    """Open a split that `write_split` wrote. Raises OSError or ValueError if the files are damaged."""
    tokens = np.memmap(folder / f"{split}.bin", dtype, "r")
    return TokenSplit(tokens, np.load(folder / f"{split}_documents.npy"), n_bytes)
