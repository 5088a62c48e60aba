"""From text to token shards on disk, once; a second run finds them and starts at once.

Where this stands: `corpus.py` says which stretches of which files are text, `tokenizer.py` turns text into
ids, `encoding.py` runs the one over the other in several processes, and `shards.py` and `manifest.py` are what is left
on disk. This file calls them in order and keeps the cache. `batches.py` reads on from there.

    cache/
      tokens-<key>/            manifest.json tokenizer.json train-00000.npy ... train-documents.npy val-...
      sources-<paths>.json     sha256 of the text files by size and time, so that they need not be read again

The key names the content: the sha256 of every file of text, where the splits lie in them, and the tokenizer
asked for. So a changed file is prepared anew; one that was only moved is not.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from common.errors import CHECKPOINT, DATA, DISK_OR_MEMORY, UserError, escape_control_chars
from data.config import DataConfig, cache_folder
from data.corpora import Corpus, open_corpus
from data.documents import jobs, read_documents, sample
from data.encoding import JOB_BYTES, encode_all, size_of
from data.held import DamagedShards, read_small
from data.manifest import FORMAT, TOKENIZER, load_shards, seal, unseal, write_manifest
from data.token_dataset import SplitWriter, TokenSplit, token_dtype
from data.tokenizer import Tokenizer, train_tokenizer
from data.tokenizer import load_tokenizer as load

Stamp = tuple[int, int, int]
"""Size of a file, time of the last change of its content, and of its entry; nanoseconds."""

SAMPLE_BYTES = 32_000_000
"""Training text, evenly spread, that a vocabulary is learned from. More takes longer and changes little."""

_ABANDONED_AFTER = 24 * 3600
"""Seconds after which something half-written must belong to a process that was killed."""
_SETTLED_AFTER = 2 * 10**9
"""Nanoseconds after which another change of a file surely gets another time stamp."""
_PATIENCE = 2.0
"""Seconds that looking through the tokens may take before a progress bar tells of it."""
_LARGEST_INDEX = 256 * 1024 * 1024


@dataclass(frozen=True, eq=False)
class TokenizedCorpus:
    """A corpus as tokens, ready to be cut into batches."""

    name: str
    folder: Path
    tokenizer: Tokenizer
    train: TokenSplit
    val: TokenSplit
    fingerprint: str
    """Equal for equal text, splits and tokenizer, wherever the files lie."""
    nats_per_document: float | None
    """The corpus's true entropy where it is known (stories)."""


def prepare(config: DataConfig, progress: bool = True, verify: bool = True) -> TokenizedCorpus:
    """The tokens of a corpus: found in the cache, or made there. The same text gives the same tokens every time.

    Several processes may do this at once; the first to finish gives the folder its name and the others use
    it. With `verify`, every file is compared with its sha256, for a flipped bit must not be learned from; about a
    second for each gigabyte. What is damaged is named on stderr and prepared again.

    Of the processes that share a machine only one needs to verify. The others have to wait until it is done before
    they call this: they would go on with damaged files that they hold open already.

    Raises `UserError`: text that cannot be used (3), a cache that cannot be written (6), an unknown tokenizer (2).
    """
    cache = cache_folder().absolute()
    with _storage(cache):
        cache.mkdir(parents=True, exist_ok=True)
        corpus = open_corpus(config.source, config.val_fraction, cache)
    stamps = {path: stamp_of(path) for path in sorted({span.path for span in corpus.train + corpus.val})}
    key = cache_key(corpus, _contents(stamps, cache, progress), config)
    folder = cache / f"tokens-{key}"
    for _ in range(3):
        if not os.path.lexists(folder):
            with _storage(cache):
                _build(folder, key, corpus, config, stamps, progress)
        try:
            return _open(folder, key, corpus, progress, verify)
        except DamagedShards as damage:
            print(
                f"{escape_control_chars(folder)} is damaged: {escape_control_chars(damage)}; preparing again",
                file=sys.stderr,
            )
            with _storage(cache):
                _remove(folder)
    raise UserError(f"{folder} is damaged again and again; is another program writing there?", DISK_OR_MEMORY)


def check_min_length(prepared: TokenizedCorpus, context: int) -> None:
    """Raise `UserError` (3) unless the text is long enough to train with this context.

    Training needs one full window, `context + 1` tokens. The validation split may be shorter: its only window
    is then filled up, and the filling ignored.
    """
    found = len(prepared.train)
    if found < context + 1:
        raise UserError(
            f"the training text is {found} tokens long, and a context of {context} needs {context + 1}: "
            f"give it more text, or set --model.context to {max(1, found - 1)} or less",
            DATA,
        )


def _open(folder: Path, key: str, corpus: Corpus, progress: bool, verify: bool) -> TokenizedCorpus:
    stored = load_shards(folder, key)
    if verify:
        with _bar("checking tokens", stored.n_bytes, progress, _PATIENCE) as bar:
            stored.verify(bar.update)
    try:
        tokenizer = load(folder / TOKENIZER)
    except UserError as error:
        # A damaged file can be made again; an encoding that cannot be fetched is for the user to mend.
        if error.exit_code == CHECKPOINT:
            raise DamagedShards(f"{TOKENIZER} holds no tokenizer") from error
        raise
    splits = stored.splits
    if splits.keys() != {"train", "val"} or any(s.vocab_size != tokenizer.vocab_size for s in splits.values()):
        raise DamagedShards("its tokens belong to other splits or to another tokenizer")
    train, val = splits["train"], splits["val"]
    return TokenizedCorpus(corpus.name, folder, tokenizer, train, val, key, corpus.nats_per_document)


def _build(
    folder: Path, key: str, corpus: Corpus, config: DataConfig, stamps: dict[Path, Stamp], progress: bool
) -> None:
    """Write a prepared folder beside its place and rename it into place whole."""
    _sweep(folder.parent)
    partial = _partial(folder)
    partial.mkdir()
    try:
        tokenizer = train_tokenizer(config.tokenizer, config.vocab_size, _texts(corpus, config.tokenizer))
        tokenizer.save(partial / TOKENIZER)
        splits = _encode(corpus, tokenizer, partial, config.workers, progress)
        for path, stamp in stamps.items():
            if stamp_of(path) != stamp:
                raise UserError(f"{path} was changed while it was being prepared: start again", DATA)
        write_manifest(partial, key, {"name": tokenizer.name, "vocab_size": tokenizer.vocab_size}, splits)
        try:
            partial.rename(folder)
        except OSError:
            # Somebody else was first. Theirs is as good as ours.
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _texts(corpus: Corpus, tokenizer: str) -> Iterator[str]:
    """What a tokenizer may learn from: a sample of the training text, or for `char` all the text there is."""
    if tokenizer == "char":
        return (piece.text for span in corpus.train + corpus.val for piece in read_documents(span))
    return sample(corpus.train, SAMPLE_BYTES)


def _encode(corpus: Corpus, tokenizer: Tokenizer, folder: Path, workers: int, progress: bool) -> dict[str, SplitWriter]:
    """Write the shards of both splits; their writers come back closed."""
    spans = {"train": corpus.train, "val": corpus.val}
    dtype = token_dtype(tokenizer.vocab_size)
    work = [(split, job) for split in spans for job in jobs(spans[split], JOB_BYTES)]
    total = sum(size_of(job) for _, job in work)
    with contextlib.ExitStack() as stack:
        splits = {}
        for split in spans:
            splits[split] = SplitWriter(folder, split, dtype, tokenizer.end_of_text)
            stack.callback(splits[split].abandon)
        results = encode_all([job for _, job in work], tokenizer, folder / TOKENIZER, workers)
        stack.enter_context(contextlib.closing(results))
        bar = stack.enter_context(_bar("preparing tokens", total, progress))
        for (split, job), encoded in zip(work, results, strict=True):
            splits[split].append(encoded.tokens, encoded.n_bytes)
            bar.update(size_of(job))
        for writer in splits.values():
            writer.close()
    for split, writer in splits.items():
        if not writer.documents.length:
            raise UserError(f"the {split} split of {corpus.name} holds no text: give it more", DATA)
    return splits


def cache_key(corpus: Corpus, contents: dict[Path, str], config: DataConfig) -> str:
    """A name for what is to be prepared. Paths and the fraction asked for are not in it, but what they lead
    to is.
    """
    described: dict[str, Any] = {
        "format": FORMAT,
        "tokenizer": config.tokenizer,
        "vocab_size": config.vocab_size if config.tokenizer == "bpe" else None,
    }
    for split, spans in (("train", corpus.train), ("val", corpus.val)):
        described[split] = [(contents[s.path], s.start, s.end, s.starts_document, s.ends_document) for s in spans]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:20]


def _contents(stamps: dict[Path, Stamp], cache: Path, progress: bool) -> dict[Path, str]:
    """The sha256 of each file. One that has the size and times of an earlier reading is not read again."""
    index = index_of(stamps, cache)
    found = known_contents(stamps, index)
    unread = [path for path in stamps if path not in found]
    if not unread:
        return found
    now = time.time_ns()
    with _bar("reading text", sum(stamps[path][0] for path in unread), progress) as bar:
        for path in unread:
            found[path] = sha256_of(path, bar)
    # A file written this very moment could change once more within the same time stamp: look again next time.
    settled = [path for path, stamp in stamps.items() if max(stamp[1:]) < now - _SETTLED_AFTER]
    _write_index(index, [(str(path), stamps[path], found[path]) for path in settled])
    return found


def index_of(stamps: dict[Path, Stamp], cache: Path) -> Path:
    """The list of what these files held, by size and times."""
    paths = "\0".join(map(str, stamps)).encode("utf-8", "surrogateescape")
    return cache / f"sources-{hashlib.sha256(paths).hexdigest()[:16]}.json"


def known_contents(stamps: dict[Path, Stamp], index: Path) -> dict[Path, str]:
    """The sha256 of the files that have not changed since they were put on the list."""
    known = _read_index(index)
    return {path: known[str(path), stamp] for path, stamp in stamps.items() if (str(path), stamp) in known}


def sha256_of(path: Path, bar: tqdm[Any]) -> str:
    """The sha256 of a text file."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
                bar.update(len(block))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", DATA) from error
    return digest.hexdigest()


def stamp_of(path: Path) -> Stamp:
    """By what a file is known again without being read."""
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", DATA) from error
    # The last of the three is one that no program can set back.
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _read_index(index: Path) -> dict[tuple[str, Stamp], str]:
    """(path, stamp) -> sha256. An index that cannot be read is an empty one: all it does is save time."""
    try:
        known = unseal(read_small(index, _LARGEST_INDEX))["known"]
        return {(path, (size, changed, entry)): digest for path, (size, changed, entry), digest in known}
    except (OSError, DamagedShards, ValueError, KeyError, TypeError, RecursionError):
        return {}


def _write_index(index: Path, known: list[tuple[str, Stamp, str]]) -> None:
    # A cache that cannot be written may still hold the tokens, so this is no error here.
    with contextlib.suppress(OSError):
        partial = _partial(index)
        partial.write_bytes(seal({"known": known}))
        partial.replace(index)


def _bar(what: str, n_bytes: int, progress: bool, delay: float = 0) -> tqdm[Any]:
    # With `disable=None` tqdm keeps quiet where stderr is no terminal.
    disable = None if progress else True
    return tqdm(desc=what, total=n_bytes, unit="B", unit_scale=True, leave=False, disable=disable, delay=delay)


def _partial(path: Path) -> Path:
    """A name beside `path` that nobody else uses, for what is being written or removed."""
    return path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")


def _sweep(cache: Path) -> None:
    """Remove what processes that were killed left behind."""
    for partial in cache.glob("*.partial"):
        with contextlib.suppress(OSError):
            if time.time() - partial.stat().st_mtime > _ABANDONED_AFTER:
                _remove(partial)


def _remove(path: Path) -> None:
    """Remove a folder or a file; it loses its name first, so that nobody meets it half removed."""
    doomed = _partial(path)
    with contextlib.suppress(FileNotFoundError):
        path.rename(doomed)
        if doomed.is_dir() and not doomed.is_symlink():
            shutil.rmtree(doomed)
        else:
            doomed.unlink()


@contextlib.contextmanager
def _storage(cache: Path) -> Iterator[None]:
    """Tell the user of a cache that is full or may not be written."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write to the cache {cache} ({error.strerror or error}): make room there, or let "
            "GLASSGPT_CACHE name another folder",
            DISK_OR_MEMORY,
        ) from error
