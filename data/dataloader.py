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

BLOCK = 1 << 12
"""Entries of the shuffled stream that are computed at once."""
_MASK64 = (1 << 64) - 1
_ROUNDS = 8


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


def batch(
    split: TokenSplit, windows: PackedSequences, seed: int, step: int, batch_size: int, rank: int = 0, world: int = 1
) -> Batch:
    """The batch of one step, or this rank's share of it: `batch_size / world` rows of `context` tokens.

    Epochs follow one another without a gap: row r of step s is entry s * batch_size + r of the endless stream
    in which epoch e is a permutation of all windows drawn from (seed, e).
    """
    if batch_size % world:
        raise UserError(f"a batch of {batch_size} windows cannot be shared evenly by {world} processes")
    share = batch_size // world
    return read_sequences(split, windows, sample_indices(windows, seed, step, batch_size)[rank * share :][:share])


def sample_indices(windows: PackedSequences, seed: int, step: int, batch_size: int) -> np.ndarray:
    """Indices of the windows in the whole batch of a step, (batch_size,) int64, in order of rows."""
    first, end = step * batch_size, (step + 1) * batch_size
    blocks = range(first // BLOCK, (end - 1) // BLOCK + 1)
    found = np.concatenate([shuffled_block(number, len(windows), seed) for number in blocks])
    return found[first - blocks[0] * BLOCK :][:batch_size]


@lru_cache(maxsize=2)
def shuffled_block(number: int, n: int, seed: int) -> np.ndarray:
    """Entries `number * BLOCK` up to the next block's of `shuffled`: thousands cost hardly more than a step's few."""
    return shuffled(np.arange(number * BLOCK, (number + 1) * BLOCK, dtype=np.int64), n, seed)


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


def shuffled(entries: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Entries i of the endless stream permutation_0, permutation_1, ... of 0..n-1, as int64: permutation_{i
    // n}[i % n].

    A permutation array would not fit for hundreds of millions of windows, and drawing it would cost a pause.
    So each permutation is a function: a Feistel network (Luby and Rackoff 1988) permutes 0 .. 4^b - 1 for the
    least b that reaches n, and a value that lands at n or beyond is put through again until it lands below
    ("cycle walking", Black and Rogaway 2002), which leaves a permutation of 0 .. n-1. The size of n makes no
    difference to the mechanism.
    """
    epochs, values = np.divmod(np.asarray(entries, dtype=np.int64), n)
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    keys = _mix(_mix(np.full(1, seed & _MASK64, np.uint64)) + epochs.astype(np.uint64))
    values = _feistel(values.astype(np.uint64), keys, half)
    while (outside := np.flatnonzero(values >= np.uint64(n))).size:
        values[outside] = _feistel(values[outside], keys[outside], half)
    return values.astype(np.int64)


def _feistel(values: np.ndarray, keys: np.ndarray, half: np.uint64) -> np.ndarray:
    """A keyed permutation of the numbers of `2 * half` bits. Reversible whatever `_mix` is, round by round."""
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for turn in range(_ROUNDS):
        # Each round gets a key of its own, so that two equal rounds cannot cancel.
        left, right = right, left ^ (_mix(right + _mix(keys + np.uint64(turn))) & mask)
    return (left << half) | right


def _mix(values: np.ndarray) -> np.ndarray:
    """SplitMix64 (Steele, Lea and Flood 2014): every bit of the result depends on every bit of the uint64
    argument."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
