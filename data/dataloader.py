"""Batches as a pure function of (seed, step): a resumed run needs no loader state.

A training sequence is `context + 1` tokens: the first `context` are the input, the last `context` the targets. The
sequences of a split are chosen so that every token but the very first is a target exactly once, and a document is read
from its start wherever possible. Later epochs divide long documents at other places, so that a token is predicted from
other contexts; up to a sequence of targets at the end of such a document is then left out.
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

LONG_DOCUMENT = 16  # sequences; what later epochs leave out of a shorter one would matter
IGNORE_INDEX = -1  # target without a loss: padding, or a part of a document that another sequence reads whole


@dataclass(frozen=True, eq=False)
class PackedSequences:
    """Where the training sequences of a split start, and how many targets of each are valid."""

    starts: np.ndarray  # int64, position of each sequence's first input token, ascending.
    counts: np.ndarray  # int64, number of valid targets of each sequence, the first ones: 1 to `context`.
    is_movable: np.ndarray  # bool, whether each sequence starts inside a long document.
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
    is_movable = (ordinal > 0) & (np.repeat(inside[documents], repeats) >= LONG_DOCUMENT)
    return PackedSequences(starts, np.diff(np.append(starts, last)), is_movable, context)


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
) -> tuple[Batch, int]:
    """The batch of a step, or this rank's part of it, `batch_size / world_size` rows; and the valid targets of all ranks.

    Row r of step s is entry s * batch_size + r of an endless stream of epochs; each epoch is a permutation of all
    sequences drawn from (seed, epoch).
    """
    n, rows = len(sequences), batch_size // world_size
    epochs, positions = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), n)
    parts = [
        select_sequences(
            sequences,
            epoch_permutation(seed, epoch, n)[positions[epochs == epoch]],
            epoch_offset(seed, epoch, sequences.context),
        )
        for epoch in np.unique(epochs).tolist()
    ]
    starts, counts = np.concatenate(parts, axis=1)
    own = slice(rank * rows, (rank + 1) * rows)
    return read_sequences(split, starts[own], counts[own], sequences.context), int(counts.sum())


@lru_cache(maxsize=2)
def epoch_permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order of the `n` sequences in an epoch, int64. 5.7 s for 10^8 of them; two are cached, for a batch of two epochs."""
    return np.random.default_rng((seed, epoch)).permutation(n)


def epoch_offset(seed: int, epoch: int, context: int) -> int:
    """How many tokens earlier the sequences inside long documents start in an epoch; 0 in the first."""
    return int(np.random.default_rng((seed, epoch, context)).integers(context)) if epoch else 0


def select_sequences(sequences: PackedSequences, indices: np.ndarray, offset: int = 0) -> Int64[np.ndarray, "2 B"]:
    """Starts and counts of some sequences, of which those inside long documents start `offset` tokens earlier.

    Each target is valid at most once: where a sequence would be longer than the context, its last targets are left out.
    """
    start_shift = offset * sequences.is_movable[indices]
    end_shift = offset * sequences.is_movable[(indices + 1) % len(sequences)]  # the first one is not movable
    counts = np.minimum(sequences.counts[indices] + start_shift - end_shift, sequences.context)
    return np.stack([sequences.starts[indices] - start_shift, counts])


def read_sequences(split: TokenSplit, starts: np.ndarray, counts: np.ndarray, context: int) -> Batch:
    """Sequences with these starts and numbers of valid targets; past the end of the split they have end-of-text."""
    rows = np.full((len(starts), context + 1), split.tokens[-1], dtype=np.int64)
    for row, start in zip(rows, starts.tolist(), strict=True):
        tokens = split.tokens[start : start + context + 1]
        row[: len(tokens)] = tokens
    is_valid = np.arange(context) < counts[:, None]
    targets = np.where(is_valid, rows[:, 1:], IGNORE_INDEX)
    return Batch(torch.from_numpy(np.ascontiguousarray(rows[:, :-1])), torch.from_numpy(targets))


def eval_indices(sequences: PackedSequences, tokens: int) -> np.ndarray:
    """Indices of evenly spaced sequences with about `tokens` targets, or of all; the same every time."""
    n, total = len(sequences), int(sequences.counts.sum())
    chosen = n if tokens >= total else max(1, round(n * tokens / total))
    return (2 * np.arange(chosen, dtype=np.int64) + 1) * n // (2 * chosen)
