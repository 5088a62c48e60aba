"""Batches as a pure function: `batch = f(seed, step)`.

Where this stands: `prepare.py` leaves tokens on disk; the loop asks here for the batch of a step. No loader
state is kept anywhere, so a resumed run needs none, evaluating cannot disturb training, and the number of
processes does not change what is learned.

A *window* is `context + 1` tokens: the model reads the first `context` and is asked for the last `context`.
PackedSequences tile a split so that every token but the very first is a target exactly once an epoch, and every
document is read from its own start wherever that is possible:

    one long document     |--------|--------|--------|---      each starts where the last one's targets end
    several, context 9    EOT a a a EOT b b EOT c c c c c EOT
                          |--------------->. . .               the cut piece of c does not count here,
                                            |-------------->   for c is read from its own start
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from common.errors import DATA, UserError
from data.token_dataset import TokenSplit

IGNORE_INDEX = -1
"""Target of a position that does not count: padding, or a piece of a document that another window reads
whole."""


@dataclass(frozen=True, eq=False)
class PackedSequences:
    """Where the windows of a split begin, and how many of each one's targets count."""

    starts: np.ndarray
    """int64, position of each window's first input token, ascending."""
    counts: np.ndarray
    """int64, how many leading targets of each window count: 1 to `context`."""
    context: int

    def __len__(self) -> int:
        return len(self.starts)


@dataclass(frozen=True, eq=False)
class Batch:
    """What the model reads, and what it should have said at each position."""

    tokens: Int64[Tensor, "B T"]
    targets: Int64[Tensor, "B T"]
    """The next token at each position, or `IGNORE_INDEX`."""


def pack_documents(split: TokenSplit, context: int) -> PackedSequences:
    """Tile a split with windows so that each target counts once.

    A window that starts in document i runs on through the following documents. If it ends inside the document
    it started in, the next window starts where its targets end. If it cuts a later document, that document's
    piece does not count and the next window starts at that document's start.
    """
    last = len(split) - 1
    if last < 1:
        raise UserError("the split holds no text: there is no next token to learn from", DATA)
    assert context >= 1
    # Where each document starts, and the very last EOT, which starts nothing.
    bounds = np.append(np.asarray(split.document_starts, dtype=np.int64), last)
    # A chain that reaches document i takes `inside[i]` windows that end before the document does, and one
    # more.
    inside = (np.diff(bounds) - 1) // context
    final = bounds[:-1] + inside * context
    follower = np.searchsorted(bounds, final + context, side="right") - 1
    begun = _chain(follower, len(bounds) - 1)
    # Spell the windows out: document start, + context, + 2 * context, ...
    repeats = inside[begun] + 1
    ordinal = np.arange(repeats.sum()) - np.repeat(np.cumsum(repeats) - repeats, repeats)
    starts = np.repeat(bounds[begun], repeats) + ordinal * context
    # A window's targets count up to the start of the next window: nothing is left out and nothing counts
    # twice.
    return PackedSequences(starts, np.diff(np.append(starts, last)), context)


def _chain(follower: np.ndarray, end: int) -> np.ndarray:
    """The documents 0, follower[0], follower[follower[0]], ... before `end`."""
    # Each step needs the one before it, so this is a plain loop: about 0.1 microseconds a document.
    steps, visited, i = np.ascontiguousarray(follower, dtype=np.int64).data, array("q"), 0
    while i < end:
        visited.append(i)
        i = steps[i]
    return np.frombuffer(visited, dtype=np.int64)


def get_batch(
    split: TokenSplit,
    windows: PackedSequences,
    seed: int,
    step: int,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
) -> Batch:
    """The batch of one step, or this rank's share of it: `batch_size / world_size` rows of `context` tokens.

    Epochs follow one another without a gap: row r of step s is entry s * batch_size + r of the endless stream
    in which epoch e is a permutation of all windows drawn from (seed, e).
    """
    if batch_size % world_size:
        raise UserError(f"a batch of {batch_size} windows cannot be shared evenly by {world_size} processes")
    share = batch_size // world_size
    return read_sequences(split, windows, sample_indices(windows, seed, step, batch_size)[rank * share :][:share])


def sample_indices(windows: PackedSequences, seed: int, step: int, batch_size: int) -> np.ndarray:
    """Indices of the sequences in the whole batch of a step, (batch_size,) int64, in order of rows."""
    n = len(windows)
    epochs, positions = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), n)
    parts = [epoch_permutation(seed, epoch, n)[positions[epochs == epoch]] for epoch in np.unique(epochs).tolist()]
    return np.concatenate(parts)


@lru_cache(maxsize=2)
def epoch_permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order of the `n` sequences in an epoch, int64: 8 bytes a sequence. Two are cached, for a batch that spans
    two epochs."""
    return np.random.default_rng((seed, epoch)).permutation(n)


def num_valid_tokens(windows: PackedSequences, seed: int, step: int, batch_size: int) -> int:
    """How many targets of the whole batch of a step count: every process knows without asking the others."""
    return int(windows.counts[sample_indices(windows, seed, step, batch_size)].sum())


def documents_in_batch(split: TokenSplit, windows: PackedSequences, seed: int, step: int, batch_size: int) -> list[int]:
    """Numbers, from 0 and ascending, of the documents that the whole batch of a step learns from.

    They are the ones that a counted target belongs to; the end-of-text that ends a document is its last target.
    """
    chosen = sample_indices(windows, seed, step, batch_size)
    before = windows.starts[chosen]  # each position's document is the last one that starts before its target
    first = np.searchsorted(split.document_starts, before, side="right") - 1
    last = np.searchsorted(split.document_starts, before + windows.counts[chosen], side="left") - 1
    return sorted({number for a, b in zip(first.tolist(), last.tolist(), strict=True) for number in range(a, b + 1)})


def read_sequences(split: TokenSplit, windows: PackedSequences, indices: np.ndarray) -> Batch:
    """The windows `indices` as a batch; a window that reaches past the split is filled up, and the filling
    ignored.

    Raises `UserError`: a token outside the vocabulary, or a file that is no longer what it was (3); a file that
    cannot be read (6).
    """
    context = windows.context
    # The filling is the split's last token, end-of-text. It stands behind all that counts, so no counted
    # target reads it.
    filling = int(split.read(len(split) - 1, len(split))[0])
    rows = np.full((len(indices), context + 1), filling, dtype=np.int64)
    for row, start in zip(rows, windows.starts[indices].tolist(), strict=True):
        piece = split.read(start, start + context + 1)
        row[: len(piece)] = piece
    counted = np.arange(context) < windows.counts[indices][:, None]
    targets = np.where(counted, rows[:, 1:], IGNORE_INDEX)
    return Batch(torch.from_numpy(np.ascontiguousarray(rows[:, :-1])), torch.from_numpy(targets))


def eval_indices(windows: PackedSequences, tokens: int) -> np.ndarray:
    """Indices of a fixed part of the split, evenly spread, with about `tokens` targets; all of it when it has
    no more.

    The same part every time, so that two evaluations differ by the model alone.
    """
    n, total = len(windows), int(windows.counts.sum())
    chosen = n if tokens >= total else max(1, round(n * tokens / total))
    return (2 * np.arange(chosen, dtype=np.int64) + 1) * n // (2 * chosen)
