"""Corpora: how text is split into training and validation, and the named corpora."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import pytest

from data import corpora, stories
from data.corpora import open_corpus
from tests.data.texts import data_error, documents, write


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
    corpus = open_corpus(str(write(tmp_path / "book.txt", "\ufeff" + text)), fraction, cache)
    (train,), (val,) = documents(corpus.train), documents(corpus.val)
    assert train + val == text and corpus.nats_per_document is None
    assert abs(len(val.encode()) - fraction * len(text.encode())) < 8


@pytest.mark.parametrize("fraction", [0.05, 0.5, 0.95])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_last_documents_of_a_file_are_held_out(tmp_path: Path, cache: Path, fraction: float, newline: str) -> None:
    expected = [f"document {i} " * (1 + i % 7) for i in range(60)]
    separator = f"{newline}<|endoftext|>{newline}"
    path = write(tmp_path / "stories.txt", separator + separator.join(expected) + separator * 2)
    corpus = open_corpus(str(path), fraction, cache)
    train, val = documents(corpus.train), documents(corpus.val)
    assert train + val == expected and train and val
    # The next document starts at most one document later.
    assert -1 <= corpus.train[0].end - (1 - fraction) * path.stat().st_size <= 7 * 12 + 40


@pytest.mark.parametrize("start", ["", "one more\n<|endoftext|>\n", "\n<|endoftext|>\n"])
@pytest.mark.parametrize("end", ["", "\n<|endoftext|>\n", "\n<|endoftext|>\n \n<|endoftext|>\n\n"])
def test_end_of_a_long_last_document_is_held_out(tmp_path: Path, cache: Path, start: str, end: str) -> None:
    text = "long text " * 300_000
    corpus = open_corpus(str(write(tmp_path / "long.txt", start + text + end)), 0.1, cache)
    (val,) = documents(corpus.val)
    assert documents(corpus.train)[-1] + val == text and len(val) == pytest.approx(0.1 * len(text), rel=1e-3)


def test_whole_files_of_a_folder_are_held_out(texts: Path, cache: Path) -> None:
    corpus = open_corpus(str(texts), 0.2, cache)
    assert len(corpus.train + corpus.val) == 40 and not set(corpus.train) & set(corpus.val)
    assert [text.path for text in corpus.train] == sorted(text.path for text in corpus.train)
    n_val, n_all = (sum(text.n_bytes for text in part) for part in (corpus.val, corpus.train + corpus.val))
    assert n_val == pytest.approx(0.2 * n_all, rel=0.1)
    assert corpus == open_corpus(str(texts), 0.2, cache)


def test_held_out_files_depend_on_names_alone(texts: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def held_out(source: str, root: Path) -> list[str]:
        return [text.path.relative_to(root).as_posix() for text in open_corpus(source, 0.2, cache).val]

    expected = held_out(str(texts), texts)
    moved = texts.rename(texts.with_name("elsewhere"))
    assert held_out(str(moved), moved) == expected
    monkeypatch.chdir(moved)
    assert held_out(".", Path()) == expected
    # A hash, not the alphabet: files of both subfolders.
    assert {name[0] for name in expected} == {"a", "b"}


@pytest.mark.parametrize("fraction", [0.001, 0.999])
@pytest.mark.parametrize("sizes", [(10, 10), (1, 1, 1000)])
def test_no_split_is_empty(tmp_path: Path, cache: Path, fraction: float, sizes: tuple[int, ...]) -> None:
    for i, size in enumerate(sizes):
        write(tmp_path / "few" / f"{i}.txt", "x" * size)
    corpus = open_corpus(str(tmp_path / "few"), fraction, cache)
    assert corpus.train and corpus.val and len(corpus.train + corpus.val) == len(sizes)


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
    monkeypatch.setattr(corpora, "SHAKESPEARE_BYTES", len(text))
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
