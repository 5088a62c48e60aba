"""Contrast pairs and antecedent scores: spans find their tokens, batches equal single runs, baselines are honest."""

import random
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from data.tokenizer import ByteTokenizer
from inspection import compute_scores
from inspection.activation_cache import run_with_cache
from inspection.antecedent_score import antecedent_scores, halves
from inspection.compute_scores import score_pairs
from inspection.contrast_pairs import ContrastPair, make_contrast_pair
from model.gpt import GPT
from tests.inspection.handmade import INDUCTION, PREVIOUS, handmade, repeats
from tests.model.helpers import random_model

Patch = pytest.MonkeyPatch
TEXT = "Mia gave the kite to Tom because he was sad. Then Tom smiled."
ANSWER, TOM = (49, 53), (20, 24)
PRONOUN: dict[str, Any] = {"kind": "pronoun", "text": TEXT, "answer": ANSWER, "antecedent": [TOM], "wrong": " Mia"}


class Words(ByteTokenizer):
    """A tokenizer of words with their leading space, and of punctuation marks."""

    def __init__(self) -> None:
        self.pieces: list[str] = []

    def encode(self, text: str) -> np.ndarray:
        pieces = re.findall(r" ?\w+|[^\w]", text)
        self.pieces += [piece for piece in pieces if piece not in self.pieces]
        return np.array([self.pieces.index(piece) for piece in pieces])

    def token_bytes(self, token: int) -> bytes:
        return self.pieces[token].encode()


class Merging(ByteTokenizer):
    def _encode(self, text: str) -> np.ndarray:
        return super()._encode(text.replace("n T", "#"))


def test_spans_become_word_positions() -> None:
    words = Words()
    first = (0, 3)
    nouns = [(start, start + len(noun)) for noun in ("Tom", "Mia", "kite") for start in [TEXT.index(noun)]]
    pair = make_contrast_pair(words, **PRONOUN | {"antecedent": [first, TOM], "nouns": nouns})
    assert pair.tokens == (256, *words.encode(TEXT[:49])) and pair.length == len(pair.tokens)
    assert [words.pieces[pair.tokens[k]].strip() for k in pair.antecedent] == ["Mia", "Tom"]
    assert [words.pieces[t] for t in pair.right + pair.wrong] == [" Tom", " Mia"]
    assert [words.pieces[pair.tokens[k]] for k in pair.nearest_noun] == [" Tom"]


def test_spans_become_byte_positions() -> None:
    """Also after characters of several bytes."""
    for text, shift in ((TEXT, 0), ("日🙂é" + TEXT, 3)):
        answer, tom = ((start + shift, end + shift) for start, end in (ANSWER, TOM))
        pair = make_contrast_pair(ByteTokenizer(), "pronoun", text, answer, [tom], " Mia")
        assert bytes(pair.tokens[k] for k in pair.antecedent) == bytes(pair.right) == b" Tom"
        assert bytes(pair.wrong) == b" Mia" and pair.length == len(pair.tokens) + 3


@pytest.mark.parametrize(
    ("changes", "tokenizer", "error"),
    [
        ({"wrong": " Tom"}, ByteTokenizer(), "both answers"),
        ({}, Merging(), "merges ' Tom'"),
    ],
)
def test_unusable_labels_are_refused(changes: dict[str, Any], tokenizer: Any, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        make_contrast_pair(tokenizer, **PRONOUN | changes)


def random_pairs(count: int) -> list[ContrastPair]:
    rng = random.Random(3)

    def draw(least: int, most: int) -> tuple[int, ...]:
        return tuple(rng.randrange(50) for _ in range(rng.randint(least, most)))

    prompts = [draw(4, 21) for _ in range(count)]
    return [ContrastPair("k", p, tuple(sorted(rng.sample(range(len(p)), 2))), draw(1, 4), draw(1, 4)) for p in prompts]


def score_alone(model: GPT, pair: ContrastPair) -> tuple[float, torch.Tensor]:
    """Logit difference, and each head's attention to the antecedent, from one forward pass each."""
    log_p = []
    for answer in (pair.right, pair.wrong):
        text = torch.tensor(pair.tokens + answer)
        log_p.append(-float(run_with_cache(model, text).loss[-len(answer) :].sum()))
    pattern = run_with_cache(model, torch.tensor(pair.tokens)).pattern
    return log_p[0] - log_p[1], pattern[:, :, -1, list(pair.antecedent)].sum(-1)


@pytest.mark.parametrize("batch_size", [1, 7])
def test_batches_equal_single_pairs(batch_size: int, monkeypatch: Patch) -> None:
    monkeypatch.setattr(compute_scores, "PAIR_ROWS", batch_size)
    model = random_model("gpt2", "sdpa")
    pairs = random_pairs(8)  # and some that are prefixes of others
    pairs += [replace(pair, tokens=pair.tokens[:4], antecedent=(1, 2)) for pair in pairs[::4]]
    pairs += [replace(pair, tokens=(pair.tokens + pair.right + pair.wrong)[:20]) for pair in pairs[:6]]
    expected = [score_alone(model, pair) for pair in pairs]
    logit_diffs, attention = score_pairs(model, pairs)
    assert logit_diffs == pytest.approx([d for d, _ in expected], abs=1e-4)
    torch.testing.assert_close(attention, torch.stack([a for _, a in expected]), atol=1e-5, rtol=0)
    assert logit_diffs.min() < 0 < logit_diffs.max()


def test_induction_head_beats_both_baselines() -> None:
    """In repeats of four lengths, the induction head attends to the antecedent: 19, 17, 15 or 13 tokens back."""
    offsets, pairs = [19 - 2 * (k % 4) for k in range(40)], []
    for k, offset in enumerate(offsets):
        text = tuple(repeats(1, offset + 1, seed=1 + k)[0])
        end = offset + 4 + k % 5  # in the second copy
        antecedent = end - offset - 1
        pairs.append(ContrastPair("match", text[:end], (antecedent,), (text[end],), (text[1],), (antecedent - k % 2,)))
    (score,) = antecedent_scores(handmade(), pairs)
    assert (score.kind, score.count, score.accuracy, score.head) == ("match", 40, 1.0, INDUCTION)
    assert score.attention == pytest.approx(1, abs=1e-6)
    choose, judge = halves(range(40))
    best = max(sorted(set(offsets)), key=lambda d: sum(offsets[k] == d for k in choose))
    assert score.offset == best
    assert score.offset_baseline == pytest.approx(sum(offsets[k] == best for k in judge) / 20)
    assert score.nearest_noun_baseline == pytest.approx(sum(k % 2 == 0 for k in judge) / 20)


def test_head_is_chosen_on_one_half_and_judged_on_the_other() -> None:
    """One half has the previous token as antecedent, the other one the first: good at one is bad at the other."""
    choose, _ = halves(range(16))
    tokens = tuple(repeats(1, 12)[0])
    pairs = [ContrastPair("k", tokens[:9], (7,) if k in choose else (0,), (1,), (2,)) for k in range(16)]
    (score,) = antecedent_scores(handmade(), pairs)
    assert score.head == PREVIOUS and score.attention < 1e-6
    assert score.offset == 1 and score.offset_baseline == 0 and score.nearest_noun_baseline is None
    few = [replace(pair, antecedent=(7 if k < 4 else 0,)) for k, pair in enumerate(pairs[:7])]
    (score,) = antecedent_scores(handmade(), few)
    assert score.head == PREVIOUS and score.attention == pytest.approx(4 / 7) and score.baseline is None
    assert score.summary.endswith("(0.57)")
