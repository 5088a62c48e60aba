"""Batches: every target once an epoch, the same batch for the same seed and step, however many processes
share it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import DATA, UserError
from data.dataloader import (
    IGNORE_INDEX,
    batch,
    documents_in_batch,
    epoch_permutation,
    eval_indices,
    num_valid_tokens,
    pack_documents,
    read_sequences,
    sample_indices,
)
from data.token_dataset import TokenSplit

EOT = 0
document_lengths = st.lists(st.integers(1, 40), min_size=1, max_size=30)


def split_of(lengths: list[int], shard: int = 10**9) -> TokenSplit:
    """Documents of these lengths in the stream's layout; every token but EOT is its own position, so that it
    can be told."""
    stream, starts = [EOT], []
    for length in lengths:
        starts.append(len(stream) - 1)
        stream += range(len(stream), len(stream) + length)
        stream.append(EOT)
    tokens = np.array(stream, np.uint16)
    shards = tuple(tokens[i : i + shard] for i in range(0, len(tokens), shard))
    return TokenSplit(shards, np.array(starts, np.int64), n_bytes=sum(lengths))


def counted(split: TokenSplit, context: int) -> np.ndarray:
    """Positions of the targets that count, over all windows in order."""
    windows = pack_documents(split, context)
    return np.concatenate([s + 1 + np.arange(c) for s, c in zip(windows.starts, windows.counts, strict=True)])


@settings(max_examples=200, deadline=None)
@given(document_lengths, st.integers(1, 50))
def test_every_target_counts_exactly_once(lengths, context):
    split = split_of(lengths)
    assert counted(split, context).tolist() == list(range(1, len(split)))
    windows = pack_documents(split, context)
    assert windows.counts.min() >= 1 and windows.counts.max() <= context


@settings(max_examples=200, deadline=None)
@given(document_lengths, st.integers(1, 50))
def test_documents_are_read_from_their_start(lengths, context):
    """A window begins at a document's start, or goes on with a document that is longer than what was read of
    it."""
    split = split_of(lengths)
    windows = pack_documents(split, context)
    starts = split.document_starts
    for start in windows.starts.tolist():
        if start in starts:
            continue
        begun = int(starts[np.searchsorted(starts, start, side="right") - 1])
        # The whole stretch between is a chain of full windows from that document's start.
        assert (start - begun) % context == 0
        assert {*range(begun, start, context)} <= {*windows.starts.tolist()}
    # A document that fits a window has all of its targets in one window that reads its start.
    for i, length in enumerate(lengths):
        if length + 1 > context:
            continue
        start, end = int(starts[i]), int(starts[i]) + length + 1
        row = int(np.searchsorted(windows.starts, start, side="right")) - 1
        assert windows.starts[row] <= start and end <= windows.starts[row] + windows.counts[row]


def test_one_document_is_tiled_without_gaps():
    windows = pack_documents(split_of([100]), 16)
    assert windows.starts.tolist() == [0, 16, 32, 48, 64, 80, 96]
    assert windows.counts.tolist() == [16, 16, 16, 16, 16, 16, 5]


def test_a_cut_document_is_left_to_the_next_window():
    # EOT a a a EOT b b EOT c c c c c EOT: starts 0, 4, 7; a window of 9 targets from 0 ends inside c.
    windows = pack_documents(split_of([3, 2, 5]), 9)
    assert windows.starts.tolist() == [0, 7]
    assert windows.counts.tolist() == [7, 6]
    rows = read_sequences(split_of([3, 2, 5]), windows, np.arange(2))
    assert rows.targets[0].tolist() == [1, 2, 3, EOT, 5, 6, EOT, IGNORE_INDEX, IGNORE_INDEX]
    assert rows.tokens[0].tolist() == [EOT, 1, 2, 3, EOT, 5, 6, EOT, 8]
    assert rows.tokens[1].tolist() == [EOT, 8, 9, 10, 11, 12, EOT, EOT, EOT], "padded with end-of-text"
    assert rows.targets[1].tolist() == [8, 9, 10, 11, 12, EOT, IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX]


@settings(max_examples=50, deadline=None)
@given(document_lengths, st.integers(1, 50), st.integers(1, 20))
def test_targets_are_the_next_tokens_and_shards_do_not_show(lengths, context, shard):
    split = split_of(lengths)
    windows = pack_documents(split, context)
    whole = read_sequences(split, windows, np.arange(len(windows)))
    assert whole.tokens.shape == whole.targets.shape == (len(windows), context)
    assert whole.tokens.dtype == whole.targets.dtype == torch.int64
    valid = whole.targets != IGNORE_INDEX
    assert valid.sum(1).tolist() == windows.counts.tolist()
    assert whole.targets[valid].tolist() == split.read(1, len(split)).tolist()
    following = valid[:, 1:]
    assert torch.equal(whole.tokens[:, 1:][following], whole.targets[:, :-1][following])
    sharded = read_sequences(split_of(lengths, shard), windows, np.arange(len(windows)))
    assert torch.equal(sharded.tokens, whole.tokens) and torch.equal(sharded.targets, whole.targets)


@pytest.mark.parametrize("batch_size", [1, 3, 16, 1000])
def test_consecutive_steps_walk_through_the_epochs(batch_size):
    sequences = pack_documents(split_of([5] * 300), 7)
    n = len(sequences)
    order = np.concatenate([sample_indices(sequences, 3, step, batch_size) for step in range(3 * n // batch_size + 1)])
    expected = np.concatenate([epoch_permutation(3, epoch, n) for epoch in range(len(order) // n + 1)])
    assert order.tolist() == expected[: len(order)].tolist()


def test_epochs_and_seeds_have_unrelated_orders():
    one, two, other = (epoch_permutation(seed, epoch, 1000) for seed, epoch in ((1, 0), (1, 1), (2, 0)))
    for a, b in ((one, two), (one, other), (one, np.arange(1000)), (one[1:], one[:-1])):
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.12


def test_an_epoch_visits_each_window_once_and_the_next_begins_in_the_same_batch():
    split = split_of([5] * 23)
    windows = pack_documents(split, 6)
    assert len(windows) == 23
    rows = torch.cat([batch(split, windows, seed=1, step=s, batch_size=4).tokens for s in range(12)])
    first, second = rows[:23, 1].tolist(), rows[23:46, 1].tolist()
    assert sorted(first) == sorted(second) == (windows.starts + 1).tolist()
    assert first != second


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_together_hold_the_global_batch(world):
    split = split_of([3, 9, 30, 2, 7, 7, 1, 12])
    windows = pack_documents(split, 8)
    whole = batch(split, windows, seed=5, step=3, batch_size=8)
    shares = [batch(split, windows, 5, 3, 8, rank, world) for rank in range(world)]
    assert torch.equal(whole.tokens, torch.cat([share.tokens for share in shares]))
    assert torch.equal(whole.targets, torch.cat([share.targets for share in shares]))


seeds, steps = st.integers(0, 10**6), st.integers(0, 50)


@settings(max_examples=60, deadline=None)
@given(document_lengths, st.integers(1, 50), seeds, steps, st.sampled_from([1, 2, 4]))
def test_each_process_knows_how_many_targets_count_in_all(lengths, context, seed, step, world):
    split = split_of(lengths)
    windows = pack_documents(split, context)
    shares = [batch(split, windows, seed, step, 4, rank, world) for rank in range(world)]
    counted = sum(int((share.targets != IGNORE_INDEX).sum()) for share in shares)
    assert num_valid_tokens(windows, seed, step, 4) == counted


@settings(max_examples=60, deadline=None)
@given(document_lengths, st.integers(1, 50), seeds, steps, st.integers(1, 6))
def test_the_documents_of_a_batch_are_those_of_its_counted_targets(lengths, context, seed, step, size):
    split = split_of(lengths)
    windows = pack_documents(split, context)
    # The same layout, but each token is its own position, so that the batch itself says where its targets lie.
    positions = dataclasses.replace(split, shards=(np.arange(len(split)),))
    targets = batch(positions, windows, seed, step, size).targets
    touched = set()
    for position in targets[targets != IGNORE_INDEX].tolist():
        touched.add(sum(start < position for start in split.document_starts.tolist()) - 1)
    assert documents_in_batch(split, windows, seed, step, size) == sorted(touched)


def test_the_end_of_a_document_belongs_to_it_and_the_start_of_the_next_does_not():
    # EOT a a a EOT b b EOT c c c c c EOT, as above: one window learns of documents 0 and 1, the other of document 2.
    split = split_of([3, 2, 5])
    windows = pack_documents(split, 9)
    order = epoch_permutation(1, 0, 2).tolist()
    found = [documents_in_batch(split, windows, seed=1, step=step, batch_size=1) for step in order]
    assert sorted(found) == [[0, 1], [2]] and found[order.index(0)] == [0, 1]
    assert documents_in_batch(split, windows, seed=1, step=0, batch_size=2) == [0, 1, 2]


@settings(max_examples=50, deadline=None)
@given(document_lengths, st.integers(1, 50), st.integers(1, 20), st.data())
def test_a_token_outside_the_vocabulary_is_never_in_a_batch(lengths, context, shard, chosen):
    """Whichever window reads it, as input, target or filling, is refused; the others can be read."""
    split = split_of(lengths, shard)
    last = len(split) - 1
    at = chosen.draw(st.integers(0, last))
    split.shards[at // shard][at % shard] = 5_000
    split = dataclasses.replace(split, vocab_size=5_000)
    windows = pack_documents(split, context)
    for i, start in enumerate(windows.starts.tolist()):
        if at < last and not start <= at <= start + context:
            assert int(read_sequences(split, windows, np.array([i])).tokens.max()) < 5_000
            continue
        with pytest.raises(UserError, match=rf"token 5000 at position {at % shard} is not in .* 5000$") as caught:
            read_sequences(split, windows, np.array([i]))
        assert caught.value.exit_code == DATA


def test_the_batch_is_a_function_of_seed_and_step():
    split = split_of([4] * 200)
    windows = pack_documents(split, 5)
    torch.manual_seed(1)
    np.random.seed(1)
    here = batch(split, windows, seed=1, step=7, batch_size=16)
    torch.manual_seed(2)
    np.random.seed(2)
    assert torch.equal(here.tokens, batch(split, windows, 1, 7, 16).tokens)
    assert not torch.equal(here.tokens, batch(split, windows, 2, 7, 16).tokens)
    assert not torch.equal(here.tokens, batch(split, windows, 1, 8, 16).tokens)


def test_the_order_of_a_seed_never_changes():
    """Resuming an older run relies on it."""
    assert epoch_permutation(1, 0, 10).tolist() == PINNED


PINNED = [8, 4, 7, 0, 1, 2, 5, 9, 6, 3]


def test_a_batch_that_cannot_be_shared_is_refused():
    split = split_of([9])
    with pytest.raises(UserError, match="shared evenly by 3"):
        batch(split, pack_documents(split, 4), 1, 0, 4, 0, 3)


def test_a_split_without_text_is_refused():
    with pytest.raises(UserError) as caught:
        pack_documents(TokenSplit((np.zeros(1, np.uint16),), np.zeros(0, np.int64), 0), 4)
    assert caught.value.exit_code == DATA


@pytest.mark.parametrize("wanted", [1, 60, 600, 3000, 10**9])
def test_evaluation_reads_a_fixed_spread_of_about_the_wanted_size(wanted):
    split = split_of([5] * 500)
    windows = pack_documents(split, 6)
    chosen = eval_indices(windows, wanted)
    assert len(np.unique(chosen)) == len(chosen) and chosen.min() >= 0 and chosen.max() < len(windows)
    assert abs(windows.counts[chosen].sum() - min(wanted, len(split) - 1)) <= 6
    if len(chosen) > 1:
        gaps = np.diff(chosen)
        assert gaps.max() - gaps.min() <= 1
    assert chosen.tolist() == eval_indices(windows, wanted).tolist()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(-3, 70), st.integers(-3, 70))
def test_reading_a_split_is_slicing_it(sizes, start, stop):
    whole = np.arange(sum(sizes), dtype=np.uint16)
    split = TokenSplit(tuple(np.split(whole, np.cumsum(sizes)[:-1])), np.zeros(1, np.int64), 0)
    assert len(split) == len(whole)
    assert split.read(start, stop).tolist() == whole[max(start, 0) : max(stop, 0)].tolist()
