"""N-gram baselines that a validation loss is compared with.

A model that has learned the frequencies of tokens reaches the unigram loss; one that beats the trigram loss uses more
than the two previous tokens. All losses are nats per token over the targets of the validation split: every token but
the leading end-of-text.
"""

import math

import numpy as np

from data.token_dataset import TokenSplit

TRAIN_LIMIT = 20_000_000
"""Maximum number of training tokens, from the start of the split. More would take memory and change little."""
VAL_LIMIT = 2_000_000  # Maximum number of validation targets, from the start of the split.


def baselines(train: TokenSplit, val: TokenSplit, vocab_size: int) -> dict[str, float]:
    """Nats per token of `uniform`, `unigram` and `trigram` on the validation split, trained on the training split."""
    targets = trigrams(val, VAL_LIMIT)
    trigram = kneser_ney(trigrams(train, TRAIN_LIMIT), targets, vocab_size)
    return {
        "uniform": math.log(vocab_size),
        "unigram": float(-np.log(unigram(train, vocab_size)[targets[:, 2]]).mean()),
        "trigram": float(-np.log(trigram).mean()),
    }


def bits_per_byte(nats_per_token: float, n_tokens: int, n_bytes: int) -> float:
    """A loss in bits per byte of text: nats_per_token * n_tokens / (ln 2 * n_bytes).

    Unlike a loss per token it is comparable between tokenizers. `n_tokens` is the number of targets, including
    end-of-text; `n_bytes` is `TokenSplit.n_bytes`, the UTF-8 text alone.
    """
    return nats_per_token * n_tokens / (math.log(2) * n_bytes)


def trigrams(split: TokenSplit, limit: int) -> np.ndarray:
    """The first `limit` targets, each after its two previous tokens, (n, 3) int64, oldest first.

    No row crosses the start of a document: if the previous token is the end-of-text before the target's document, it
    takes the oldest place too.
    """
    tokens = split.tokens[: limit + 1].astype(np.int64)
    before = tokens[:-1]
    oldest = np.concatenate([before[:1], before[:-1]])
    starts = np.asarray(split.document_starts)
    starts = starts[: np.searchsorted(starts, len(before))]
    oldest[starts] = before[starts]
    return np.stack([oldest, before, tokens[1:]], axis=1)


def unigram(split: TokenSplit, vocab_size: int) -> np.ndarray:
    """Probability of each token: its frequency among the targets, with one added to each count."""
    counts = np.bincount(split.tokens[1 : TRAIN_LIMIT + 1], minlength=vocab_size)
    return (counts + 1) / (counts.sum() + vocab_size)


def unlikeness(train: TokenSplit, val: TokenSplit, vocab_size: int) -> float:
    """How far the token frequencies of the validation split are from those of the training split.

    KL(validation || training) in nats, less that of as many tokens spread evenly over the training split, which are left
    out of the training counts; as a fraction of the unigram loss. 0: no further than chance.
    """
    targets, pool = val.tokens[1 : VAL_LIMIT + 1], train.tokens[1 : TRAIN_LIMIT + 1]
    sample = pool[:: max(1, len(pool) // len(targets))][: len(targets)]
    counts, spread, held_out = (np.bincount(tokens, minlength=vocab_size) for tokens in (pool, sample, targets))
    divergences = []
    for q, n in ((held_out, counts), (spread, counts - spread)):
        frequency, log_p = q / q.sum(), np.log((n + 1) / (n.sum() + vocab_size))
        divergences.append(frequency @ (np.log(np.where(q, frequency, 1)) - log_p))
    return float((divergences[0] - divergences[1]) / -(frequency @ log_p))


def kneser_ney(train: np.ndarray, rows: np.ndarray, vocab_size: int) -> np.ndarray:
    """The probability of each row's last token after its first two, (n, 3) -> (n,), given the trigrams of `train`.

    An interpolated trigram model with Kneser-Ney smoothing, as in Chen and Goodman, "An empirical study of smoothing
    techniques for language modeling" (1999), equations 24-26, with one discount D for each order:

        p(c | a b) = (max(n(a b c) - D, 0) + D * followers(a b) * p(c | b)) / n(a b)

    The lower orders use the same formula with *continuation counts*: n(b c) becomes the number of different tokens
    before `b c`. The lowest order interpolates with the uniform distribution, so that no token has probability 0.
    Packing three ids into one int64 needs at most 2^21 different tokens.
    """
    assert vocab_size <= 1 << 21
    keys, counts = np.unique(_pack(train, vocab_size), return_counts=True)
    orders = [(keys, counts)]
    for n in (2, 1):
        # Each different longer n-gram is one continuation of the n-gram without its first token.
        keys, counts = np.unique(keys % vocab_size**n, return_counts=True)
        orders.append((keys, counts))
    packed = _pack(rows, vocab_size)
    estimate = np.full(len(rows), 1 / vocab_size)
    for n, (keys, counts) in enumerate(reversed(orders), start=1):
        n1, n2 = int((counts == 1).sum()), int((counts == 2).sum())
        # Ney, Essen and Kneser 1994. Above 0, so that unseen n-grams get some probability.
        discount = min(max(n1 / (n1 + 2 * n2), 0.1), 0.9) if n1 else 0.1
        context_keys, first, followers = np.unique(keys // vocab_size, return_index=True, return_counts=True)
        ngrams = packed % vocab_size**n
        contexts = ngrams // vocab_size
        total = _look_up(context_keys, np.add.reduceat(counts, first), contexts)
        unseen = discount * _look_up(context_keys, followers, contexts) * estimate
        discounted = np.maximum(_look_up(keys, counts, ngrams) - discount, 0) + unseen
        estimate = np.where(total > 0, discounted / np.maximum(total, 1), estimate)
    return estimate


def _pack(rows: np.ndarray, vocab_size: int) -> np.ndarray:
    return (rows[:, 0] * vocab_size + rows[:, 1]) * vocab_size + rows[:, 2]


def _look_up(keys: np.ndarray, values: np.ndarray, query: np.ndarray) -> np.ndarray:
    """The value of each key in `query`, 0 if there is none; `keys` are ascending."""
    at = np.minimum(np.searchsorted(keys, query), len(keys) - 1)
    return np.where(keys[at] == query, values[at], 0)
