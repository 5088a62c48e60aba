"""Preparing: the token files are the text, whole and once, whatever happens on the way."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data.prepare
from common.errors import DATA, DISK_OR_MEMORY, UserError
from data.config import DataConfig
from data.prepare import TokenizedCorpus, cache_lookup, check_min_length, encode, encode_all, prepare
from data.text_files import Piece
from data.token_dataset import SplitWriter, TokenSplit, load_split, token_dtype
from data.tokenizer import ByteTokenizer
from tests.data.texts import write

ROOT = Path(__file__).resolve().parents[2]
EOT = 256
FILES = ("train.npy", "train_documents.npy", "val.npy", "val_documents.npy", "vocabulary.json", "meta.json")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GLASSGPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def book(tmp_path: Path) -> Path:
    """Ten documents of different lengths, in one file."""
    return write(tmp_path / "book.txt", "\n<|endoftext|>\n".join(f"text {i}: " + "é wörd " * i for i in range(1, 11)))


@pytest.fixture
def small_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small text is encoded by several processes."""
    monkeypatch.setattr(data.prepare, "JOB_CHARACTERS", 20_000)
    monkeypatch.setattr(data.prepare, "PARALLEL_BYTES", 0)


def prepared(path: Path, tokenizer: str = "byte", **options: Any) -> TokenizedCorpus:
    return prepare(DataConfig(source=str(path), tokenizer=tokenizer, **options), progress=False)


def tokens_of(split: TokenSplit) -> list[int]:
    return split.tokens.tolist()


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def leftovers(cache: Path) -> list[Path]:
    return [*cache.glob("*.partial")]


def test_tokens_are_the_documents_between_ends_of_text(book: Path) -> None:
    corpus = prepared(book)
    texts = book.read_text().split("\n<|endoftext|>\n")
    tokens, starts = [EOT], []
    for text in texts:
        starts.append(len(tokens) - 1)
        tokens += [*text.encode(), EOT]
    n_val = corpus.val.n_documents
    assert 1 <= n_val <= 3
    border = starts[-n_val]
    assert tokens_of(corpus.train) == tokens[: border + 1] and tokens_of(corpus.val) == tokens[border:]
    assert corpus.train.document_starts.tolist() == starts[:-n_val]
    assert corpus.val.document_starts.tolist() == [start - border for start in starts[-n_val:]]
    assert corpus.train.n_bytes + corpus.val.n_bytes == sum(len(text.encode()) for text in texts)
    assert corpus.train.tokens.dtype == np.uint16 and isinstance(corpus.train.tokens, np.memmap)
    assert {path.name for path in corpus.folder.iterdir()} == {*FILES}
    trained = prepared(book, "bpe", vocab_size=300)
    assert trained.tokenizer.decode(tokens_of(trained.val)) == "".join(texts[-n_val:])


def test_long_text_is_one_document_in_each_split(tmp_path: Path) -> None:
    path = write(tmp_path / "long.txt", "to be or not to be, that is the question. " * 50_000)
    corpus = prepared(path, val_fraction=0.25)
    assert corpus.train.n_documents == corpus.val.n_documents == 1
    text = bytes(tokens_of(corpus.train)[1:-1] + tokens_of(corpus.val)[1:-1])
    assert text == path.read_bytes()
    assert corpus.val.n_bytes / len(text) == pytest.approx(0.25, abs=1e-3)


def test_second_run_encodes_nothing(book: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepared(book)
    before = {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    monkeypatch.setattr(data.prepare, "encode_all", None)
    second = prepared(book)
    assert second.fingerprint == first.fingerprint and tokens_of(second.train) == tokens_of(first.train)
    assert before == {path: path.stat().st_mtime_ns for path in second.folder.iterdir()}


def test_changed_file_is_prepared_again(book: Path) -> None:
    """Also one of the same size and modification time."""
    first, times = prepared(book), book.stat()
    book.write_text(book.read_text().replace("text 1", "TEXT 1"))
    os.utime(book, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert book.stat().st_size == times.st_size
    second = prepared(book)
    assert second.fingerprint != first.fingerprint
    assert bytes(second.train.tokens[1:7].tolist()) == b"TEXT 1"


def test_key_has_what_the_tokens_depend_on(book: Path) -> None:
    def key(**options: Any) -> str:
        return prepared(book, **options).fingerprint

    assert key() != key(tokenizer="char")
    assert key() != key(val_fraction=0.5)
    assert key(tokenizer="bpe", vocab_size=280) != key(tokenizer="bpe", vocab_size=300)
    assert key() == key(vocab_size=300, workers=2), "neither changes the bytes"
    first = prepared(book)
    assert prepared(book.rename(book.with_name("other.txt"))).folder == first.folder


def test_lookup_finds_what_is_prepared_and_writes_nothing(book: Path, cache: Path) -> None:
    config = DataConfig(source=str(book), tokenizer="bpe", vocab_size=300)
    info = cache_lookup(config)
    assert info.vocab_size == 300 and info.how and info.train is None and not cache.exists()
    corpus = prepare(config, progress=False)
    before = sorted(cache.rglob("*"))
    info = cache_lookup(config)
    assert info.vocab_size == corpus.tokenizer.vocab_size and not info.how
    assert info.train is not None and tokens_of(info.train) == tokens_of(corpus.train)
    assert sorted(cache.rglob("*")) == before
    sizes = {"byte": 257, "char": 97, "gpt2": 50_257}
    for tokenizer, size in sizes.items():
        assert cache_lookup(DataConfig(source="nowhere.txt", tokenizer=tokenizer)).vocab_size == size
    with pytest.raises(UserError, match="nearest are: gpt2"):
        cache_lookup(DataConfig(source="nowhere.txt", tokenizer="gtp2"))


def test_workers_write_the_same_files(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, small_jobs: None
) -> None:
    rng = np.random.default_rng(0)
    words = ["sun", "moon", "über", "naïve", "🙂", "日本"]
    texts = [" ".join(rng.choice(words, size)) for size in [3, 20_000, 1, 50, 9_000] * 2]
    path = write(tmp_path / "mixed.txt", "\n<|endoftext|>\n".join(texts))
    parallel = prepared(path, "bpe", vocab_size=280, workers=2)
    assert multiprocessing.active_children() == []
    monkeypatch.setenv("GLASSGPT_CACHE", str(tmp_path / "other"))
    serial = prepared(path, "bpe", vocab_size=280, workers=1)
    assert parallel.folder != serial.folder and files_of(parallel.folder) == files_of(serial.folder)
    assert parallel.train.n_documents + parallel.val.n_documents == len(texts)


@pytest.mark.parametrize("workers", [1, 2])
def test_invalid_text_leaves_nothing(tmp_path: Path, cache: Path, small_jobs: None, workers: int) -> None:
    text = bytearray(b"all is well. " * 20_000)
    text[123_456] = 0xFF
    path = write(tmp_path / "broken.txt", bytes(text))
    with pytest.raises(UserError, match="123456") as caught:
        prepared(path, workers=workers)
    assert caught.value.exit_code == DATA and "\n" not in str(caught.value)
    assert not leftovers(cache) and not [*cache.glob("tokens-*")]
    assert multiprocessing.active_children() == []


def test_killed_worker_is_reported(tmp_path: Path) -> None:
    vocabulary = tmp_path / "vocabulary.json"
    ByteTokenizer().save(vocabulary)
    jobs = [[Piece("all is well. " * 20_000, True)]] * 100
    with closing(encode_all(jobs, ByteTokenizer(), vocabulary, 2)) as results:
        next(results)
        for child in multiprocessing.active_children():
            child.kill()
        with pytest.raises(UserError, match="killed") as caught:
            list(results)
    assert caught.value.exit_code == DISK_OR_MEMORY


def test_jobs_are_read_no_faster_than_results_are_used(tmp_path: Path) -> None:
    vocabulary, yielded = tmp_path / "vocabulary.json", []
    ByteTokenizer().save(vocabulary)

    def jobs() -> Iterator[list[Piece]]:
        for i in range(100):
            yielded.append(i)
            yield [Piece("text", True)]

    with closing(encode_all(jobs(), ByteTokenizer(), vocabulary, 2)) as results:
        next(results)
        assert len(yielded) <= 6


def test_text_that_changes_while_preparing(book: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def encode_and_change(*arguments: Any) -> Iterator[Any]:
        for result in encode_all(*arguments):
            book.write_text(book.read_text() + "more")
            yield result

    monkeypatch.setattr(data.prepare, "encode_all", encode_and_change)
    with pytest.raises(UserError, match="changed while") as caught:
        prepared(book)
    assert caught.value.exit_code == DATA and not leftovers(cache)


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
        assert message.count("\n") == 1 and "is damaged" in message and f"{name} " in message
        assert str(first.folder) in message and not leftovers(cache)
    prepared(book, "bpe", vocab_size=300)
    assert not capsys.readouterr().err


def test_without_verification_hashes_are_not_compared(book: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, config = prepared(book).folder, DataConfig(source=str(book), tokenizer="byte")
    path = folder / "train.npy"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"\0")
    assert tokens_of(prepare(config, progress=False, verify=False).train)[-1] != EOT
    assert not capsys.readouterr().err
    truncate(path)
    assert tokens_of(prepare(config, progress=False, verify=False).train)[-1] == EOT
    assert "is damaged" in capsys.readouterr().err


def test_unwritable_cache_names_the_variable(book: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLASSGPT_CACHE", str(book / "cache"))
    with pytest.raises(UserError, match="GLASSGPT_CACHE") as caught:
        prepared(book)
    assert caught.value.exit_code == DISK_OR_MEMORY and str(book / "cache") in str(caught.value)


def test_full_disk_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path / "long.txt", b"all is well. " * 20_000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # No file may be larger; the token file would be 520 kB.
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        with pytest.raises(UserError, match="GLASSGPT_CACHE") as caught:
            prepared(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.exit_code == DISK_OR_MEMORY
    assert not leftovers(cache) and not [*cache.glob("tokens-*")]


def test_too_short_text_says_how_much_is_needed(tmp_path: Path) -> None:
    corpus = prepared(write(tmp_path / "short.txt", "a few words only"))
    n = len(corpus.train)
    check_min_length(corpus, n - 1)
    with pytest.raises(UserError, match=rf"{n} tokens.* needs {n + 1}") as caught:
        check_min_length(corpus, n)
    assert caught.value.exit_code == DATA


PROGRAM = """
import sys, time
import data.prepare
from data.config import DataConfig
data.prepare.JOB_CHARACTERS, data.prepare.PARALLEL_BYTES = 50_000, 0
append = data.prepare.SplitWriter.append

def slowly(*arguments):
    time.sleep(float(sys.argv[2]))
    append(*arguments)

data.prepare.SplitWriter.append = slowly
if __name__ == "__main__":
    corpus = data.prepare.prepare(DataConfig(source=sys.argv[1], tokenizer="byte", workers=2))
    print(corpus.fingerprint, len(corpus.train), len(corpus.val))
"""


def start(tmp_path: Path, source: Path, delay: float) -> subprocess.Popen[str]:
    """Prepare in a process with two workers and a disk that takes `delay` seconds for each job."""
    program = write(tmp_path / "program.py", PROGRAM)
    return subprocess.Popen(
        [sys.executable, str(program), str(source), str(delay)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def test_two_processes_at_once_agree(tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path / "long.txt", b"all is well. " * 100_000)
    runs = [start(tmp_path, path, 0) for _ in range(2)]
    outputs = [run.communicate(timeout=60) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    assert outputs[0] == outputs[1] and outputs[0][1] == ""
    assert len([*cache.glob("tokens-*")]) == 1 and not leftovers(cache)


def group_ends(group: int, seconds: float) -> bool:
    for _ in range(int(seconds * 20)):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_interruption_leaves_no_folder_and_no_worker(tmp_path: Path, cache: Path, number: signal.Signals) -> None:
    path = write(tmp_path / "long.txt", b"all is well. " * 200_000)
    run = start(tmp_path, path, 0.1)
    try:
        for _ in range(1500):
            partial = [*cache.glob("tokens-*.partial/train.npy")]
            if partial and partial[0].stat().st_size > 200_000:
                break
            time.sleep(0.02)
        else:
            pytest.fail("nothing was written")
        if number == signal.SIGINT:
            os.killpg(run.pid, number)  # a terminal sends Ctrl-C to every process of the group
        else:
            run.kill()
        _, err = run.communicate(timeout=30)
        assert group_ends(run.pid, 10)
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
    assert not [folder for folder in cache.glob("tokens-*") if folder.suffix != ".partial"]
    if number == signal.SIGINT:
        assert not leftovers(cache)
        assert err.count("Traceback") == 1 and err.rstrip().endswith("KeyboardInterrupt"), err


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.integers(0, 255), min_size=1, max_size=20), min_size=1, max_size=10), st.integers(1, 30))
def test_token_files_have_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, texts: list[list[int]], piece: int
) -> None:
    folder = tmp_path_factory.mktemp("tokens")
    tokens = [token for text in texts for token in (*text, EOT)]
    writer = SplitWriter(folder, "train", token_dtype(257), EOT)
    for i in range(0, len(tokens), piece):
        writer.append(np.array(tokens[i : i + piece], np.uint16), 1)
    writer.close()
    split = load_split(folder, "train", writer.n_bytes)
    assert tokens_of(split) == [EOT, *tokens] and split.n_documents == writer.n_documents == len(texts)
    ends = np.cumsum([0, *(len(text) + 1 for text in texts)])
    assert split.document_starts.tolist() == ends[:-1].tolist()


def test_dtype_and_byte_count() -> None:
    assert token_dtype(65_536) == np.uint16 and token_dtype(65_537) == np.uint32
    tokens, n_bytes = encode(ByteTokenizer(), [Piece("é", True), Piece("a", False), Piece("b", True)])
    assert tokens.tolist() == [*"é".encode(), EOT, *b"ab", EOT] and n_bytes == 4
