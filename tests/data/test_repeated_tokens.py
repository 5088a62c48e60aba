"""Repeated tokens: exact entropy, and nothing but the repetition predicts the second copy."""

import hashlib
import math
from collections import Counter
from functools import cache
from itertools import permutations

import pytest

from data import repeated_tokens as repeats
from data.dataloader import pack_documents
from data.prepare import prepare
from tests.runs import ROOT
from training.config import parse_train
from training.report import baseline_losses


@cache
def nats(n: int) -> float:
    """-log p of a document with a word of n letters under the best possible model."""
    total = 0.0
    for i in range(n + 1):
        longer = sum(length > i for length in repeats.LENGTHS) / sum(length >= i for length in repeats.LENGTHS)
        # Either a letter that has not occurred follows, or the second copy begins.
        total -= math.log(longer / (len(repeats.LETTERS) - i) if i < n else 1 - longer)
    return total


@pytest.mark.parametrize(("split", "n_words"), repeats.WORDS_PER_LENGTH.items())
def test_a_document_is_a_word_of_distinct_letters_repeated(split: str, n_words: int) -> None:
    texts = list(repeats.documents(split))
    for document in texts:
        word = document[: len(document) // 2]
        assert document == word + word and len(set(word)) == len(word) and set(word) <= set(repeats.LETTERS)
    assert len(set(texts)) == len(texts)
    assert Counter(len(document) // 2 for document in texts) == dict.fromkeys(range(16, 33), n_words)
    surprise = [nats(len(document) // 2) for document in texts]
    assert math.fsum(surprise) / len(surprise) == pytest.approx(repeats.entropy(), abs=1e-9)


def test_text_of_a_seed_never_changes() -> None:
    text = "\n".join(repeats.documents("val", 3))
    assert hashlib.sha256(text.encode()).hexdigest().startswith("4d30fa149181ad17")
    assert text != "\n".join(repeats.documents("val", 3, seed=2))


def test_entropy_against_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeats, "LETTERS", "abcd")
    monkeypatch.setattr(repeats, "LENGTHS", range(1, 4))
    all_words = [(n, word) for n in (1, 2, 3) for word in permutations("abcd", n)]
    probability = [1 / 3 / math.perm(4, n) for n, _ in all_words]
    assert sum(probability) == pytest.approx(1)
    assert repeats.entropy() == pytest.approx(-sum(p * math.log(p) for p in probability), abs=1e-12)


def test_tokens_and_reported_floor() -> None:
    """The floor is the loss of the best model; letter frequencies are no better than the uniform distribution."""
    config = parse_train([str(ROOT / "configs" / "induction.toml")])[0]
    data = prepare(config.data, progress=False)
    assert data.tokenizer.decode(data.val.tokens) == "".join(repeats.documents("val"))
    assert len(pack_documents(data.val, config.model.context)) == data.val.n_documents == 17 * 60, "a sequence for each"
    best = math.fsum(nats(len(document) // 2) for document in repeats.documents("val")) / (len(data.val) - 1)
    references = baseline_losses(data)
    assert references["floor"] == pytest.approx(best, abs=1e-9)
    assert references["floor"] + 2 < references["unigram"] < references["uniform"] + 0.001
