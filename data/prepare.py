"""Text to token files, once; later runs find them in the cache.

`tokens-<key>/` holds meta.json, vocabulary.json, and train.bin, train_documents.npy, val.bin, val_documents.npy. The key is a
hash of what the tokens depend on: the sha256 of every text, the byte ranges of the splits, and the tokenizer. The sha256 of
every file is in meta.json and checked at every start; a damaged folder is prepared again. `tokens-<key>.partial/` is unfinished.
"""

import functools
import hashlib
import itertools
import json
import math
import os
import shutil
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from common.errors import DATA, DISK_OR_MEMORY, UserError, warn
from common.files import remove_temporary_files, write_atomic
from data.config import DataConfig, cache_folder
from data.corpora import Corpus, open_corpus
from data.text_files import BLOCK_BYTES, Piece, TextRange, open_text, os_reason, read_documents
from data.token_dataset import PROGRESS, TokenSplit, load_split, token_dtype, write_split
from data.tokenizer import Tokenizer, load_tokenizer, progress_bar, train_tokenizer

FORMAT = 5  # Version of the folder, the tokens and the splitting into documents; folders of another one are ignored.
META, VOCABULARY = "meta.json", "vocabulary.json"

SAMPLE_BYTES = 16_000_000
"""Training text, evenly spread, that a `bpe` vocabulary is trained on. More takes longer and changes little."""
JOB_CHARACTERS = 1024 * 1024  # Text that a thread encodes at a time.


@dataclass(frozen=True, eq=False)
class TokenizedCorpus:
    name: str
    folder: Path
    tokenizer: Tokenizer
    train: TokenSplit
    val: TokenSplit
    fingerprint: str  # Equal for equal text, splits and tokenizer.
    nats_per_document: float | None  # Entropy of a document, if it is known (generated corpora).
    how: str = ""  # What of the user's text is held out, in words.


def prepare(config: DataConfig, progress: bool = True, verify: bool = True) -> TokenizedCorpus:
    """The tokens of a corpus, from the cache or made now. The same text always gives the same tokens.

    Several processes may call it at once: the first to finish provides the folder. With `verify`, every file is
    compared with its sha256 (about a second for each gigabyte); of the processes of one machine, one needs to verify,
    before the others open the files.

    Raises `UserError`: unusable text (3), a cache that cannot be written (6), an unknown tokenizer (2).
    """
    cache = cache_folder().absolute()
    try:
        corpus = open_corpus(config, cache)
        key = _cache_key(corpus, config, progress)
        folder = cache / f"tokens-{key}"
        if verify and folder.exists() and (damage := _find_damage(folder, key, progress)):
            warn(f"{folder} is damaged ({damage}); preparing it again")
            shutil.rmtree(folder)
        if not folder.exists():
            _build(folder, key, corpus, config, progress)
        return _open(folder, key, corpus)
    except OSError as error:
        why = f"cannot write to the cache {cache} ({os_reason(error)})"
    except UserError as error:
        if error.exit_code != DISK_OR_MEMORY:
            raise
        why = str(error)
    raise UserError(f"{why}: free some space, or set GLASSGPT_CACHE to another folder", DISK_OR_MEMORY)


def check_min_length(data: TokenizedCorpus, context: int) -> None:
    """Raise `UserError` (3) unless the training split has a full sequence. The validation split may be shorter."""
    n = len(data.train)
    if n < context + 1:
        raise UserError(
            f"the training text has {n} tokens, and a context of {context} needs {context + 1}: give it more text, or "
            f"set --model.context to {max(1, n - 1)} or less",
            DATA,
        )


def expected_vocab_size(config: DataConfig) -> tuple[int, str]:
    """Vocabulary size of a corpus that is not prepared yet, and where it comes from. Raises `UserError` (2)."""
    encodings = {"gpt2": 50_257, "cl100k_base": 100_277, "o200k_base": 200_019}  # known without a download
    match config.tokenizer:
        case "byte":
            return 257, "256 bytes and end-of-text"
        case "bpe":
            return config.vocab_size, "the largest possible; a small text gives fewer"
        case "char":
            return 97, "assumed: an English keyboard, a newline, end-of-text"
        case name:
            where = "the tokenizer of that folder" if os.path.isdir(name) else "as in tiktoken"
            return encodings.get(name) or train_tokenizer(name, config.vocab_size, ()).vocab_size, where


def _cache_key(corpus: Corpus, config: DataConfig, progress: bool = False) -> str:
    """A hash of everything that the tokens depend on. Raises `UserError` (3) if a text cannot be read."""
    texts = corpus.train + corpus.val
    with progress_bar("reading the text", sum(text.n_bytes for text in texts), progress) as bar:
        hashes = {path: _sha256(path, bar) for path in {text.path for text in texts}}
    vocab_size, name = config.vocab_size if config.tokenizer == "bpe" else None, config.tokenizer
    if os.path.isdir(name):
        name = train_tokenizer(name, config.vocab_size, ()).fingerprint()
    content: dict[str, Any] = {"format": FORMAT, "tokenizer": name, "vocab_size": vocab_size}
    for split, texts in (("train", corpus.train), ("val", corpus.val)):
        content[split] = [(hashes[text.path], text.start, text.end) for text in texts]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:20]


def _sha256(path: Path, bar: tqdm) -> str:
    digest = hashlib.sha256()
    with open_text(path) as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


def _find_damage(folder: Path, key: str, progress: bool = False) -> str:
    """What is wrong with a prepared folder; empty if nothing is."""
    try:
        meta = json.loads((folder / META).read_bytes())
        with progress_bar("checking the prepared tokens", None, progress) as bar:
            wrong = [name for name, sha256 in meta["sha256"].items() if _sha256(folder / name, bar) != sha256]
        wrong += [META] if meta["key"] != key else []
        return f"{wrong[0]} has changed" if wrong else ""
    except UserError as error:
        return str(error)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{META} cannot be read"


def _open(folder: Path, key: str, corpus: Corpus) -> TokenizedCorpus:
    text_bytes = json.loads((folder / META).read_bytes())["text_bytes"]
    tokenizer = load_tokenizer(folder / VOCABULARY)
    dtype = token_dtype(tokenizer.vocab_size)
    train, val = (load_split(folder, split, dtype, text_bytes[split]) for split in ("train", "val"))
    return TokenizedCorpus(corpus.name, folder, tokenizer, train, val, key, corpus.nats_per_document, corpus.how)


def _build(folder: Path, key: str, corpus: Corpus, config: DataConfig, progress: bool) -> None:
    """Write a folder under a temporary name, where what a killed process has written is continued; rename it at the end."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial, lock = folder.with_name(f"{folder.name}.partial"), FileLock(folder.with_name(f"{folder.name}.lock"))
    with lock:
        try:
            if not folder.exists():
                _write_folder(partial, key, corpus, config, progress)
                partial.rename(folder)
        except (OSError, UserError):  # a full disk, or a text that cannot be used
            shutil.rmtree(partial, ignore_errors=True)
            raise
        finally:
            Path(lock.lock_file).unlink(missing_ok=True)


def _write_folder(folder: Path, key: str, corpus: Corpus, config: DataConfig, progress: bool) -> None:
    folder.mkdir(exist_ok=True)
    if not (folder / VOCABULARY).exists():
        write_atomic(folder / VOCABULARY, [_train_tokenizer(corpus, config, progress).to_json()])
    tokenizer = load_tokenizer(folder / VOCABULARY)
    text_bytes = {}
    total = sum(text.n_bytes for text in corpus.train + corpus.val)
    with progress_bar("preparing tokens", total, progress) as bar:
        for split, texts in (("train", corpus.train), ("val", corpus.val)):
            encode_from = functools.partial(encode_all, texts, tokenizer)
            n_documents, text_bytes[split] = write_split(folder, split, encode_from, tokenizer, bar)
            if not n_documents:
                raise UserError(f"the {split} split of {corpus.name} contains no text: give it more", DATA)
    if _cache_key(corpus, config, progress) != key:
        raise UserError(f"{config.source} changed while it was prepared: start again", DATA)
    for path in folder.glob(f"*{PROGRESS}"):
        path.unlink()
    remove_temporary_files(folder)
    with progress_bar("checking the prepared tokens", None, progress) as bar:
        hashes = {path.name: _sha256(path, bar) for path in sorted(folder.iterdir())}
    write_atomic(
        folder / META, [json.dumps({"key": key, "text_bytes": text_bytes, "sha256": hashes}, indent=1).encode()]
    )


def _train_tokenizer(corpus: Corpus, config: DataConfig, progress: bool) -> Tokenizer:
    """`char` needs all characters; for `bpe` a sample of the training text is enough."""
    is_char = config.tokenizer == "char"
    texts = sample_text(corpus.train + corpus.val, math.inf) if is_char else sample_text(corpus.train, SAMPLE_BYTES)
    return train_tokenizer(config.tokenizer, config.vocab_size, texts, progress)


def sample_text(texts: Sequence[TextRange], n_bytes: float) -> Iterator[str]:
    """About `n_bytes` of the text, in pieces spread evenly over it; all of it if there is no more."""
    share = min(1.0, n_bytes / max(1, sum(text.n_bytes for text in texts)))
    read = taken = 0
    for text in texts:
        for piece in read_documents(text):
            if taken <= share * read:
                yield piece.text
                taken += len(piece.text)
            read += len(piece.text)


def encode_all(texts: Iterable[TextRange], tokenizer: Tokenizer, first: int = 0) -> Iterator[tuple[np.ndarray, int]]:
    """The tokens of texts in order, a megabyte at a time from the `first` on, and the bytes of UTF-8 text that they encode.

    Threads are enough to use all cores, because tiktoken releases Python's lock.
    """
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        pending: deque[Future[tuple[np.ndarray, int]]] = deque()
        try:
            for job in itertools.islice(_jobs(texts), first, None):
                pending.append(pool.submit(encode, tokenizer, job))
                if len(pending) > 2 * workers:
                    yield pending.popleft().result()
            yield from (future.result() for future in pending)
        finally:  # after a signal, wait for the running jobs alone
            pool.shutdown(wait=False, cancel_futures=True)


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
