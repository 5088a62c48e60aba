"""Preparing: the token files are the text, whole and once, whatever happens on the way."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import data.prepare
from common.errors import DATA, DISK_OR_MEMORY, UserError
from data.config import DataConfig
from data.prepare import (
    TokenizedCorpus,
    check_min_length,
    encode,
    encode_all,
    expected_vocab_size,
    prepare,
    sample_text,
)
from data.text_files import Piece
from data.token_dataset import token_dtype
from data.tokenizer import ByteTokenizer
from tests.data.texts import write, write_range
from tests.runs import user_error

EOT = 256
FILES = ("train.bin", "train_documents.npy", "val.bin", "val_documents.npy", "vocabulary.json", "meta.json")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GLASSGPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def book(tmp_path: Path) -> Path:
    """Ten documents of different lengths, in one file."""
    return write(tmp_path / "book.txt", "\n<|endoftext|>\n".join(f"text {i}: " + "é wörd " * i for i in range(1, 11)))


def prepared(path: Path, tokenizer: str = "byte", **options: Any) -> TokenizedCorpus:
    return prepare(DataConfig(source=str(path), tokenizer=tokenizer, **options), progress=False)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("job_characters", [1, 1_000_000])
def test_tokens_are_the_documents_between_ends_of_text(
    book: Path, job_characters: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data.prepare, "JOB_CHARACTERS", job_characters)
    corpus = prepared(book, val_fraction=0.3)
    texts = book.read_text().split("\n<|endoftext|>\n")
    tokens, starts = [EOT], []
    for text in texts:
        starts.append(len(tokens) - 1)
        tokens += [*text.encode(), EOT]
    n_val = corpus.val.n_documents
    assert 1 <= n_val <= 3
    border = starts[-n_val]
    assert corpus.train.tokens.tolist() == tokens[: border + 1] and corpus.val.tokens.tolist() == tokens[border:]
    assert corpus.train.document_starts.tolist() == starts[:-n_val]
    assert corpus.val.document_starts.tolist() == [start - border for start in starts[-n_val:]]
    assert corpus.train.n_bytes + corpus.val.n_bytes == sum(len(text.encode()) for text in texts)
    assert corpus.train.tokens.dtype == np.uint16 and isinstance(corpus.train.tokens, np.memmap)
    assert {path.name for path in corpus.folder.iterdir()} == {*FILES}
    trained = prepared(book, "bpe", vocab_size=300, val_fraction=0.3)
    assert trained.tokenizer.decode(trained.val.tokens.tolist()) == "".join(texts[-n_val:])


def test_documents_in_pieces_and_large_ids() -> None:
    tokens, n_bytes = encode(ByteTokenizer(), [Piece("é", True), Piece("a", False), Piece("b", True)])
    assert tokens.tolist() == [*"é".encode(), EOT, *b"ab", EOT] and n_bytes == 4
    assert token_dtype(65_536) == np.uint16 and token_dtype(65_537) == np.uint32


def test_second_run_encodes_nothing(book: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepared(book)
    monkeypatch.setattr(data.prepare, "encode_all", None)
    second = prepared(book.rename(book.with_name("moved.txt")))
    assert second.folder == first.folder and second.train.tokens.tolist() == first.train.tokens.tolist()


def test_key_has_what_the_tokens_depend_on(book: Path) -> None:
    def key(**options: Any) -> str:
        return prepared(book, **options).fingerprint

    assert len({key(), key(tokenizer="char"), key(val_fraction=0.5)}) == 3
    assert key(tokenizer="bpe", vocab_size=280) != key(tokenizer="bpe", vocab_size=300)
    assert key() == key(vocab_size=300), "only of bpe"


def test_expected_vocab_size() -> None:
    for tokenizer, size in {"byte": 257, "char": 97, "gpt2": 50_257, "bpe": 1024}.items():
        assert expected_vocab_size(DataConfig(tokenizer=tokenizer))[0] == size
    with pytest.raises(UserError, match="nearest are: gpt2"):
        expected_vocab_size(DataConfig(tokenizer="gtp2"))


def test_number_of_threads_does_not_change_the_files(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data.prepare, "JOB_CHARACTERS", 20_000)
    rng = np.random.default_rng(0)
    words = ["sun", "moon", "über", "naïve", "🙂", "日本"]
    texts = [" ".join(rng.choice(words, size)) for size in [3, 20_000, 1, 50, 9_000] * 2]
    path = write(tmp_path / "mixed.txt", "\n<|endoftext|>\n".join(texts))
    monkeypatch.setattr(data.prepare.os, "sched_getaffinity", lambda process: {0, 1, 2}, raising=False)
    parallel = prepared(path, "bpe", vocab_size=280)
    monkeypatch.setattr(data.prepare.os, "sched_getaffinity", lambda process: {0}, raising=False)
    monkeypatch.setenv("GLASSGPT_CACHE", str(tmp_path / "other"))
    serial = prepared(path, "bpe", vocab_size=280)
    assert parallel.folder != serial.folder and files_of(parallel.folder) == files_of(serial.folder)


def test_text_is_read_no_faster_than_results_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.prepare, "JOB_CHARACTERS", 1)
    read = []

    def texts() -> Iterator[Any]:
        for i in range(100):
            read.append(i)
            yield write_range(tmp_path / "text.txt", "text")

    monkeypatch.setattr(data.prepare.os, "sched_getaffinity", lambda process: {0, 1}, raising=False)
    next(encode_all(texts(), ByteTokenizer()))
    assert len(read) <= 6


@pytest.mark.parametrize("n_files", [1, 100])
def test_sample_is_spread_over_the_text(tmp_path: Path, n_files: int) -> None:
    lines = [f"fifty bytes of text, to fill a file of 5 MB: {i:06d}\n" for i in range(100_000)]
    texts = [write_range(tmp_path / f"{i}", "".join(lines[i * 1000 :][: 100_000 // n_files])) for i in range(n_files)]
    assert "".join(sample_text(texts, 1 << 30)) == "".join(lines)
    sampled = "".join(sample_text(texts, 2_000_000)).splitlines(keepends=True)
    assert len(sampled) == pytest.approx(40_000, rel=0.3)
    assert all({*sampled} & {*lines[i:][:40_000]} for i in (0, 30_000, 60_000))


def test_text_that_changes_while_preparing(book: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def encode_and_change(*arguments: Any) -> Iterator[Any]:
        for result in encode_all(*arguments):
            book.write_text(book.read_text() + "more")
            yield result

    monkeypatch.setattr(data.prepare, "encode_all", encode_and_change)
    with user_error(DATA, "changed while"):
        prepared(book)
    assert not [*cache.iterdir()]


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("harm", [flip_a_bit, truncate, Path.unlink], ids=lambda harm: harm.__name__)
def test_damaged_folder_is_prepared_again(
    book: Path, cache: Path, capsys: pytest.CaptureFixture[str], harm: Callable[[Path], None]
) -> None:
    first = prepared(book, "bpe", vocab_size=300)
    expected = files_of(first.folder)
    for name in FILES:
        harm(first.folder / name)
        second = prepared(book, "bpe", vocab_size=300)
        assert second.folder == first.folder and files_of(second.folder) == expected
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and "is damaged" in message and name in message
        assert str(first.folder) in message and [*cache.iterdir()] == [first.folder]
    prepared(book, "bpe", vocab_size=300)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("source", ["book.txt", "repeats"])
def test_unwritable_cache_names_the_variable(book: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(book.parent)
    monkeypatch.setenv("GLASSGPT_CACHE", str(book / "cache"))
    with user_error(DISK_OR_MEMORY, f"cannot write .*{book}/cache.*GLASSGPT_CACHE"):
        prepared(Path(source))


def test_too_short_text_says_how_much_is_needed(tmp_path: Path) -> None:
    corpus = prepared(write(tmp_path / "short.txt", "a few words only"))
    n = len(corpus.train)
    check_min_length(corpus, n - 1)
    with user_error(DATA, rf"{n} tokens.* needs {n + 1}"):
        check_min_length(corpus, n)


def test_second_process_waits_for_the_first(book: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = list[Any]()

    def encode_slowly(*arguments: Any) -> Iterator[Any]:
        calls.append(arguments)
        time.sleep(0.2)
        return encode_all(*arguments)

    monkeypatch.setattr(data.prepare, "encode_all", encode_slowly)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(prepared, [book, book])
    assert first.folder == second.folder and [*cache.iterdir()] == [first.folder] and len(calls) == 2
    assert first.train.tokens.tolist() == second.train.tokens.tolist()


@pytest.mark.parametrize("after", [1, 5, 9, 19])
def test_preparing_continues_where_it_was_killed(
    after: int, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files are those of one go, and no text is encoded twice."""
    text = "\n<|endoftext|>\n".join(f"Tale {i}. " + "The fox met the hen. " * 60 for i in range(20))
    path = write(tmp_path / "tales.txt", text)
    monkeypatch.setattr(data.prepare, "JOB_CHARACTERS", 1000)
    monkeypatch.setattr("data.token_dataset.SAVE_EVERY", 4)
    whole = prepared(path)
    expected = files_of(whole.folder)
    shutil.rmtree(whole.folder)
    encoded = list[int]()

    def encode_and_die(texts: Any, tokenizer: Any, first: int = 0) -> Iterator[Any]:
        for number, result in enumerate(encode_all(texts, tokenizer, first), first):
            if len(encoded) == after:
                raise KeyboardInterrupt
            encoded.append(number)
            yield result

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data.prepare, "encode_all", encode_and_die)
        prepared(path)
    first_calls = list[int]()
    monkeypatch.setattr(data.prepare, "encode_all", lambda *a: (first_calls.append(a[2]), encode_all(*a))[1])
    again = prepared(path)
    assert files_of(again.folder) == expected and [*cache.iterdir()] == [again.folder]
    assert first_calls[0] == (18 if after > 18 else after // 4 * 4)
