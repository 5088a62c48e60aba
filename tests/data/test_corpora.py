"""Corpora: how text is split into training and validation, and the named corpora."""

import hashlib
import io
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data import corpora, stories
from data.config import DataConfig
from data.corpora import Corpus
from tests.data.texts import data_error, documents, write
from tests.runs import user_error


def open_corpus(source: Path | str, val_fraction: float, cache: Path, **options: Any) -> Corpus:
    return corpora.open_corpus(DataConfig(source=str(source), val_fraction=val_fraction, **options), cache)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    for i in range(40):
        write(tmp_path / "texts" / f"{'ab'[i % 2]}/part {i:02d}.txt", f"{i} " * (20 + i))
    return tmp_path / "texts"


@pytest.mark.parametrize("fraction", [0.01, 0.333, 0.9])
def test_end_of_a_plain_file_is_held_out(tmp_path: Path, cache: Path, fraction: float) -> None:
    """Between characters; the byte-order mark is no text."""
    text = "é😀ש好" * 11
    corpus = open_corpus(write(tmp_path / "book.txt", "\ufeff" + text), fraction, cache)
    (train,), (val,) = documents(corpus.train), documents(corpus.val)
    assert train + val == text and corpus.nats_per_document is None
    assert abs(len(val.encode()) - fraction * len(text.encode())) < 8


def test_blank_lines_at_the_end_are_not_held_out_alone(tmp_path: Path, cache: Path) -> None:
    corpus = open_corpus(write(tmp_path / "book.txt", "word " * 200 + " \r\n" * 300), 0.1, cache)
    assert len("".join(documents(corpus.val)).split()) == 20


@pytest.mark.parametrize("fraction", [0.05, 0.5, 0.95])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_last_documents_of_a_file_are_held_out(tmp_path: Path, cache: Path, fraction: float, newline: str) -> None:
    expected = [f"document {i} " * (1 + i % 7) for i in range(60)]
    separator = f"{newline}<|endoftext|>{newline}"
    path = write(tmp_path / "stories.txt", separator + separator.join(expected) + separator * 2)
    corpus = open_corpus(path, fraction, cache)
    train, val = documents(corpus.train), documents(corpus.val)
    assert train + val == expected and train and val
    # The next document starts at most one document later; a separator may be around the border.
    assert -17 <= corpus.train[0].end - (1 - fraction) * path.stat().st_size <= 7 * 12 + 40


def test_whole_files_of_a_folder_are_held_out(texts: Path, cache: Path) -> None:
    corpus = open_corpus(texts, 0.2, cache)
    assert len(corpus.train + corpus.val) == 40 and not set(corpus.train) & set(corpus.val)
    assert [text.path for text in corpus.train] == sorted(text.path for text in corpus.train)
    n_val, n_all = (sum(text.n_bytes for text in part) for part in (corpus.val, corpus.train + corpus.val))
    assert n_val == pytest.approx(0.2 * n_all, rel=0.1)
    assert {text.path.parent.name for text in corpus.val} == {"a", "b"}, "spread over the files"
    moved = open_corpus(texts.rename(texts.with_name("elsewhere")), 0.2, cache)
    assert [text.path.name for text in moved.val] == [text.path.name for text in corpus.val]
    assert corpus.how == moved.how == f"{len(corpus.val)} of 40 files (.txt)"


@pytest.mark.parametrize("fraction", [0.001, 0.999])
@pytest.mark.parametrize("sizes", [(10, 10), (1, 1, 1000)])
def test_no_split_is_empty(tmp_path: Path, cache: Path, fraction: float, sizes: tuple[int, ...]) -> None:
    for i, size in enumerate(sizes):
        write(tmp_path / "few" / f"{i}.txt", "x" * size)
    corpus = open_corpus(tmp_path / "few", fraction, cache)
    assert documents(corpus.train) and documents(corpus.val)


@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 400), min_size=1, max_size=12), min_size=1, max_size=12),
    st.sampled_from([0.05, 0.1, 0.2, 0.4]),
)
@example([[4400], *([40] for _ in range(8))], 0.1)  # a long file and short ones
@example([[2000], [2000]], 0.1)
@example([[1, 2000]], 0.1)  # a title page, then a book
@example([[2000, 30]], 0.1)
@example([[4000], [4000], [10]], 0.2)
@example([[722, 40], [238]], 0.1)
def test_about_the_fraction_is_held_out(files: list[list[int]], fraction: float) -> None:
    """Between half and twice; nothing is lost, and training text comes from enough files."""
    with TemporaryDirectory() as name:
        for i, sizes in enumerate(files):
            write(Path(name, f"{i}.txt"), "\n<|endoftext|>\n".join("word " * 9 * n for n in sizes))
        corpus = open_corpus(name, fraction, Path(name))
        train, val = (sum(text.n_bytes for text in part) for part in (corpus.train, corpus.val))
        assert fraction / 2 - 20 / (train + val) <= val / (train + val) <= 2 * fraction + 20 / (train + val)
        assert sum(map(len, documents(corpus.train + corpus.val))) == sum(9 * 5 * n for sizes in files for n in sizes)
        assert len({text.path for text in corpus.train}) >= (1 - 2 * fraction) * len(files)


def test_last_document_may_begin_before_the_fraction(tmp_path: Path, cache: Path) -> None:
    parts = ["a" * 400, "b" * 450, "c" * 150]
    corpus = open_corpus(write(tmp_path / "book.txt", "\n<|endoftext|>\n".join(parts)), 0.1, cache)
    assert documents(corpus.train) == parts[:2] and documents(corpus.val) == parts[2:]


WORDS = [f"{a}{b}{c}" for a in "bdfgklmnprstz" for b in ("a", "é", "io") for c in ("n", "ra", "ldo", "str")]
LISTS = {
    "names": "\n".join(WORDS),
    "a hundred": "\n".join(WORDS[:100]),
    "full names": "\r\n".join(f"{a} O'{b}-{a} Jr" for a, b in pairwise(WORDS)),
}
NO_LISTS = {
    "stanzas": "\n".join(word + "\n" * (i % 4 == 3) for i, word in enumerate(WORDS)),
    "verses": "\n".join(f"the {a} and the {b} are {a}" for a, b in pairwise(WORDS)),
    "Chinese verses": "\n".join(f"{word}\uff0c兰叶春" for word in WORDS),
    "chat": "\n".join(f"ann: {word}" for word in WORDS),
    "few": "\n".join(WORDS[:99]),
    "repeated": "\n".join(WORDS[:20] * 9),
    "sentences": "\n".join(f"{word} is it." for word in WORDS),
}


@pytest.mark.parametrize("name", [*LISTS, *NO_LISTS])
def test_lines_of_a_list_are_documents(
    tmp_path: Path, cache: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = {**LISTS, **NO_LISTS}[name]
    path = write(tmp_path / "list.txt", text)
    assert open_corpus(path, 0.1, cache, lines="off").train[0].path == path
    is_list = open_corpus(path, 0.1, cache).train[0].path != path
    assert is_list == (name in LISTS) == bool(capsys.readouterr().err)
    on = open_corpus(path, 0.1, cache, lines="on")
    train, val = documents(on.train), documents(on.val)
    lines = [line for line in text.splitlines() if line.strip()]
    assert sorted(train + val) == sorted(lines) and len(set(train) & set(val)) <= len(lines) - len(set(lines))
    assert len(val) == pytest.approx(0.1 * len(lines), abs=0.02 * len(lines))
    if name in LISTS:
        assert min(map(lines.index, val)) < 0.3 * len(lines) < 0.7 * len(lines) < max(map(lines.index, val))


def test_separate_validation_text(texts: Path, cache: Path) -> None:
    """A file inside the source is not trained on; every other byte is."""
    corpus = open_corpus(texts, 0.2, cache, val=str(texts / "a" / "*.txt"))
    assert [text.path.parent.name for text in corpus.val] == ["a"] * 20
    assert [text.path.parent.name for text in corpus.train] == ["b"] * 20 and corpus.how == "data.val"
    for source, val, code, words in (
        (texts, texts, 3, "all of data.source"),
        ("stories", texts, 2, "text of your own"),
    ):
        with user_error(code, words):
            open_corpus(source, 0.2, cache, val=str(val))


def test_stories_are_written_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = open_corpus("stories", 0.5, cache)
    assert corpus.nats_per_document == stories.entropy() and corpus.name == "stories"
    val = documents(corpus.val)
    assert len(val) == stories.STORIES["val"] and len(documents(corpus.train)) == stories.STORIES["train"]
    assert val[:20] == [story.text for story in stories.stories("val", 20)]
    monkeypatch.setattr(corpora, "write_atomic", None)
    assert open_corpus("stories", 0.1, cache) == corpus
    [folder] = cache.iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["train.txt", "val.txt"]


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A substitute for Tiny Shakespeare that a substitute for the network provides."""
    text = b"First Citizen:\nBefore we proceed any further, hear me speak.\n\n" * 100
    monkeypatch.setattr(corpora, "SHAKESPEARE_SHA256", hashlib.sha256(text).hexdigest())
    monkeypatch.setattr(corpora.urllib.request, "urlopen", lambda url, timeout: io.BytesIO(text))
    return text


def offline(*args: Any, **kwargs: Any) -> None:
    raise corpora.urllib.request.URLError("Name or service not known")  # type: ignore[attr-defined]


def test_shakespeare_is_downloaded_once(cache: Path, play: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = open_corpus("shakespeare", 0.5, cache)
    train, val = ("".join(documents(part)).encode() for part in (corpus.train, corpus.val))
    assert train == play[: int(len(play) * 0.9)] and train + val == play
    assert [path.name for path in cache.iterdir()] == ["tinyshakespeare.txt"]
    monkeypatch.setattr(corpora.urllib.request, "urlopen", offline)
    assert open_corpus("shakespeare", 0.1, cache) == corpus


def test_wrong_download_is_not_kept(cache: Path, play: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora.urllib.request, "urlopen", lambda url, timeout: io.BytesIO(b"<html>not found</html>"))
    assert "its sha256 differs" in data_error("shakespeare", cache)
    assert not cache.exists()
    monkeypatch.setattr(corpora.urllib.request, "urlopen", offline)
    message = data_error("shakespeare", cache)
    assert corpora.SHAKESPEARE_URL in message and str(cache / "tinyshakespeare.txt") in message
    write(cache / "tinyshakespeare.txt", play[:-1] + b"?")
    assert "its sha256 differs" in data_error("shakespeare", cache)
