"""The corpus of random letters said twice: what it is, what can be known of it, and that nothing else gives it away."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from functools import cache
from itertools import pairwise, permutations, product
from pathlib import Path

import numpy as np
import pytest

from common.errors import DISK_OR_MEMORY, UserError
from data import repeated_tokens as repeats
from data.config import DataConfig
from data.corpora import open_corpus
from data.dataloader import IGNORE_INDEX, pack_documents, read_sequences
from data.prepare import TokenizedCorpus, prepare
from tests.data.texts import documents, write
from training.config import RunConfig, parse_train
from training.report import baseline_losses

ROOT = Path(__file__).parents[2]


@cache
def words(split: str) -> list[str]:
    """The words of a split: each document's first half."""
    return [document[: len(document) // 2] for document in repeats.documents(split, repeats.SPLITS[split])]


@cache
def nats(n: int) -> float:
    """-log p of a document with a word of n letters, as a reader who has seen through the corpus needs it."""
    total = 0.0
    for said in range(n + 1):
        longer = sum(length > said for length in repeats.LENGTHS) / sum(length >= said for length in repeats.LENGTHS)
        # Either one of the letters that were not yet said comes, or the second saying begins.
        total -= math.log(longer / (len(repeats.LETTERS) - said) if said < n else 1 - longer)
    return total


@pytest.mark.parametrize("split", repeats.SPLITS)
def test_a_document_is_a_word_of_different_letters_said_twice(split: str) -> None:
    found = list(repeats.documents(split, repeats.SPLITS[split]))
    for document in found:
        word = document[: len(document) // 2]
        assert document == word + word and len(set(word)) == len(word) and set(word) <= set(repeats.LETTERS)
    assert Counter(len(document) // 2 for document in found) == dict.fromkeys(range(16, 33), repeats.SPLITS[split])


def test_no_word_comes_twice() -> None:
    everything = words("train") + words("val")
    assert len(set(everything)) == len(everything)


def test_the_text_is_the_same_on_every_machine() -> None:
    text = "\n".join(repeats.documents("val", 3))
    assert hashlib.sha256(text.encode()).hexdigest().startswith("4d30fa149181ad17")
    assert text != "\n".join(repeats.documents("val", 3, seed=2))
    assert repeats.version() == "0d7650456070"


def test_the_version_tells_another_text(monkeypatch: pytest.MonkeyPatch) -> None:
    before = repeats.version.__wrapped__()
    monkeypatch.setattr(repeats, "SEED", 2)
    assert repeats.version.__wrapped__() != before


def test_the_entropy_is_that_of_every_document_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeats, "LETTERS", "abcd")
    monkeypatch.setattr(repeats, "LENGTHS", range(1, 4))
    every = [(n, word) for n in (1, 2, 3) for word in permutations("abcd", n)]
    probability = [1 / 3 / math.perm(4, n) for n, _ in every]
    assert sum(probability) == pytest.approx(1)
    assert repeats.entropy() == pytest.approx(-sum(p * math.log(p) for p in probability), abs=1e-12)


@pytest.mark.parametrize("split", repeats.SPLITS)
def test_the_mean_over_a_split_is_exactly_the_entropy(split: str) -> None:
    surprise = [nats(len(word)) for word in words(split)]
    assert math.fsum(surprise) / len(surprise) == pytest.approx(repeats.entropy(), abs=1e-9)


def test_no_fixed_distance_finds_the_answer() -> None:
    # In the second saying of n letters, the answer after each stands n - 1 places back.
    right: Counter[int] = Counter()
    for word in words("train"):
        right[len(word) - 1] += len(word)
    assert max(right.values()) / right.total() < 0.1


def test_no_letter_and_no_place_is_favoured() -> None:
    places = min(repeats.LENGTHS)
    counted = Counter((word[place], place) for word in words("train") for place in range(places))
    table = np.array([[counted[letter, place] for place in range(places)] for letter in repeats.LETTERS])
    expected = table.sum() / table.size
    assert abs((table - expected) / math.sqrt(expected)).max() < 5
    pairs = Counter(pair for word in words("train") for pair in pairwise(word))
    assert set(pairs) == {pair for pair in product(repeats.LETTERS, repeat=2) if pair[0] != pair[1]}


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return parse_train([str(ROOT / "configs" / "induction.toml")])[0]


@pytest.fixture(scope="module")
def data(config: RunConfig) -> TokenizedCorpus:
    return prepare(config.data, progress=False)


def test_it_is_a_corpus_like_any_other(config: RunConfig, data: TokenizedCorpus, tmp_path: Path) -> None:
    assert config.data == DataConfig(source="repeats", tokenizer="char")
    assert data.tokenizer.vocab_size == len(repeats.LETTERS) + 1
    assert data.val.n_documents == len(repeats.LENGTHS) * repeats.SPLITS["val"]
    corpus = open_corpus("repeats", 0.5, tmp_path / "cache")
    assert documents(corpus.val) == list(repeats.documents("val", repeats.SPLITS["val"]))
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [f"repeats-{repeats.version()}"]
    assert open_corpus("repeats", 0.1, tmp_path / "cache") == corpus


def test_the_floor_of_the_report_is_what_the_best_reader_needs(config: RunConfig, data: TokenizedCorpus) -> None:
    references = baseline_losses(data, pack_documents(data.val, config.model.context))
    needed = math.fsum(nats(len(word)) for word in words("val")) / (len(data.val) - 1)
    assert references["floor"] == pytest.approx(needed, abs=1e-9)
    # Whoever only counts letters does no better than whoever takes all for equally likely.
    assert references["floor"] + 2 < references["unigram"] < references["uniform"] + 0.001


def test_the_induction_config_reads_each_document_alone(config: RunConfig, data: TokenizedCorpus) -> None:
    windows = pack_documents(data.val, config.model.context)
    assert len(windows) == data.val.n_documents
    batch = read_sequences(data.val, windows, np.arange(len(windows)))
    assert (batch.tokens[:, 0] == data.tokenizer.end_of_text).all()
    lengths = (batch.targets != IGNORE_INDEX).sum(dim=1) - 1  # the end of a document is a target too
    assert {int(length) for length in lengths} == {2 * n for n in repeats.LENGTHS}


def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    file = write(tmp_path / "file", "in the way")
    with pytest.raises(UserError, match=r"cannot write to the cache .*file/cache.*GLASSGPT_CACHE") as caught:
        open_corpus("repeats", 0.1, file / "cache")
    assert caught.value.exit_code == DISK_OR_MEMORY
