"""Batches: every target once an epoch, a pure function of seed and step, the same for any number of processes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from data.dataloader import (
    IGNORE_INDEX,
    LONG_DOCUMENT,
    Batch,
    PackedSequences,
    epoch_offset,
    epoch_permutation,
    eval_indices,
    get_batch,
    pack_documents,
    read_sequences,
    select_sequences,
)
from data.token_dataset import TokenSplit

EOT = 0
document_lengths = st.lists(st.integers(1, 40), min_size=1, max_size=30)
contexts, seeds, steps = st.integers(1, 50), st.integers(0, 10**6), st.integers(0, 50)


def read(split: TokenSplit, sequences: PackedSequences, offset: int = 0) -> Batch:
    starts, counts = select_sequences(sequences, np.arange(len(sequences)), offset)
    return read_sequences(split, starts, counts, sequences.context)


def split_of(lengths: list[int]) -> TokenSplit:
    """Documents of these lengths; every token but EOT is its own position."""
    tokens, starts = [EOT], []
    for length in lengths:
        starts.append(len(tokens) - 1)
        tokens += range(len(tokens), len(tokens) + length)
        tokens.append(EOT)
    return TokenSplit(np.array(tokens, np.uint16), np.array(starts, np.int64), n_bytes=sum(lengths))


@settings(max_examples=200, deadline=None)
@given(document_lengths, contexts)
def test_documents_are_read_from_their_start(lengths: list[int], context: int) -> None:
    split = split_of(lengths)
    sequences = pack_documents(split, context)
    starts, document_starts = sequences.starts.tolist(), split.document_starts
    for start in starts:
        if start not in document_starts:
            # It continues a document through a chain of full sequences from that document's start.
            first = int(document_starts[np.searchsorted(document_starts, start, side="right") - 1])
            assert (start - first) % context == 0 and {*range(first, start, context)} <= {*starts}
    for i, length in enumerate(lengths):
        if length + 1 <= context:  # all targets are in one sequence that includes the start
            start = int(document_starts[i])
            row = int(np.searchsorted(sequences.starts, start, side="right")) - 1
            assert starts[row] <= start and start + length + 1 <= starts[row] + sequences.counts[row]


def test_a_truncated_document_is_left_to_the_next_sequence() -> None:
    assert pack_documents(split_of([100]), 16).starts.tolist() == [0, 16, 32, 48, 64, 80, 96]
    # EOT a a a EOT b b EOT c c c c c EOT: starts 0, 4, 7; a sequence of 9 targets from 0 ends inside c.
    sequences = pack_documents(split_of([3, 2, 5]), 9)
    assert sequences.starts.tolist() == [0, 7] and sequences.counts.tolist() == [7, 6]
    rows = read(split_of([3, 2, 5]), sequences)
    assert rows.targets[0].tolist() == [1, 2, 3, EOT, 5, 6, EOT, IGNORE_INDEX, IGNORE_INDEX]
    assert rows.tokens[0].tolist() == [EOT, 1, 2, 3, EOT, 5, 6, EOT, 8]
    assert rows.tokens[1].tolist() == [EOT, 8, 9, 10, 11, 12, EOT, EOT, EOT], "padded with end-of-text"
    assert rows.targets[1].tolist() == [8, 9, 10, 11, 12, EOT, IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX]


@settings(max_examples=50, deadline=None)
@given(document_lengths, contexts)
def test_every_next_token_is_a_valid_target_once(lengths: list[int], context: int) -> None:
    split = split_of(lengths)
    sequences = pack_documents(split, context)
    batch = read(split, sequences)
    assert batch.tokens.shape == batch.targets.shape == (len(sequences), context)
    assert batch.tokens.dtype == batch.targets.dtype == torch.int64
    valid = batch.targets != IGNORE_INDEX
    assert valid.sum(1).tolist() == sequences.counts.tolist() and sequences.counts.min() >= 1
    assert batch.targets[valid].tolist() == split.tokens[1:].tolist()
    next_valid = valid[:, 1:]
    assert torch.equal(batch.tokens[:, 1:][next_valid], batch.targets[:, :-1][next_valid])


@pytest.mark.parametrize("batch_size", [1, 3, 16, 1000])
def test_consecutive_steps_walk_through_the_epochs(batch_size: int) -> None:
    split = split_of([5] * 300)
    sequences = pack_documents(split, 7)
    n = len(sequences)
    batches = [get_batch(split, sequences, 3, step, batch_size)[0] for step in range(3 * n // batch_size + 1)]
    order = torch.cat([batch.tokens[:, 1] for batch in batches])  # each of these documents is one sequence
    epochs = [epoch_permutation(3, epoch, n) for epoch in range(len(order) // n + 1)]
    assert order.tolist() == split.tokens[sequences.starts + 1][np.concatenate(epochs)][: len(order)].tolist()
    assert all(sorted(epoch.tolist()) == list(range(n)) for epoch in epochs)
    assert not np.array_equal(epochs[0], epochs[1]) and not np.array_equal(epochs[0], epoch_permutation(4, 0, n))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 120), min_size=1, max_size=30), st.integers(1, 7), st.data())
def test_sequences_that_start_earlier_have_each_target_at_most_once(
    lengths: list[int], context: int, data: st.DataObject
) -> None:
    split, offset = split_of(lengths), data.draw(st.integers(0, context - 1))
    sequences = pack_documents(split, context)
    starts, counts = select_sequences(sequences, np.arange(len(sequences)), offset)
    assert counts.min() >= 1 and counts.max() <= context
    positions = np.concatenate([np.arange(start + 1, start + n + 1) for start, n in zip(starts, counts, strict=True)])
    assert len(set(positions)) == len(positions) and set(positions) <= {*range(1, len(split))}
    movable, left_out = sequences.is_movable, len(split) - 1 - len(positions)
    ends = int((movable & ~np.append(movable[1:], False)).sum())
    assert left_out <= offset * ends and left_out * LONG_DOCUMENT <= len(split), "only at the end of a long document"
    assert starts[~movable].tolist() == sequences.starts[~movable].tolist()
    document = np.searchsorted(split.document_starts, starts[movable], side="right") - 1
    assert all(lengths[i] >= LONG_DOCUMENT * context for i in document)


def test_later_epochs_divide_a_long_document_elsewhere() -> None:
    split = split_of([999])
    sequences, n = pack_documents(split, 50), 20
    offsets = [epoch_offset(1, epoch, 50) for epoch in range(4)]
    assert offsets == [0, 13, 4, 42], "resuming an older run relies on it"
    rows = [get_batch(split, sequences, 1, step, 1)[0].tokens for step in range(4 * n)]
    for epoch, offset in enumerate(offsets):
        firsts = [int(row[0, 0]) for row in rows[epoch * n : (epoch + 1) * n]]
        assert sorted(firsts) == [0, *range(50 - offset, 1000 - offset, 50)]
    across, _ = get_batch(split, sequences, 1, 6, 3)  # rows 18 to 20: two of the first epoch, one of the second
    assert torch.equal(across.tokens, torch.cat(rows[18:21]))


def test_order_of_a_seed_never_changes() -> None:
    """Resuming an older run relies on it."""
    assert epoch_permutation(1, 0, 10).tolist() == [8, 4, 7, 0, 1, 2, 5, 9, 6, 3]


@settings(max_examples=60, deadline=None)
@given(document_lengths, contexts, seeds, steps, st.sampled_from([1, 2, 4]))
def test_parts_of_all_ranks_are_the_whole_batch(
    lengths: list[int], context: int, seed: int, step: int, world_size: int
) -> None:
    split = split_of(lengths)
    sequences = pack_documents(split, context)
    whole, num_targets = get_batch(split, sequences, seed, step, 4)
    parts = [get_batch(split, sequences, seed, step, 4, rank, world_size)[0] for rank in range(world_size)]
    assert torch.equal(whole.tokens, torch.cat([part.tokens for part in parts]))
    assert torch.equal(whole.targets, torch.cat([part.targets for part in parts]))
    assert num_targets == (whole.targets != IGNORE_INDEX).sum()


def test_empty_split_is_rejected() -> None:
    with pytest.raises(UserError, match="no text"):
        pack_documents(TokenSplit(np.zeros(1, np.uint16), np.zeros(0, np.int64), 0), 4)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 200), st.integers(1, 3000))
def test_eval_indices_are_evenly_spaced(n_documents: int, tokens: int) -> None:
    sequences = pack_documents(split_of([5] * n_documents), 6)
    n, total = len(sequences), int(sequences.counts.sum())
    indices = eval_indices(sequences, tokens)
    assert indices.tolist() == eval_indices(sequences, tokens).tolist()
    if tokens >= total:
        assert indices.tolist() == list(range(n))
    else:
        assert len(indices) == max(1, round(n * tokens / total))
        assert len(np.unique(indices)) == len(indices) and 0 <= indices.min() <= indices.max() < n
        gaps = np.diff(indices)
        assert not len(gaps) or gaps.max() - gaps.min() <= 1
