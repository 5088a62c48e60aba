"""N-gram baselines: equal to a slow dictionary version, and probability distributions."""

import math
from collections import Counter, defaultdict
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.ngram_baseline import baselines, bits_per_byte, kneser_ney, trigrams, unigram, unlikeness
from data.token_dataset import TokenSplit

VOCABULARY = 6
EOT = VOCABULARY - 1
documents = st.lists(st.lists(st.integers(0, EOT - 1), min_size=1, max_size=12), min_size=1, max_size=12)


def split_of(texts: list[list[int]]) -> TokenSplit:
    tokens, starts = [EOT], []
    for text in texts:
        starts.append(len(tokens) - 1)
        tokens += [*text, EOT]
    return TokenSplit(np.array(tokens, np.uint16), np.array(starts, np.int64), sum(map(len, texts)))


def slow_trigrams(texts: list[list[int]]) -> list[tuple[int, ...]]:
    rows: list[tuple[int, ...]] = []
    for text in texts:
        padded = [EOT, EOT, *text, EOT]
        rows += [tuple(padded[i - 2 : i + 1]) for i in range(2, len(padded))]
    return rows


class SlowKneserNey:
    """The recursion of Chen and Goodman with dictionaries, a context at a time."""

    def __init__(self, rows: list[tuple[int, ...]]) -> None:
        self.counts: dict[int, Counter[tuple[int, ...]]] = {3: Counter(rows)}
        for n in (2, 1):
            self.counts[n] = Counter(gram[1:] for gram in self.counts[n + 1])
        self.following: dict[int, Any] = {n: defaultdict(dict) for n in self.counts}
        for n, counts in self.counts.items():
            for gram, count in counts.items():
                self.following[n][gram[:-1]][gram[-1]] = count

    def discount(self, n: int) -> float:
        n1 = sum(c == 1 for c in self.counts[n].values())
        n2 = sum(c == 2 for c in self.counts[n].values())
        return min(max(n1 / (n1 + 2 * n2), 0.1), 0.9) if n1 else 0.1

    def probability(self, gram: tuple[int, ...]) -> float:
        if not gram:
            return 1 / VOCABULARY
        *context, last = gram
        shorter = self.probability(gram[1:])
        followers = self.following[len(gram)].get(tuple(context))
        if not followers:
            return shorter
        discount, total = self.discount(len(gram)), sum(followers.values())
        return max(followers.get(last, 0) - discount, 0) / total + discount * len(followers) / total * shorter


@settings(max_examples=60, deadline=None)
@given(documents, documents)
def test_baselines_equal_the_slow_version(train: list[list[int]], val: list[list[int]]) -> None:
    assert [tuple(row) for row in trigrams(split_of(train), 10**9).tolist()] == slow_trigrams(train)
    slow = SlowKneserNey(slow_trigrams(train))
    losses = [-math.log(slow.probability(gram)) for gram in slow_trigrams(val)]
    losses_of = baselines(split_of(train), split_of(val), VOCABULARY)
    assert losses_of["trigram"] == pytest.approx(sum(losses) / len(losses), rel=1e-9)
    counts = Counter(gram[2] for gram in slow_trigrams(train))
    total = sum(counts.values())
    losses = [-math.log((counts[g[2]] + 1) / (total + VOCABULARY)) for g in slow_trigrams(val)]
    assert losses_of["unigram"] == pytest.approx(sum(losses) / len(losses), rel=1e-9)
    assert losses_of["uniform"] == pytest.approx(math.log(VOCABULARY))


@settings(max_examples=60, deadline=None)
@given(documents)
def test_distributions_sum_to_one(train: list[list[int]]) -> None:
    split = split_of(train)
    contexts = [(a, b) for a in range(VOCABULARY) for b in range(VOCABULARY)]
    rows = np.array([(a, b, c) for a, b in contexts for c in range(VOCABULARY)])
    table = kneser_ney(trigrams(split, 10**9), rows, VOCABULARY).reshape(len(contexts), VOCABULARY)
    assert table.min() > 0
    assert table.sum(1) == pytest.approx(1)
    assert unigram(split, VOCABULARY).sum() == pytest.approx(1)


def test_unlikeness() -> None:
    """About 0 for a short text with the frequencies of a short training text; clear where every other token is new."""
    rng = np.random.default_rng(1)
    sizes = ((1, 3000), (1, 1000), (2000, 1000))
    train, same, new = ((low + 1000 * rng.random(n) ** 4).astype(int).tolist() for low, n in sizes)
    assert abs(unlikeness(split_of([train]), split_of([same]), 5000)) < 0.03
    assert unlikeness(split_of([train]), split_of([same[::2] + new[::2]]), 5000) > 0.1


def test_bits_per_byte() -> None:
    # 10 tokens of ln 2 nats are 10 bits; over 5 bytes that is 2 bits each.
    assert bits_per_byte(math.log(2), n_tokens=10, n_bytes=5) == pytest.approx(2)
