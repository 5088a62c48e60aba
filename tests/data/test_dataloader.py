"""Batches: every target once an epoch, a pure function of seed and step, the same for any number of processes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from data.dataloader import (
    IGNORE_INDEX,
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
@given(document_lengths, contexts, st.data())
def test_sequences_that_start_earlier_have_each_target_at_most_once(
    lengths: list[int], context: int, data: st.DataObject
) -> None:
    split, offset = split_of(lengths), data.draw(st.integers(0, context - 1))
    sequences = pack_documents(split, context)
    batch = read(split, sequences, offset)
    valid = batch.targets != IGNORE_INDEX
    assert valid.any(dim=1).all(), "no sequence is empty"
    targets = batch.targets[valid][batch.targets[valid] != EOT].tolist()
    assert len(set(targets)) == len(targets)
    assert sum(lengths) - len(targets) <= offset * sequences.continues.sum(), (
        "at most `offset` are left out of a sequence"
    )
    own_starts = batch.tokens[:, 0][torch.from_numpy(~sequences.continues)]
    assert (own_starts == EOT).all(), "a document is still read from its start"


def test_later_epochs_divide_a_long_document_elsewhere() -> None:
    split = split_of([1000])
    sequences, firsts = pack_documents(split, 64), []
    for epoch in range(4):
        steps = range(epoch * len(sequences), (epoch + 1) * len(sequences))
        rows = torch.cat([get_batch(split, sequences, 1, step, 1)[0].tokens[:, 0] for step in steps])
        offset = epoch_offset(1, epoch, 64)
        assert sorted(rows.tolist()) == [0, *range(64 - offset, 1000 - offset, 64)]
        firsts.append(offset)
    assert firsts[0] == 0 and len(set(firsts)) == 4


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
