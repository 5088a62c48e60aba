"""Contrast pairs and antecedent scores: spans find their tokens, batches equal single runs, baselines are honest."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inspection import contrast_pairs
from inspection.activation_cache import run_with_cache
from inspection.antecedent_score import AntecedentScore, antecedent_scores, chosen_heads, halves
from inspection.contrast_pairs import ContrastPair, LabelledText, make_contrast_pair, score_pairs
from model.gpt import GPT
from tests.inspection.handmade import INDUCTION, PREVIOUS, handmade, repeats
from tests.inspection.test_activation_cache import SMALL, random_gpt

Patch = pytest.MonkeyPatch
TEXT = "Mia gave the kite to Tom because he was sad. Then Tom smiled."
ANSWER, TOM = (49, 53), (20, 24)
PRONOUN = LabelledText("pronoun", TEXT, ANSWER, [TOM], " Mia")


class Bytes:
    """A tokenizer of bytes."""

    end_of_text = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def token_bytes(self, token: int) -> bytes:
        return bytes([token])


class Words(Bytes):
    """A tokenizer of words with their leading space, and of punctuation marks."""

    end_of_text, pattern = 999, r" ?\w+|[^\w]"

    def __init__(self) -> None:
        self.pieces: list[str] = []

    def encode(self, text: str) -> list[int]:
        pieces = re.findall(self.pattern, text)
        self.pieces += [piece for piece in pieces if piece not in self.pieces]
        return [self.pieces.index(piece) for piece in pieces]

    def token_bytes(self, token: int) -> bytes:
        return self.pieces[token].encode()


def test_spans_become_word_positions() -> None:
    words = Words()
    first = (TEXT.index("Mia"), TEXT.index("Mia") + 3)
    nouns = [(start, start + len(noun)) for noun in ("Tom", "Mia", "kite") for start in [TEXT.index(noun)]]
    pair = make_contrast_pair(replace(PRONOUN, antecedent=[first, TOM], nouns=nouns), words)
    assert pair.tokens == (999, *words.encode(TEXT[:49])) and pair.length == len(pair.tokens)
    assert [words.pieces[pair.tokens[k]].strip() for k in pair.antecedent] == ["Mia", "Tom"]
    assert [words.pieces[t] for t in pair.right + pair.wrong] == [" Tom", " Mia"]
    assert [words.pieces[pair.tokens[k]] for k in pair.nearest_noun] == [" Tom"]
    assert make_contrast_pair(PRONOUN, words).nearest_noun == ()


def test_spans_become_byte_positions() -> None:
    pair = make_contrast_pair(PRONOUN, Bytes())
    assert bytes(pair.tokens[k] for k in pair.antecedent) == bytes(pair.right) == b" Tom"
    assert bytes(pair.wrong) == b" Mia" and pair.length == len(pair.tokens) + 3


@given(st.text(min_size=3, max_size=30), st.data())
@settings(max_examples=100, deadline=None)
def test_multibyte_characters_are_counted_in_bytes(text: str, data: st.DataObject) -> None:
    text = text.encode("utf-8", "ignore").decode() + "abc"
    start = data.draw(st.integers(0, len(text) - 3))
    end = data.draw(st.integers(start + 1, len(text) - 2))
    label = LabelledText("k", text, (len(text) - 1, len(text)), [(start, end)], "zz")
    pair = make_contrast_pair(label, Bytes())
    assert bytes(pair.tokens[k] for k in pair.antecedent).decode() == text[start:end]


class Merging(Bytes):
    def encode(self, text: str) -> list[int]:
        return list(text.replace("n T", "#").encode())


class Lossy(Bytes):
    def token_bytes(self, token: int) -> bytes:
        return b"??"


@pytest.mark.parametrize(
    ("changes", "tokenizer", "error"),
    [
        ({"antecedent": [(50, 52)]}, Bytes(), "do not fit"),
        ({"antecedent": [(20, 20)]}, Bytes(), "do not fit"),
        ({"antecedent": []}, Bytes(), "do not fit"),
        ({"answer": (60, 99)}, Bytes(), "do not fit"),
        ({"nouns": [(50, 53)]}, Bytes(), "do not fit"),
        ({"wrong": " Tom"}, Bytes(), "both answers"),
        ({}, Merging(), "merges ' Tom'"),
        ({"text": TEXT.replace("Then Tom", "Then Xom"), "wrong": " Tim"}, Merging(), "merges ' Tim'"),
        ({}, Lossy(), "changes the bytes"),
    ],
)
def test_unusable_labels_are_refused(changes: dict[str, Any], tokenizer: Any, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        make_contrast_pair(replace(PRONOUN, **changes), tokenizer)


def random_pairs(count: int, kinds: tuple[str, ...], longest: int) -> list[ContrastPair]:
    rng = random.Random(3)

    def draw(least: int, most: int) -> tuple[int, ...]:
        return tuple(rng.randrange(50) for _ in range(rng.randint(least, most)))

    pairs = []
    for k in range(count):
        prompt = draw(4, longest - 3)
        antecedent = tuple(sorted(rng.sample(range(len(prompt)), rng.randint(1, 3))))
        pairs.append(ContrastPair(kinds[k % len(kinds)], prompt, antecedent, draw(1, 4), draw(1, 4)))
    return pairs


def score_alone(model: GPT, pair: ContrastPair) -> tuple[float, torch.Tensor]:
    """Logit difference, and each head's attention to the antecedent, from one forward pass each."""
    log_p = []
    for answer in (pair.right, pair.wrong):
        text = torch.tensor(pair.tokens + answer)
        log_p.append(-float(run_with_cache(model, text).loss[-len(answer) :].sum()))
    pattern = run_with_cache(model, torch.tensor(pair.tokens)).pattern
    return log_p[0] - log_p[1], pattern[:, :, -1, list(pair.antecedent)].sum(-1)


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_batches_equal_single_pairs(batch_size: int, monkeypatch: Patch) -> None:
    monkeypatch.setattr(contrast_pairs, "BATCH_SIZE", batch_size)
    model = random_gpt(replace(SMALL, attention="sdpa"))
    pairs = random_pairs(15, ("pronoun", "place"), 24)  # and some that are prefixes of others
    pairs += [replace(pair, tokens=pair.tokens[:4], antecedent=(1, 2)) for pair in pairs[::4]]
    pairs += [replace(pair, tokens=(pair.tokens + pair.right + pair.wrong)[:20]) for pair in pairs[:6]]
    expected = [score_alone(model, pair) for pair in pairs]
    logit_diffs, attention = score_pairs(model, pairs)
    torch.testing.assert_close(logit_diffs, torch.tensor([d for d, _ in expected]), atol=1e-4, rtol=0)
    torch.testing.assert_close(attention, torch.stack([a for _, a in expected]), atol=1e-5, rtol=0)
    assert logit_diffs.min() < 0 < logit_diffs.max()


def test_prefixes_share_a_forward_pass(monkeypatch: Patch) -> None:
    rows: list[int] = []
    real = contrast_pairs.run_with_hooks
    monkeypatch.setattr(
        contrast_pairs, "run_with_hooks", lambda m, tokens, hooks: rows.append(len(tokens)) or real(m, tokens, hooks)
    )
    story = tuple(range(20))
    score_pairs(random_gpt(SMALL), [ContrastPair("k", story[:n], (1,), (n,), (40,)) for n in (5, 9, 20)])
    assert rows == [1]


def test_no_pairs_and_too_long_pairs() -> None:
    logit_diffs, attention = score_pairs(random_gpt(SMALL), [])
    assert logit_diffs.shape == (0,) and attention.shape == (0, SMALL.n_layers, SMALL.n_heads)
    with pytest.raises(ValueError, match="takes 1 to 24"):
        score_pairs(random_gpt(SMALL), [ContrastPair("a", tuple(range(24)), (3,), (1, 5), (2,))])


# Antecedent scores.

N = 20


def matching_pairs(count: int) -> list[ContrastPair]:
    """Repeats of different lengths that end in the second copy; the token after the first match is the antecedent."""
    pairs = []
    for k in range(count):
        n = N - 2 * (k % 4)
        text = tuple(repeats(1, n, seed=1 + k)[0])
        end = n + 3 + k % 5
        nearest = (end - n - k % 2,)
        pairs.append(ContrastPair("match", text[:end], (end - n,), (text[end],), (text[1],), nearest))
    return pairs


def test_induction_head_beats_both_baselines() -> None:
    """The induction head attends to the antecedent at any offset: N - 1, N - 3, N - 5 or N - 7 tokens back."""
    (score,) = antecedent_scores(handmade(), matching_pairs(40))
    assert (score.kind, score.count, score.accuracy, score.head) == ("match", 40, 1.0, INDUCTION)
    assert score.attention == pytest.approx(1, abs=1e-6) and score.qualifies
    choose, judge = halves(range(40))
    offsets = [N - 1 - 2 * (k % 4) for k in range(40)]
    best = max(sorted(set(offsets)), key=lambda d: sum(offsets[k] == d for k in choose))
    assert score.offset == best
    assert score.offset_baseline == pytest.approx(sum(offsets[k] == best for k in judge) / 20)
    assert score.nearest_noun_baseline == pytest.approx(sum(k % 2 == 0 for k in judge) / 20)
    assert chosen_heads([score])["antecedent.match"].baseline == score.baseline


def test_head_is_chosen_on_one_half_and_judged_on_the_other() -> None:
    """One half has the previous token as antecedent, the other one the first: good at one is bad at the other."""
    choose, _ = halves(range(16))
    tokens = tuple(repeats(1, 12)[0])
    pairs = [ContrastPair("k", tokens[:9], (7,) if k in choose else (0,), (1,), (2,)) for k in range(16)]
    (score,) = antecedent_scores(handmade(), pairs)
    assert score.head == PREVIOUS and score.attention < 1e-6 and not score.qualifies
    assert score.offset == 1 and score.offset_baseline == 0 and score.nearest_noun_baseline is None


@pytest.mark.parametrize("count", [2, 3, 10, 11])
def test_halves_are_a_partition(count: int) -> None:
    choose, judge = halves(range(count))
    assert sorted(choose + judge) == list(range(count)) and 0 <= len(choose) - len(judge) <= 1
    assert (choose, judge) == halves(range(count))


def test_pairs_beyond_the_context_are_left_out() -> None:
    model = random_gpt(SMALL)
    fitting = [ContrastPair("a", tuple(range(24)), (3,), (1,), (2,))] * 3
    too_long = ContrastPair("a", tuple(range(24)), (3,), (1, 5), (2,))
    assert antecedent_scores(model, [*fitting, too_long])[0].count == 3
    assert antecedent_scores(model, [fitting[0], too_long]) == [] == antecedent_scores(model, [])


def test_summary_lines() -> None:
    scores = [
        AntecedentScore("pronoun", 107, 1.0, (1, 0), 0.794, 9, 0.312, 0.481),
        AntecedentScore("cause", 40, 0.5, (0, 1), 0.31, 1, 0.2, None),
        AntecedentScore("own", 12, 0.755, (0, 2), 0.5, 0, 0.0, 0.0),
    ]
    assert [score.summary for score in scores] == [
        "pronoun: right in 100.0% of 107; head L1H0 attends to a pronoun's antecedent "
        "(0.79; 9 tokens back 0.31; nearest noun 0.48)",
        "cause: right in 50.0% of 40; no head puts 50% of its attention on the antecedent "
        "(best L0H1, 0.31; 1 token back 0.20)",
        "own: right in 75.5% of 12; head L0H2 attends to the word that decides the answer "
        "(0.50; the last token 0.00; nearest noun 0.00)",
    ]
