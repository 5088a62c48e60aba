"""What a loss is compared with: three models that need no training to speak of.

Where this stands: beside the loop. It reads the token shards that `prepare.py` wrote and answers the question
that a newcomer has about "loss 2.1": is that good? A model that has learned the words' frequencies reaches
the unigram figure; one that beats the trigram figure uses more than the two tokens before.

All figures are nats per token over the targets of the validation split: every token but the leading
end-of-text, the same tokens that the model is asked for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from data.token_dataset import TokenSplit

TRAIN_LIMIT = 20_000_000
"""Training tokens that are counted, from the start of the split. More would take memory and change little."""
VAL_LIMIT = 2_000_000
"""Validation targets that are scored, from the start of the split."""


def baselines(
    train: TokenSplit,
    val: TokenSplit,
    vocab_size: int,
    train_limit: int = TRAIN_LIMIT,
    val_limit: int = VAL_LIMIT,
) -> dict[str, float]:
    """Nats per token of `uniform`, `unigram` and `trigram` on the validation split, learned from the training
    split.
    """
    model = KneserNey.fit(trigrams(train, train_limit), vocab_size)
    wanted = trigrams(val, val_limit)
    return {
        "uniform": math.log(vocab_size),
        "unigram": float(-np.log(unigram(train, vocab_size, train_limit)[wanted[:, 2]]).mean()),
        "trigram": float(-np.log(model.probability(wanted)).mean()),
    }


def bits_per_byte(nats_per_token: float, n_tokens: int, n_bytes: int) -> float:
    """A loss in bits per byte of text: nats_per_token * n_tokens / (ln 2 * n_bytes).

    Unlike a loss per token it can be compared between tokenizers. `n_tokens` counts the targets, ends of
    documents included, for they have to be predicted too; `n_bytes` is `TokenSplit.n_bytes`, the UTF-8 text
    alone.
    """
    return nats_per_token * n_tokens / (math.log(2) * n_bytes)


def trigrams(split: TokenSplit, limit: int) -> np.ndarray:
    """Each target with the two tokens before it, (n, 3) int64, oldest first; the first `limit` targets.

    No row reaches across the start of a document: where the token before is the end-of-text that begins the
    target's document, it stands in the oldest place as well.
    """
    tokens = split.read(0, limit + 1).astype(np.int64)
    before = tokens[:-1]
    oldest = np.concatenate([before[:1], before[:-1]])
    starts = np.asarray(split.document_starts)
    starts = starts[: np.searchsorted(starts, len(before))]
    oldest[starts] = before[starts]
    return np.stack([oldest, before, tokens[1:]], axis=1)


def unigram(split: TokenSplit, vocab_size: int, limit: int = TRAIN_LIMIT) -> np.ndarray:
    """Probability of each token by its frequency among the targets, one added to each count so that none is
    zero.
    """
    counts = np.bincount(split.read(1, limit + 1), minlength=vocab_size)
    return (counts + 1) / (counts.sum() + vocab_size)


@dataclass(frozen=True, eq=False)
class _Order:
    """One length of n-gram: which were seen, how often, and what was seen of the contexts that they begin
    with.
    """

    keys: np.ndarray
    """int64, the n-grams packed to numbers, ascending."""
    counts: np.ndarray
    context_keys: np.ndarray
    """int64, the n-grams without their last token, packed, ascending."""
    totals: np.ndarray
    """Sum of the counts of a context's n-grams."""
    followers: np.ndarray
    """How many different tokens followed a context."""
    discount: float

    @classmethod
    def fit(cls, keys: np.ndarray, counts: np.ndarray, vocab_size: int) -> _Order:
        context_keys, first, followers = np.unique(keys // vocab_size, return_index=True, return_counts=True)
        totals = np.add.reduceat(counts, first)
        once, twice = int((counts == 1).sum()), int((counts == 2).sum())
        # Ney, Essen and Kneser 1994. Kept off 0, which would leave nothing for what was not seen.
        discount = min(max(once / (once + 2 * twice), 0.1), 0.9) if once else 0.1
        return cls(keys, counts, context_keys, totals, followers, discount)

    def probability(self, wanted: np.ndarray, vocab_size: int, shorter: np.ndarray) -> np.ndarray:
        """The discounted estimate, what was taken away being handed out as `shorter`, the shorter context,
        says.
        """
        count = _look_up(self.keys, self.counts, wanted)
        contexts = wanted // vocab_size
        total = _look_up(self.context_keys, self.totals, contexts)
        followers = _look_up(self.context_keys, self.followers, contexts)
        seen = np.maximum(total, 1)
        known = (np.maximum(count - self.discount, 0) + self.discount * followers * shorter) / seen
        return np.where(total > 0, known, shorter)


@dataclass(frozen=True, eq=False)
class KneserNey:
    """An interpolated trigram model with Kneser-Ney smoothing.

    As in Chen and Goodman, "An empirical study of smoothing techniques for language modeling" (1999),
    equations 24-26, with one discount D for each order:

        p(c | a b) = (max(n(a b c) - D, 0) + D * followers(a b) * p(c | b)) / n(a b)

    The shorter orders are the same formula over *continuation counts*: n(b c) becomes the number of different
    tokens seen before `b c`. The shortest rests on the uniform distribution, so that no token is impossible.
    """

    orders: tuple[_Order, ...]
    """Unigrams, bigrams, trigrams."""
    vocab_size: int

    @classmethod
    def fit(cls, rows: np.ndarray, vocab_size: int) -> KneserNey:
        """Count (n, 3) trigrams. Packing three ids into one int64 asks for fewer than 2^21 different tokens."""
        assert vocab_size <= 1 << 21
        keys, counts = np.unique(_pack(rows, vocab_size), return_counts=True)
        orders = [_Order.fit(keys, counts, vocab_size)]
        for n in (2, 1):
            # Each different longer n-gram is one continuation of the n-gram without its first token.
            keys, counts = np.unique(keys % vocab_size**n, return_counts=True)
            orders.append(_Order.fit(keys, counts, vocab_size))
        return cls(tuple(reversed(orders)), vocab_size)

    def probability(self, rows: np.ndarray) -> np.ndarray:
        """The probability of each row's last token after its first two: (n, 3) -> (n,)."""
        packed = _pack(rows, self.vocab_size)
        found = np.full(len(rows), 1 / self.vocab_size)
        for n, order in enumerate(self.orders, start=1):
            found = order.probability(packed % self.vocab_size**n, self.vocab_size, found)
        return found


def _pack(rows: np.ndarray, vocab_size: int) -> np.ndarray:
    return (rows[:, 0] * vocab_size + rows[:, 1]) * vocab_size + rows[:, 2]


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The value of each wanted key, 0 where there is none."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)
