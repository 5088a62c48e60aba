"""The manifest of a prepared folder: what lies in it; written last, and believed only as far as it can be checked.

Where this stands: `prepare.py` writes a manifest once the shards are done, and reads it at every later start. A folder
may have come from a disk that forgets, or from somebody else, so nothing in a manifest is taken for granted: names have
to be the ones that `SplitWriter` gives, every number is held against the files, and all that can come of a folder that
says otherwise is `DamagedShards`. Nothing in it is ever executed, and no number in it decides how much is loaded.

The last entry is the sha256 of everything before it, so that a flipped bit in the manifest itself is noticed too.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import DISK_OR_MEMORY, UserError
from data.held import ChecksummedFile, DamagedShards, read_small
from data.token_dataset import (
    ShardFile,
    SplitWriter,
    TokenSplit,
    documents_name,
    load_document_starts,
    reach_disk,
    shard_name,
    token_dtype,
)

FORMAT = 2
"""Of the folder, the stream and the cutting of documents. Changing any of them makes old folders be ignored."""

MANIFEST, TOKENIZER = "manifest.json", "tokenizer.json"

_LARGEST = 4 * 1024 * 1024
"""Bytes of a manifest that are read at most: enough for some 20,000 shards."""


@dataclass(frozen=True, eq=False)
class Stored:
    """A prepared folder that is laid out as its manifest says; its files are held open."""

    splits: dict[str, TokenSplit]
    files: tuple[ChecksummedFile, ...]

    @property
    def n_bytes(self) -> int:
        return sum(file.size for file in self.files)

    def verify(self, told: Callable[[int], object] = lambda n_bytes: None) -> None:
        """Compare every file with its sha256, telling `told` the bytes of each block that was read.

        Raises `DamagedShards`.
        """
        with _only_damage():
            for file in self.files:
                file.verify(told)


def write_manifest(folder: Path, key: str, tokenizer: dict[str, object], splits: dict[str, SplitWriter]) -> None:
    """Describe a folder of finished splits. Written last: a folder without a manifest is not finished."""
    described = {
        name: {
            "tokens": writer.n_tokens,
            "documents": writer.documents.length,
            "text_bytes": writer.n_bytes,
            "dtype": writer.dtype.str,
            "shards": [{"name": shard.path.name, "tokens": shard.length} for shard in writer.shards],
            "document_starts": writer.documents.path.name,
        }
        for name, writer in splits.items()
    }
    files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(folder.iterdir())}
    manifest = {"format": FORMAT, "key": key, "tokenizer": tokenizer, "splits": described, "files": files}
    with (folder / MANIFEST).open("wb") as file:
        file.write(seal(manifest))
        reach_disk(file)


def load_shards(folder: Path, key: str) -> Stored:
    """Open a prepared folder, once its layout, sizes and headers are what its manifest says.

    Raises `DamagedShards`, which says what is wrong, or `UserError` (6) when so many files cannot be held open.
    """
    with _only_damage():
        manifest = unseal(read_small(folder / MANIFEST, _LARGEST))
        if manifest["format"] != FORMAT or manifest["key"] != key:
            raise DamagedShards("its manifest belongs to something else")
        vocab_size = _count(manifest["tokenizer"]["vocab_size"], 1)
        names = {TOKENIZER}
        for split, entry in manifest["splits"].items():
            names |= _names(split, entry)
        if manifest["files"].keys() != names:
            raise DamagedShards("its manifest lists other files than its splits have")
        files = {
            name: ChecksummedFile(folder / name, _count(entry["bytes"]), entry["sha256"])
            for name, entry in manifest["files"].items()
        }
        splits = {name: _load_split(name, entry, files, vocab_size) for name, entry in manifest["splits"].items()}
        return Stored(splits, tuple(files.values()))


def _names(split: str, entry: Mapping[str, Any]) -> set[str]:
    """The files of a split, which cannot have other names than `SplitWriter` gives."""
    names = [shard_name(split, number) for number in range(len(entry["shards"]))]
    known = split.isascii() and split.isalpha() and [shard["name"] for shard in entry["shards"]] == names
    if not known or entry["document_starts"] != documents_name(split):
        raise DamagedShards("its manifest names files that no split has")
    return {*names, documents_name(split)}


def _load_split(
    name: str, entry: Mapping[str, Any], files: Mapping[str, ChecksummedFile], vocab_size: int
) -> TokenSplit:
    dtype = token_dtype(vocab_size)
    lengths = [_count(shard["tokens"], 1) for shard in entry["shards"]]
    if entry["dtype"] != dtype.str or _count(entry["tokens"], 1) != sum(lengths):
        raise DamagedShards("its shards do not add up")
    shards = tuple(ShardFile(files[shard_name(name, i)], dtype, length) for i, length in enumerate(lengths))
    documents = ShardFile(files[documents_name(name)], np.dtype("<i8"), _count(entry["documents"], 1))
    starts = load_document_starts(documents, sum(lengths))
    return TokenSplit(shards, starts, _count(entry["text_bytes"]), vocab_size)


def _count(value: object, least: int = 0) -> int:
    """A number of things: in JSON it could as well be a text, a fraction, `true`, or have a thousand digits."""
    if type(value) is not int or not least <= value < 1 << 63:
        raise DamagedShards("its manifest counts in something else than numbers")
    return value


@contextlib.contextmanager
def _only_damage() -> Iterator[None]:
    """Let whatever a folder can do wrong be `DamagedShards`, but for what is no fault of the folder."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise UserError(
                f"cannot hold all files of the prepared text open ({error.strerror}): allow more of them with "
                "`ulimit -n 65536`, or free memory",
                DISK_OR_MEMORY,
            ) from error
        raise DamagedShards(str(error)) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedShards(f"{type(error).__name__}: {error}") from error


def seal(value: dict[str, Any]) -> bytes:
    """`value` as JSON, with the sha256 of everything before it as its last entry."""
    assert value
    body = json.dumps(value, indent=1).encode().removesuffix(b"\n}")
    return body + _last_entry(body)


def unseal(data: bytes) -> Any:
    """What `seal` wrote, without knowing yet what is in it. Raises ValueError for anything else, or RecursionError."""
    body = data[: max(0, data.rfind(b",\n"))]
    if data != body + _last_entry(body):
        raise ValueError("it does not have its own sha256")
    return json.loads(data)


def _last_entry(body: bytes) -> bytes:
    return f',\n "sha256": "{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
