"""The corpora that go by a name: the two that are generated, stories and repeats, and Tiny Shakespeare.

Where this stands: `corpus.py` asks for their files; they are written or downloaded into the cache once.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import secrets
import shutil
import urllib.request
from pathlib import Path

from common.errors import DATA, DISK_OR_MEMORY, UserError, escape_control_chars
from data import repeated_tokens as repeats
from data import stories
from data.documents import reading, reason

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_BYTES = 1_115_394
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

_TIMEOUT_SECONDS = 20


GENERATED = {"stories": stories, "repeats": repeats}
"""Corpora that are made here; each knows its `version`, its `entropy`, and how to `write` itself."""


def generated_files(name: str, cache: Path) -> tuple[Path, Path]:
    """The files of the training and of the validation text of a generated corpus, written the first time.

    Raises `UserError` (6) when the cache cannot be written.
    """
    corpus = GENERATED[name]
    folder = cache / f"{name}-{corpus.version()}"
    if not folder.is_dir():
        partial = _partial(folder)
        try:
            partial.mkdir(parents=True)
            corpus.write(partial)
            partial.rename(folder)
        except OSError as error:
            # When another process was first, its text is as good as ours.
            if not folder.is_dir():
                raise _unwritable(cache, error) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder / "train.txt", folder / "val.txt"


def generated_entropy(name: str) -> float:
    """Entropy of a document of a generated corpus, in nats."""
    return GENERATED[name].entropy()


def shakespeare_file(cache: Path) -> Path:
    """Tiny Shakespeare, downloaded unless it is there; its sha256 is checked in either case.

    Raises `UserError`: it cannot be had, or another text lies in its place (3), or the cache cannot be
    written (6).
    """
    path = cache / "tinyshakespeare.txt"
    if not path.exists():
        data = _download(path)
        partial = _partial(path)
        try:
            cache.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(data)
            partial.replace(path)
        except OSError as error:
            raise _unwritable(cache, error) from error
        finally:
            with contextlib.suppress(OSError):
                partial.unlink()
    with reading(path) as file:
        if _is_shakespeare(file.read(SHAKESPEARE_BYTES + 1)):
            return path
    raise UserError(
        f"{escape_control_chars(path)} is not Tiny Shakespeare (its sha256 differs): delete it, and it is fetched again",
        DATA,
    )


def _partial(path: Path) -> Path:
    """A name beside `path` that no other process takes."""
    return path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")


def _is_shakespeare(data: bytes) -> bool:
    return hashlib.sha256(data).hexdigest() == SHAKESPEARE_SHA256


def _download(path: Path) -> bytes:
    try:
        with urllib.request.urlopen(SHAKESPEARE_URL, timeout=_TIMEOUT_SECONDS) as answer:
            data: bytes = answer.read(SHAKESPEARE_BYTES + 1)
    except (OSError, ValueError, http.client.HTTPException) as error:
        why = reason(error)
    else:
        if _is_shakespeare(data):
            return data
        why = f"{len(data)} bytes came, and they are not the text"
    raise UserError(
        f"cannot download Tiny Shakespeare ({why}): fetch {SHAKESPEARE_URL} by other means and put it at "
        f"{escape_control_chars(path)}, or take --data.source stories, which needs no network",
        DATA,
    )


def _unwritable(cache: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot write to the cache {escape_control_chars(cache)} ({reason(error)}): make room or rights there, or let "
        "the environment variable GLASSGPT_CACHE name another folder",
        DISK_OR_MEMORY,
    )
