"""Text to token files, once; later runs find them in the cache.

    cache/
      tokens-<key>/    meta.json vocabulary.json train.npy train_documents.npy val.npy val_documents.npy

The key is a hash of the content: the sha256 of every text file, the byte ranges of the splits, and the tokenizer. So a
changed file is prepared again, and a moved one is not. `meta.json` has the sha256 of every file; they are checked at
every start, and a damaged folder is prepared again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import secrets
import shutil
import signal
import sys
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from common.errors import CHECKPOINT, DATA, DISK_OR_MEMORY, UserError, escape_control_chars
from common.files import write_atomic
from data.config import DataConfig, cache_folder
from data.corpora import Corpus, is_in_cache, open_corpus
from data.text_files import Piece, TextRange, open_text, os_reason, read_documents, sample_text
from data.token_dataset import SplitWriter, TokenSplit, load_split, token_dtype
from data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

FORMAT = 3
"""Version of the folder, the tokens and the splitting into documents; folders of another one are ignored."""
META, VOCABULARY = "meta.json", "vocabulary.json"

SAMPLE_BYTES = 32_000_000
"""Training text, evenly spread, that a vocabulary is trained on. More takes longer and changes little."""
JOB_CHARACTERS = 4 * 1024 * 1024
"""Text that is encoded at a time: large enough to make transfers between processes cheap, small enough for memory."""
PARALLEL_BYTES = 16 * 1024 * 1024
"""Smallest text, in bytes, that is worth several worker processes."""
ENCODING_SIZES = {"gpt2": 50_257, "cl100k_base": 100_277, "o200k_base": 200_019}
"""Vocabulary sizes that are known without downloading the encoding."""
TYPICAL_CHARACTERS = 97
"""Assumed size of a `char` vocabulary: an English keyboard, a newline, end-of-text."""


@dataclass(frozen=True, eq=False)
class TokenizedCorpus:
    """A corpus as tokens."""

    name: str
    folder: Path
    tokenizer: Tokenizer
    train: TokenSplit
    val: TokenSplit
    fingerprint: str
    """Equal for equal text, splits and tokenizer."""
    nats_per_document: float | None
    """Entropy of a document, if it is known (generated corpora)."""


@dataclass(frozen=True, eq=False)
class CorpusInfo:
    """What is known of a corpus without preparing it."""

    vocab_size: int
    how: str = ""
    """Where the vocabulary's size comes from, if the corpus is not prepared yet."""
    train: TokenSplit | None = None
    val: TokenSplit | None = None


class CorruptCacheError(Exception):
    """A folder of the cache is not what its `meta.json` says; it is prepared again."""


def prepare(config: DataConfig, progress: bool = True, verify: bool = True) -> TokenizedCorpus:
    """The tokens of a corpus, from the cache or made now. The same text always gives the same tokens.

    Several processes may call it at once: the first to finish provides the folder. With `verify`, every file is
    compared with its sha256 (about a second for each gigabyte); of the processes of one machine, one needs to verify,
    before the others open the files.

    Raises `UserError`: unusable text (3), a cache that cannot be written (6), an unknown tokenizer (2).
    """
    cache = cache_folder().absolute()
    with _cache_errors(cache):
        cache.mkdir(parents=True, exist_ok=True)
    corpus = open_corpus(config.source, config.val_fraction, cache)
    key = _cache_key(corpus, config, progress)
    folder = cache / f"tokens-{key}"
    for _ in range(3):
        if not os.path.lexists(folder):
            with _cache_errors(cache):
                _build(folder, key, corpus, config, progress)
        try:
            return _open(folder, key, corpus, progress, verify)
        except CorruptCacheError as error:
            message = f"{folder} is damaged ({error}); preparing it again"
            print(escape_control_chars(message), file=sys.stderr)
            # Renamed first, so that no process sees it half removed.
            with _cache_errors(cache), contextlib.suppress(FileNotFoundError):
                shutil.rmtree(folder.rename(_temporary(folder)), ignore_errors=True)
    raise UserError(f"{folder} is damaged again and again; is another program writing there?", DISK_OR_MEMORY)


def check_min_length(data: TokenizedCorpus, context: int) -> None:
    """Raise `UserError` (3) unless the training split has a full sequence, `context + 1` tokens.

    The validation split may be shorter; its only sequence is then padded.
    """
    n = len(data.train)
    if n < context + 1:
        raise UserError(
            f"the training text has {n} tokens, and a context of {context} needs {context + 1}: give it more text, or "
            f"set --model.context to {max(1, n - 1)} or less",
            DATA,
        )


def cache_lookup(config: DataConfig) -> CorpusInfo:
    """What is known of a corpus without preparing, downloading or writing anything; for `train.py --plan`.

    Raises `UserError` (2) if there is no such tokenizer.
    """
    cache = cache_folder().absolute()
    if is_in_cache(config.source, cache):
        with contextlib.suppress(UserError, CorruptCacheError):
            corpus = open_corpus(config.source, config.val_fraction, cache)
            key = _cache_key(corpus, config, progress=True)
            data = _open(cache / f"tokens-{key}", key, corpus, progress=False, verify=False)
            return CorpusInfo(data.tokenizer.vocab_size, "", data.train, data.val)
    match config.tokenizer:
        case "byte":
            return CorpusInfo(257, "256 bytes and end-of-text")
        case "bpe":
            return CorpusInfo(config.vocab_size, "as requested; a small text gives fewer")
        case "char":
            return CorpusInfo(TYPICAL_CHARACTERS, "assumed: the text's characters are not counted yet")
        case name:
            size = ENCODING_SIZES.get(name) or train_tokenizer(name, 0, ()).vocab_size
            return CorpusInfo(size, "as in tiktoken")


def available_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _open(folder: Path, key: str, corpus: Corpus, progress: bool, verify: bool) -> TokenizedCorpus:
    """Check and open a prepared folder. Raises `CorruptCacheError`."""
    try:
        meta = json.loads((folder / META).read_bytes())
        if meta["key"] != key:
            raise CorruptCacheError(f"{META} is damaged")
        hashes = {folder / name: sha256 for name, sha256 in meta["sha256"].items()}
        if missing := [path.name for path in hashes if not path.is_file()]:
            raise CorruptCacheError(f"{missing[0]} is missing")
        for path, sha256 in _hash_files(list(hashes), "checking tokens", progress).items() if verify else ():
            if sha256 != hashes[path]:
                raise CorruptCacheError(f"{path.name} has the wrong sha256")
        splits = {split: load_split(folder, split, n_bytes) for split, n_bytes in meta["text_bytes"].items()}
        tokenizer = load_tokenizer(folder / VOCABULARY)
        return TokenizedCorpus(
            corpus.name, folder, tokenizer, splits["train"], splits["val"], key, corpus.nats_per_document
        )
    except UserError as error:
        # A damaged file can be written again; an encoding that cannot be downloaded is up to the user.
        if error.exit_code == CHECKPOINT:
            raise CorruptCacheError(f"{VOCABULARY} is not a tokenizer") from error
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptCacheError(f"{META} or a file that it lists is missing or damaged") from error


def _build(folder: Path, key: str, corpus: Corpus, config: DataConfig, progress: bool) -> None:
    """Write a prepared folder under a temporary name and rename it when it is complete."""
    partial = _temporary(folder)
    partial.mkdir()
    try:
        # `char` needs all characters; a sample of the training text is enough for others.
        everything = (piece.text for text in corpus.train + corpus.val for piece in read_documents(text))
        sample = everything if config.tokenizer == "char" else sample_text(corpus.train, SAMPLE_BYTES)
        tokenizer = train_tokenizer(config.tokenizer, config.vocab_size, sample)
        tokenizer.save(partial / VOCABULARY)
        text_bytes = _write_splits(corpus, tokenizer, partial, config.workers, progress)
        if _cache_key(corpus, config, progress) != key:
            raise UserError(f"{escape_control_chars(config.source)} changed while it was prepared: start again", DATA)
        hashes = _hash_files(sorted(partial.iterdir()), "checking tokens", progress)
        meta = {"key": key, "text_bytes": text_bytes, "sha256": {path.name: sha for path, sha in hashes.items()}}
        write_atomic(partial / META, [json.dumps(meta, indent=1).encode()])
        try:
            partial.rename(folder)
        except OSError:
            # Another process may have finished first; its folder is as good.
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_splits(corpus: Corpus, tokenizer: Tokenizer, folder: Path, workers: int, progress: bool) -> dict[str, int]:
    """Encode both splits into token files; the bytes of text of each."""
    text_bytes = {}
    total = sum(text.n_bytes for text in corpus.train + corpus.val)
    workers = (workers or available_cores()) if total >= PARALLEL_BYTES else 1
    with _progress_bar("preparing tokens", total, progress) as bar:
        for split, texts in (("train", corpus.train), ("val", corpus.val)):
            writer = SplitWriter(folder, split, token_dtype(tokenizer.vocab_size), tokenizer.end_of_text)
            results = encode_all(_jobs(texts), tokenizer, folder / VOCABULARY, workers)
            with contextlib.closing(writer), contextlib.closing(results):
                for tokens, n_bytes in results:
                    writer.append(tokens, n_bytes)
                    bar.update(n_bytes)
            if not writer.n_documents:
                raise UserError(f"the {split} split of {corpus.name} contains no text: give it more", DATA)
            text_bytes[split] = writer.n_bytes
    return text_bytes


def _jobs(texts: Iterable[TextRange]) -> Iterator[list[Piece]]:
    """The documents of some texts, in lists of about `JOB_CHARACTERS`."""
    job: list[Piece] = []
    size = 0
    for text in texts:
        for piece in read_documents(text):
            job.append(piece)
            size += len(piece.text)
            if size >= JOB_CHARACTERS:
                yield job
                job, size = [], 0
    if job:
        yield job


def encode(tokenizer: Tokenizer, job: Sequence[Piece]) -> tuple[np.ndarray, int]:
    """The tokens of some documents, each followed by end-of-text, and the bytes of UTF-8 text that they encode."""
    dtype = token_dtype(tokenizer.vocab_size)
    end = np.array([tokenizer.end_of_text], dtype)
    parts = []
    for piece in job:
        parts.append(tokenizer.encode(piece.text).astype(dtype))
        if piece.ends_document:
            parts.append(end)
    return np.concatenate(parts), sum(len(piece.text.encode()) for piece in job)


def encode_all(
    jobs: Iterable[Sequence[Piece]], tokenizer: Tokenizer, vocabulary: Path, workers: int
) -> Generator[tuple[np.ndarray, int], None, None]:
    """Encode jobs in order with worker processes, which load the tokenizer from the file `vocabulary`.

    Close the generator (`contextlib.closing`) to end the workers. Raises `UserError` (6) if a worker was killed.
    """
    if workers <= 1:
        yield from (encode(tokenizer, job) for job in jobs)
        return
    busy: deque[Connection] = deque()
    with contextlib.ExitStack() as stack:
        try:
            for number, job in enumerate(jobs):
                if number < workers:
                    busy.append(stack.enter_context(_worker(vocabulary)))
                    busy[-1].send(job)
                else:
                    result = busy[0].recv()
                    busy[0].send(job)
                    busy.rotate(-1)
                    yield result
            while busy:
                yield busy.popleft().recv()
        except (EOFError, OSError) as error:
            message = "a worker process was killed while encoding text, probably for lack of memory"
            raise UserError(f"{message}: try --data.workers 1", DISK_OR_MEMORY) from error


@contextlib.contextmanager
def _worker(vocabulary: Path) -> Iterator[Connection]:
    """A process that encodes the jobs sent to it, one at a time.

    It has a pipe of its own, which closes when either side dies; in a pool with a shared queue, a worker that is killed
    while it sends a result blocks the others forever.
    """
    # Spawned, not forked: a fork of a process with threads (torch) can deadlock.
    context = multiprocessing.get_context("spawn")
    pipe, other_end = context.Pipe()
    process = context.Process(target=_encode_jobs, args=(other_end, vocabulary), daemon=True)
    # The worker inherits the blocked signal: Ctrl-C is handled by this process alone. (Starting the resource tracker,
    # which the first process would do, unblocks it.)
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    other_end.close()
    try:
        yield pipe
    finally:
        pipe.close()
        process.kill()
        process.join()


def _encode_jobs(pipe: Connection, vocabulary: Path) -> None:
    with contextlib.suppress(
        UserError, EOFError, OSError
    ):  # the run was stopped and has removed the folder or the pipe
        tokenizer = load_tokenizer(vocabulary)
        while True:
            pipe.send(encode(tokenizer, pipe.recv()))


def _cache_key(corpus: Corpus, config: DataConfig, progress: bool) -> str:
    """A hash of everything that the tokens depend on."""
    hashes = _hash_files(sorted({text.path for text in corpus.train + corpus.val}), "reading text", progress)
    content: dict[str, Any] = {
        "format": FORMAT,
        "tokenizer": config.tokenizer,
        "vocab_size": config.vocab_size if config.tokenizer == "bpe" else None,
    }
    for split, texts in (("train", corpus.train), ("val", corpus.val)):
        content[split] = [(hashes[text.path], text.start, text.end) for text in texts]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:20]


def _hash_files(paths: Sequence[Path], what: str, progress: bool) -> dict[Path, str]:
    """The sha256 of each file. Raises `UserError` (3) if one cannot be read."""
    hashes = {}
    with _progress_bar(what, sum(path.stat().st_size for path in paths if path.exists()), progress, delay=2) as bar:
        for path in paths:
            digest = hashlib.sha256()
            with open_text(path) as file:
                while block := file.read(1 << 20):
                    digest.update(block)
                    bar.update(len(block))
            hashes[path] = digest.hexdigest()
    return hashes


def _progress_bar(what: str, n_bytes: int, progress: bool, delay: float = 0) -> tqdm[Any]:
    # With `disable=None` tqdm prints nothing if stderr is not a terminal.
    disable = None if progress else True
    return tqdm(desc=what, total=n_bytes, unit="B", unit_scale=True, leave=False, disable=disable, delay=delay)


def _temporary(path: Path) -> Path:
    """A unique name next to `path`, for what is being written or removed."""
    return path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")


@contextlib.contextmanager
def _cache_errors(cache: Path) -> Iterator[None]:
    """Report a cache that is full or cannot be written as a `UserError` (6)."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write to the cache {escape_control_chars(cache)} ({os_reason(error)}): free some space, or set "
            "GLASSGPT_CACHE to another folder",
            DISK_OR_MEMORY,
        ) from error
