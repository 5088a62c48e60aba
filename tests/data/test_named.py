"""The named corpora: written or downloaded once, checked, and never left half done."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import pytest

from common.errors import DISK_OR_MEMORY, UserError
from data import named, stories
from data.corpora import jobs, open_corpus
from tests.data.texts import documents, refusal, write


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_stories_are_written_once_and_each_is_a_document(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = open_corpus("stories", 0.5, cache)
    assert corpus.nats_per_document == stories.entropy() and corpus.name == "stories"
    val = documents(corpus.val)
    assert len(val) == stories.VAL_STORIES
    assert val[:20] == [story.text for _, story in zip(range(20), stories.stories("val", 20), strict=True)]
    assert sum(len(documents(job)) for job in jobs(corpus.train, 1 << 20)) == stories.TRAIN_STORIES

    def never(folder: Path) -> None:
        raise AssertionError("written again")

    monkeypatch.setattr(stories, "write", never)
    assert open_corpus("stories", 0.1, cache) == corpus
    assert [path.name for path in cache.iterdir()] == [f"stories-{stories.version()}"]


def test_stories_interrupted_while_written_leave_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(folder: Path) -> None:
        write(folder / "train.txt", "half")
        raise KeyboardInterrupt

    monkeypatch.setattr(stories, "write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        open_corpus("stories", 0.1, cache)
    assert not list(cache.iterdir())


@pytest.mark.parametrize("source", ["stories", "shakespeare"])
def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path, source: str, play: bytes) -> None:
    file = write(tmp_path / "file", "in the way")
    with pytest.raises(UserError, match=r"cannot write to the cache .*file/cache.*GLASSGPT_CACHE") as caught:
        open_corpus(source, 0.1, file / "cache")
    assert caught.value.exit_code == DISK_OR_MEMORY


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A stand-in for Tiny Shakespeare, which the stand-in for the network hands out."""
    text = b"First Citizen:\nBefore we proceed any further, hear me speak.\n\n" * 100
    monkeypatch.setattr(named, "SHAKESPEARE_BYTES", len(text))
    monkeypatch.setattr(named, "SHAKESPEARE_SHA256", hashlib.sha256(text).hexdigest())
    monkeypatch.setattr(named.urllib.request, "urlopen", lambda url, timeout: io.BytesIO(text))
    return text


def offline(*args: Any, **kwargs: Any) -> None:
    raise named.urllib.request.URLError("Name or service not known")  # type: ignore[attr-defined]


def test_shakespeare_is_downloaded_once_and_its_last_tenth_held_out(
    cache: Path, play: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = open_corpus("shakespeare", 0.5, cache)
    train, val = ("".join(documents(spans)).encode() for spans in (corpus.train, corpus.val))
    assert train == play[: int(len(play) * 0.9)] and train + val == play
    assert [path.name for path in cache.iterdir()] == ["tinyshakespeare.txt"]
    monkeypatch.setattr(named.urllib.request, "urlopen", offline)
    assert open_corpus("shakespeare", 0.1, cache) == corpus


@pytest.mark.parametrize("answer", [b"<html>not found</html>", b"", b"x" * 10_000])
def test_a_download_of_something_else_is_not_kept(
    cache: Path, play: bytes, answer: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(named.urllib.request, "urlopen", lambda url, timeout: io.BytesIO(answer))
    assert "they are not the text" in refusal("shakespeare", cache)
    assert not cache.exists()


def test_without_a_network_it_says_where_to_put_the_text(
    cache: Path, play: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(named.urllib.request, "urlopen", offline)
    message = refusal("shakespeare", cache)
    assert named.SHAKESPEARE_URL in message and str(cache / "tinyshakespeare.txt") in message
    write(cache / "tinyshakespeare.txt", play[:-1] + b"?")
    assert "is not Tiny Shakespeare (its sha256 differs)" in refusal("shakespeare", cache)
    write(cache / "tinyshakespeare.txt", play)
    assert open_corpus("shakespeare", 0.1, cache).val
