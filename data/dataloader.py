"""Batches as a pure function of (seed, step): a resumed run needs no loader state.

A training sequence is `context + 1` tokens: the first `context` are the input, the last `context` the targets. The
sequences of a split are chosen so that every token but the very first is a target exactly once an epoch, and a
document is read from its start wherever possible.
"""

from array import array
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from common.errors import DATA, UserError
from data.token_dataset import TokenSplit

IGNORE_INDEX = -1  # target without a loss: padding, or a part of a document that another sequence reads whole


@dataclass(frozen=True, eq=False)
class PackedSequences:
    """Where the training sequences of a split start, and how many targets of each are valid."""

    starts: np.ndarray  # int64, position of each sequence's first input token, ascending.
    counts: np.ndarray  # int64, number of valid targets of each sequence, the first ones: 1 to `context`.
    context: int

    def __len__(self) -> int:
        return len(self.starts)


@dataclass(frozen=True, eq=False)
class Batch:
    """The training sequences of one step, or one process's share of them: inputs and targets."""

    tokens: Int64[Tensor, "B T"]
    targets: Int64[Tensor, "B T"]  # The next token at each position, or `IGNORE_INDEX`.


def pack_documents(split: TokenSplit, context: int) -> PackedSequences:
    """Cover a split with sequences so that each target is valid once.

    A sequence that starts in document i continues through the following documents. If it ends inside document i, the
    next sequence starts where its targets end. If it truncates a later document, that part is ignored and the next
    sequence starts at that document's start. For a context of 9:

        EOT a a a EOT b b EOT c c c c c EOT
        |--------------->. . .               the truncated part of c is not a target here,
                          |-------------->   because c is read from its start
    """
    last = len(split) - 1
    if last < 1:
        raise UserError("the split contains no text: there is no next token to learn", DATA)
    assert context >= 1
    # Where each document starts, and the very last EOT, which starts none.
    bounds = np.append(np.asarray(split.document_starts, dtype=np.int64), last)
    # From the start of document i, `inside[i]` sequences end within the document, and one more ends after it.
    inside = (np.diff(bounds) - 1) // context
    final = bounds[:-1] + inside * context
    next_document = np.searchsorted(bounds, final + context, side="right") - 1
    documents = _chain(next_document, len(bounds) - 1)
    # Starts: document start, + context, + 2 * context, ...
    repeats = inside[documents] + 1
    ordinal = np.arange(repeats.sum()) - np.repeat(np.cumsum(repeats) - repeats, repeats)
    starts = np.repeat(bounds[documents], repeats) + ordinal * context
    # A sequence's targets are valid up to the start of the next: none is left out, none is valid twice.
    return PackedSequences(starts, np.diff(np.append(starts, last)), context)


def _chain(next_document: np.ndarray, end: int) -> np.ndarray:
    """The documents 0, next_document[0], next_document[next_document[0]], ... before `end`."""
    # Each step needs the one before it, so this is a plain loop: about 0.1 microseconds a document.
    steps, visited, i = np.ascontiguousarray(next_document, dtype=np.int64).data, array("q"), 0
    while i < end:
        visited.append(i)
        i = steps[i]
    return np.frombuffer(visited, dtype=np.int64)


def get_batch(
    split: TokenSplit,
    sequences: PackedSequences,
    seed: int,
    step: int,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
) -> Batch:
    """The batch of a step, or this rank's part of it: `batch_size / world_size` rows of `context` tokens.

    Row r of step s is entry s * batch_size + r of an endless stream of epochs; each epoch is a permutation of all
    sequences drawn from (seed, epoch).
    """
    rows = batch_size // world_size
    return read_sequences(split, sequences, sample_indices(sequences, seed, step, batch_size)[rank * rows :][:rows])


def sample_indices(sequences: PackedSequences, seed: int, step: int, batch_size: int) -> np.ndarray:
    """Indices of the sequences in the whole batch of a step, (batch_size,) int64, in order of rows."""
    n = len(sequences)
    epochs, positions = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), n)
    parts = [epoch_permutation(seed, epoch, n)[positions[epochs == epoch]] for epoch in np.unique(epochs).tolist()]
    return np.concatenate(parts)


@lru_cache(maxsize=2)
def epoch_permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order of the `n` sequences in an epoch, int64. 5.7 s for 10^8 of them; two are cached, for a batch of two epochs."""
    return np.random.default_rng((seed, epoch)).permutation(n)


def read_sequences(split: TokenSplit, sequences: PackedSequences, indices: np.ndarray) -> Batch:
    """The sequences `indices` as a batch; those that extend past the split are padded with end-of-text."""
    context = sequences.context
    rows = np.full((len(indices), context + 1), split.tokens[-1], dtype=np.int64)
    for row, start in zip(rows, sequences.starts[indices].tolist(), strict=True):
        tokens = split.tokens[start : start + context + 1]
        row[: len(tokens)] = tokens
    is_valid = np.arange(context) < sequences.counts[indices][:, None]
    targets = np.where(is_valid, rows[:, 1:], IGNORE_INDEX)
    return Batch(torch.from_numpy(np.ascontiguousarray(rows[:, :-1])), torch.from_numpy(targets))


def eval_indices(sequences: PackedSequences, tokens: int) -> np.ndarray:
    """Indices of evenly spaced sequences with about `tokens` targets, or of all; the same every time."""
    n, total = len(sequences), int(sequences.counts.sum())
    chosen = n if tokens >= total else max(1, round(n * tokens / total))
    return (2 * np.arange(chosen, dtype=np.int64) + 1) * n // (2 * chosen)
