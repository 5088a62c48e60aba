"""Preparing: the stream on disk is the text, once and whole, whatever happens on the way."""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data.encoding
import data.prepare
from common.errors import DATA, DISK_OR_MEMORY, UserError
from data.config import DataConfig
from data.documents import Span
from data.encoding import encode, encode_all
from data.held import DamagedShards
from data.manifest import load_shards, seal, unseal, write_manifest
from data.prepare import TokenizedCorpus, prepare, require
from data.token_dataset import SplitWriter, TokenSplit, token_dtype
from data.tokenizer import ByteTokenizer

ROOT = Path(__file__).resolve().parent.parent
EOT = 256


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("GLASSGPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def book(tmp_path) -> Path:
    """Ten documents of different lengths, in one file."""
    path = tmp_path / "book.txt"
    path.write_text("\n<|endoftext|>\n".join(f"text {i}: " + "é wörd " * i for i in range(1, 11)))
    return path


@pytest.fixture
def small_jobs(monkeypatch) -> None:
    """Let a small text be worth several processes."""
    monkeypatch.setattr(data.prepare, "JOB_BYTES", 20_000)
    monkeypatch.setattr(data.encoding, "ALONE_BELOW", 0)


def prepared(path: Path, tokenizer: str = "byte", **options) -> TokenizedCorpus:
    return prepare(DataConfig(source=str(path), tokenizer=tokenizer, **options), progress=False)


def everything(split: TokenSplit) -> list[int]:
    return split.read(0, len(split)).tolist()


def leftovers(cache: Path) -> list[Path]:
    return [*cache.glob("*.partial")]


def test_the_stream_is_the_documents_between_ends_of_text(book):
    made = prepared(book)
    texts = book.read_text().split("\n<|endoftext|>\n")
    stream, starts = [EOT], []
    for text in texts:
        starts.append(len(stream) - 1)
        stream += [*text.encode(), EOT]
    held_out = made.val.n_documents
    assert 1 <= held_out <= 3
    border = starts[-held_out]
    assert everything(made.train) == stream[: border + 1]
    assert everything(made.val) == stream[border:]
    assert made.train.document_starts.tolist() == starts[:-held_out]
    assert made.val.document_starts.tolist() == [start - border for start in starts[-held_out:]]
    assert made.train.n_bytes + made.val.n_bytes == sum(len(text.encode()) for text in texts)
    assert made.train.shards[0].dtype == np.uint16


def test_one_long_text_is_one_document_in_each_split(tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("to be or not to be, that is the question. " * 50_000)
    made = prepared(path, val_fraction=0.25)
    assert made.train.n_documents == made.val.n_documents == 1
    whole = bytes(everything(made.train)[1:-1] + everything(made.val)[1:-1])
    assert whole == path.read_bytes()
    assert made.val.n_bytes / len(whole) == pytest.approx(0.25, abs=1e-3)


@pytest.mark.parametrize("name", ["char", "bpe"])
def test_tokenizers_are_trained_and_travel_along(book, name):
    made = prepared(book, name, vocab_size=300)
    assert (made.folder / "tokenizer.json").is_file()
    texts = book.read_text().split("\n<|endoftext|>\n")
    first, second = made.train.document_starts[:2].tolist()
    assert made.tokenizer.decode(made.train.read(first, second + 1)) == texts[0]
    assert made.tokenizer.decode(everything(made.val)) == "".join(texts[-made.val.n_documents :])


def test_a_second_run_reads_no_text(book, monkeypatch):
    monkeypatch.setattr(data.prepare, "_SETTLED_AFTER", 0)
    first = prepared(book)
    written = {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}

    def refuse(*_):
        raise AssertionError("read again")

    monkeypatch.setattr(data.prepare, "sha256_of", refuse)
    monkeypatch.setattr(data.prepare, "encode_all", refuse)
    second = prepared(book)
    assert second.fingerprint == first.fingerprint and everything(second.train) == everything(first.train)
    assert written == {path: path.stat().st_mtime_ns for path in second.folder.iterdir()}


def test_a_changed_file_is_prepared_again(book, monkeypatch):
    """Also one of the same size whose time stamp was set back, and one changed the moment after."""
    for settled in (0, 10**18):
        monkeypatch.setattr(data.prepare, "_SETTLED_AFTER", settled)
        first, times = prepared(book), book.stat()
        content = book.read_text()
        book.write_text(content.replace("text 1", "TEXT 1" if settled else "teXt 1"))
        os.utime(book, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert book.stat().st_size == times.st_size
        second = prepared(book)
        assert second.fingerprint != first.fingerprint
        assert bytes(second.train.read(1, 7).tolist()).decode() == book.read_text()[:6]
        book.write_text(content)


def test_a_change_within_one_time_stamp_is_noticed(book, monkeypatch):
    """Some file systems count in whole seconds: what was read just now may have changed since."""
    now = time.time_ns()
    monkeypatch.setattr(data.prepare, "stamp_of", lambda path: (path.stat().st_size, now, now))
    first = prepared(book)
    book.write_text(book.read_text().replace("text 1", "TEXT 1"))
    assert prepared(book).fingerprint != first.fingerprint


def test_a_moved_file_is_not_prepared_again(book):
    first = prepared(book)
    assert prepared(book.rename(book.with_name("other.txt"))).folder == first.folder


def test_the_key_holds_what_the_tokens_depend_on(book):
    def key(**options) -> str:
        return prepared(book, **options).fingerprint

    assert key() != key(tokenizer="char")
    assert key() != key(val_fraction=0.5)
    assert key(tokenizer="bpe", vocab_size=280) != key(tokenizer="bpe", vocab_size=300)
    assert key() == key(vocab_size=300, workers=2), "neither matters to bytes"


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_workers_write_the_same_bytes(tmp_path, cache, monkeypatch, small_jobs):
    """Long and short documents, many jobs, several processes: the shards are those of one process."""
    rng = np.random.default_rng(0)
    words = ["sun", "moon", "über", "naïve", "🙂", "日本"]
    texts = [" ".join(rng.choice(words, size)) for size in [3, 20_000, 1, 50, 9_000] * 2]
    path = tmp_path / "mixed.txt"
    path.write_text("\n<|endoftext|>\n".join(texts))
    many = prepared(path, "bpe", vocab_size=280, workers=2)
    assert multiprocessing.active_children() == []
    monkeypatch.setenv("GLASSGPT_CACHE", str(tmp_path / "other"))
    one = prepared(path, "bpe", vocab_size=280, workers=1)
    assert many.folder != one.folder and files_of(many.folder) == files_of(one.folder)
    assert many.train.n_documents + many.val.n_documents == len(texts)


@pytest.mark.parametrize("workers", [1, 2])
def test_broken_text_is_one_line_with_its_offset(tmp_path, cache, small_jobs, workers):
    path = tmp_path / "broken.txt"
    text = bytearray(b"all is well. " * 20_000)
    text[123_456] = 0xFF
    path.write_bytes(text)
    with pytest.raises(UserError, match="123456") as caught:
        prepared(path, workers=workers)
    assert caught.value.exit_code == DATA and "\n" not in str(caught.value)
    assert not leftovers(cache) and not [*cache.glob("tokens-*")]
    assert multiprocessing.active_children() == []


def test_a_killed_worker_is_reported(tmp_path, small_jobs):
    path, saved = tmp_path / "long.txt", tmp_path / "tokenizer.json"
    path.write_bytes(b"all is well. " * 20_000)
    ByteTokenizer().save(saved)
    jobs = [(Span(path, 0, 250_000),)] * 100
    with closing(encode_all(jobs, ByteTokenizer(), saved, 2)) as results:
        next(results)
        for child in multiprocessing.active_children():
            child.kill()
        with pytest.raises(UserError, match="killed") as caught:
            list(results)
    assert caught.value.exit_code == DISK_OR_MEMORY


def test_a_change_while_preparing_is_noticed(book, cache, monkeypatch):
    def encode_and_change(jobs, *others):
        for result in encode_all(jobs, *others):
            book.write_text(book.read_text() + "more")
            yield result

    monkeypatch.setattr(data.prepare, "encode_all", encode_and_change)
    with pytest.raises(UserError, match="changed while") as caught:
        prepared(book)
    assert caught.value.exit_code == DATA and not leftovers(cache)


def damage_shard(folder: Path) -> None:
    os.truncate(folder / "train-00000.npy", 150)


def damage_by_more(folder: Path) -> None:
    with (folder / "val-00000.npy").open("ab") as file:
        file.write(b"more")


def damage_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("{")


def damage_missing(folder: Path) -> None:
    (folder / "val-documents.npy").unlink()


def damage_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_bytes(b"x" * path.stat().st_size)


def damage_header(folder: Path) -> None:
    path = folder / "train-00000.npy"
    path.write_bytes(path.read_bytes().replace(b"'<u2'", b"'|O8'"))


@pytest.mark.parametrize(
    "damage",
    [damage_shard, damage_by_more, damage_manifest, damage_missing, damage_tokenizer, damage_header],
)
def test_a_damaged_folder_is_prepared_again(book, cache, capsys, damage):
    first = prepared(book, "bpe", vocab_size=300)
    expected = files_of(first.folder)
    damage(first.folder)
    second = prepared(book, "bpe", vocab_size=300)
    assert second.folder == first.folder and files_of(second.folder) == expected
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "damaged" in said and str(first.folder) in said
    assert not leftovers(cache)
    prepared(book, "bpe", vocab_size=300)
    assert not capsys.readouterr().err


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit_is_found_at_the_next_start(book, capsys):
    """No size changes, and the token is one of the vocabulary: only the sha256 tells."""
    first = prepared(book)
    expected, tokens = files_of(first.folder), everything(first.train)
    for name in ("train-00000.npy", "val-00000.npy"):
        flip(first.folder / name, -2)
        stored = load_shards(first.folder, first.fingerprint)
        with pytest.raises(DamagedShards, match=f"{name} has the wrong sha256"):
            stored.verify()
        unverified = prepare(DataConfig(source=str(book), tokenizer="byte"), progress=False, verify=False)
        assert files_of(unverified.folder) != expected and not capsys.readouterr().err
        second = prepared(book)
        assert files_of(second.folder) == expected and everything(second.train) == tokens
        assert f"{name} has the wrong sha256; preparing again" in capsys.readouterr().err


def test_every_byte_is_verified_and_told_of(book):
    made = prepared(book)
    stored, told = load_shards(made.folder, made.fingerprint), []
    stored.verify(told.append)
    sizes = {path.name: path.stat().st_size for path in made.folder.iterdir() if path.name != "manifest.json"}
    assert {file.path.name for file in stored.files} == {*sizes}
    assert sum(told) == stored.n_bytes == sum(sizes.values())


def test_tokens_of_another_vocabulary_are_prepared_again(book, capsys):
    """A folder that is whole, but whose manifest and tokenizer differ about the vocabulary."""
    first = prepared(book)
    manifest = unseal((first.folder / "manifest.json").read_bytes())
    del manifest["sha256"]
    manifest["tokenizer"]["vocab_size"] = 300
    (first.folder / "manifest.json").write_bytes(seal(manifest))
    assert prepared(book).train.vocab_size == 257
    assert "another tokenizer" in capsys.readouterr().err


def test_a_flipped_bit_in_the_index_of_sources_changes_nothing(book, cache, monkeypatch):
    """It names what was read: were it believed, a resumed run would be told that its text had changed."""
    monkeypatch.setattr(data.prepare, "_SETTLED_AFTER", 0)
    first = prepared(book)
    [index] = cache.glob("sources-*.json")
    at = index.read_bytes().index(hashlib.sha256(book.read_bytes()).hexdigest().encode())
    flip(index, at)
    assert prepared(book).fingerprint == first.fingerprint


def test_a_link_in_the_place_of_a_folder_is_replaced_and_not_followed(book, tmp_path):
    first = prepared(book)
    away = first.folder.rename(tmp_path / "away")
    for target in (away, tmp_path / "nowhere"):
        os.truncate(away / "manifest.json", 10)
        first.folder.symlink_to(target)
        assert everything(prepared(book).train) == everything(first.train)
        assert not first.folder.is_symlink() and (away / "train-00000.npy").is_file()
        shutil.rmtree(first.folder)


def link_to_a_copy(path: Path) -> None:
    """A link that leads out of the folder, to a file with the very bytes that are wanted."""
    path.symlink_to(path.rename(path.parent.parent / "outside"))


def replaced_by(make: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda path: (path.unlink(), make(path))[1]


@pytest.mark.parametrize("name", ["manifest.json", "tokenizer.json", "val-documents.npy"])
@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (replaced_by(os.mkfifo), "no regular file"),
        (replaced_by(Path.mkdir), "no regular file"),
        (link_to_a_copy, "symbolic link"),
    ],
)
def test_a_pipe_a_link_or_a_folder_in_the_place_of_a_file_is_damage(book, capsys, name, harm, said):
    first = prepared(book)
    expected = files_of(first.folder)
    harm(first.folder / name)
    assert files_of(prepared(book).folder) == expected
    assert said in capsys.readouterr().err and not (first.folder / name).is_symlink()


@pytest.mark.parametrize("damage", [damage_shard, damage_by_more])
def test_sizes_are_compared_without_verifying_too(book, capsys, damage):
    damage(prepared(book).folder)
    prepare(DataConfig(source=str(book), tokenizer="byte"), progress=False, verify=False)
    assert "has the wrong size" in capsys.readouterr().err


def test_a_system_that_hands_out_less_than_it_was_asked_for_is_asked_again(book, monkeypatch):
    made, pread = prepared(book), os.pread
    tokens = everything(made.train)
    monkeypatch.setattr(os, "pread", lambda descriptor, n_bytes, offset: pread(descriptor, min(n_bytes, 5), offset))
    assert everything(prepared(book).train) == everything(made.train) == tokens


def test_files_are_closed_with_what_holds_them_and_not_handed_down(book):
    def held() -> set[str]:
        return {name for name in os.listdir("/dev/fd") if os.path.exists(f"/dev/fd/{name}")}

    prepared(book)
    before = held()
    stored = load_shards(prepared(book).folder, prepared(book).fingerprint)
    opened = held() - before
    assert len(opened) == len(stored.files) and not any(os.get_inheritable(int(name)) for name in opened)
    del stored
    assert held() == before


def test_too_many_open_files_are_no_damage(book, monkeypatch):
    """What took hours to prepare is not thrown away because of a limit."""
    made = prepared(book)
    written = files_of(made.folder)

    def refuse(path, flags):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        with pytest.raises(UserError, match="ulimit") as caught:
            load_shards(made.folder, made.fingerprint)
    assert caught.value.exit_code == DISK_OR_MEMORY and files_of(made.folder) == written


def test_a_cache_that_cannot_be_made_names_the_variable(book, tmp_path, monkeypatch):
    monkeypatch.setenv("GLASSGPT_CACHE", str(book / "cache"))
    with pytest.raises(UserError, match="GLASSGPT_CACHE") as caught:
        prepared(book)
    assert caught.value.exit_code == DISK_OR_MEMORY and str(book / "cache") in str(caught.value)


def test_a_full_disk_leaves_nothing(tmp_path, cache):
    path = tmp_path / "long.txt"
    path.write_bytes(b"all is well. " * 20_000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The system refuses to let any file grow beyond this; the shard would be 520 kB.
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        with pytest.raises(UserError, match="GLASSGPT_CACHE") as caught:
            prepared(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.exit_code == DISK_OR_MEMORY
    assert not leftovers(cache) and not [*cache.glob("tokens-*")]


def test_what_a_killed_process_left_is_swept_away(book, cache):
    cache.mkdir()
    old, new = cache / "tokens-1.2-3.partial", cache / "tokens-4.5-6.partial"
    for folder in (old, new):
        folder.mkdir()
        (folder / "train-00000.npy").write_bytes(b"")
    long_ago = time.time() - 2 * 24 * 3600
    os.utime(old, (long_ago, long_ago))
    prepared(book)
    assert leftovers(cache) == [new], "the new one may belong to a process that is at work"


def test_too_short_a_text_says_how_much_is_needed(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("a few words only")
    made = prepared(path)
    have = len(made.train)
    require(made, have - 1)
    with pytest.raises(UserError, match=rf"{have} tokens .* needs {have + 1}") as caught:
        require(made, have)
    assert caught.value.exit_code == DATA


PROGRAM = """
import sys, time
import data.encoding, data.prepare
from data.config import DataConfig
data.prepare.JOB_BYTES, data.encoding.ALONE_BELOW = 50_000, 0
append = data.prepare.SplitWriter.append

def slowly(*arguments):
    time.sleep(float(sys.argv[2]))
    append(*arguments)

data.prepare.SplitWriter.append = slowly
if __name__ == "__main__":
    made = data.prepare.prepare(DataConfig(source=sys.argv[1], tokenizer="byte", workers=2))
    print(made.fingerprint, len(made.train), len(made.val))
"""


def start(tmp_path: Path, source: Path, delay: float) -> subprocess.Popen[str]:
    """Prepare in a process of its own: two workers, and a disk that takes `delay` seconds for each job."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    return subprocess.Popen(
        [sys.executable, str(program), str(source), str(delay)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def test_two_processes_at_once_agree(tmp_path, cache):
    path = tmp_path / "long.txt"
    path.write_bytes(b"all is well. " * 100_000)
    runs = [start(tmp_path, path, 0) for _ in range(2)]
    said = [run.communicate(timeout=60) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    assert said[0] == said[1] and said[0][1] == ""
    assert len([*cache.glob("tokens-*")]) == 1 and not leftovers(cache)


def group_is_gone(group: int, seconds: float) -> bool:
    for _ in range(int(seconds * 20)):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_stopping_leaves_no_half_folder_and_no_worker(tmp_path, cache, number):
    path = tmp_path / "long.txt"
    path.write_bytes(b"all is well. " * 200_000)
    run = start(tmp_path, path, 0.1)
    try:
        for _ in range(600):
            shards = [*cache.glob("tokens-*.partial/train-00000.npy")]
            if shards and shards[0].stat().st_size > 200_000:
                break
            time.sleep(0.02)
        else:
            pytest.fail("the workers never began")
        if number == signal.SIGINT:
            # A terminal sends Ctrl-C to every process of the group.
            os.killpg(run.pid, number)
        else:
            run.kill()
        _, said = run.communicate(timeout=30)
        assert group_is_gone(run.pid, 10)
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
    assert not [folder for folder in cache.glob("tokens-*") if folder.suffix != ".partial"]
    if number == signal.SIGINT:
        assert not leftovers(cache)
        assert said.count("Traceback") == 1 and said.rstrip().endswith("KeyboardInterrupt"), said


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 255), min_size=1, max_size=20), min_size=1, max_size=10),
    st.integers(1, 12),
    st.integers(1, 30),
)
def test_shards_hold_what_was_written(tmp_path_factory, texts, shard, piece):
    """However the stream is cut into pieces and shards."""
    folder = tmp_path_factory.mktemp("shards")
    stream = [token for text in texts for token in (*text, EOT)]
    writer = SplitWriter(folder, "train", token_dtype(257), EOT, shard)
    for i in range(0, len(stream), piece):
        writer.append(np.array(stream[i : i + piece], np.uint16), 1)
    writer.close()
    ByteTokenizer().save(folder / "tokenizer.json")
    write_manifest(folder, "key", {"name": "byte", "vocab_size": 257}, {"train": writer})
    stored = load_shards(folder, "key")
    stored.verify()
    split = stored.splits["train"]
    assert everything(split) == [EOT, *stream]
    ends = np.cumsum([0, *(len(text) + 1 for text in texts)])
    assert split.document_starts.tolist() == ends[:-1].tolist()
    assert {len(part) for part in split.shards[:-1]} <= {shard}
    with pytest.raises(DamagedShards):
        load_shards(folder, "another key")


def test_large_vocabularies_take_four_bytes():
    assert token_dtype(65_536) == np.uint16 and token_dtype(65_537) == np.uint32
    assert np.iinfo(token_dtype(65_536)).max == 65_535


def test_encoding_counts_bytes_of_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("é\n<|endoftext|>\nab")
    found = encode(ByteTokenizer(), [Span(path, 0, path.stat().st_size)])
    assert found.tokens.tolist() == [*"é".encode(), EOT, *b"ab", EOT] and found.n_bytes == 4


def test_the_manifest_describes_the_files(book):
    made = prepared(book)
    manifest = json.loads((made.folder / "manifest.json").read_text())
    assert manifest["key"] == made.fingerprint
    assert {*manifest["files"], "manifest.json"} == {path.name for path in made.folder.iterdir()}
    tokens = np.load(made.folder / "train-00000.npy")
    assert manifest["splits"]["train"]["tokens"] == len(made.train) == len(tokens)
