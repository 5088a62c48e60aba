"""Corpora: which text is for training and which for validation.

    stories        generated stories whose entropy is known, written to the cache once
    repeats        random letters, repeated, whose entropy is known too (`repeated_tokens.py`)
    shakespeare    Tiny Shakespeare, 1.1 MB, downloaded once
    book.txt       any one file of UTF-8 text
    texts/         the prose in a folder: .txt .text .md .markdown .rst .tex .org, nothing hidden
    'src/**/*.py'  all files that a glob matches, whatever their suffix

A file or folder that has the name of a corpus is given as `./stories`. To add a generated corpus: a module with
`documents(split)` and `entropy()`, and a line in `GENERATED`.
"""

from __future__ import annotations

import hashlib
import http.client
import inspect
import mmap
import os
import re
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import DATA, UserError, escape_control_chars
from common.files import write_atomic
from data import repeated_tokens, stories, story_grammar
from data.text_files import SEPARATOR, TextRange, find_files, open_text, os_reason

GENERATED = {"stories": stories, "repeats": repeated_tokens}
"""Generated corpora."""
NAMED = (*GENERATED, "shakespeare")
"""The values of `--data.source` that are no text of the user's own."""
SHAKESPEARE_VAL_FRACTION = 0.1
"""The last tenth is the validation split, as in nanoGPT, so that losses are comparable."""
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_FILE = "tinyshakespeare.txt"
SHAKESPEARE_BYTES = 1_115_394
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

_TIMEOUT_SECONDS = 20
# A separator before a document with text: white space follows, then anything but another separator.
_DOCUMENT_START = re.compile(rb"\r?\n%b\r?\n\s*(?!%b)\S" % ((re.escape(SEPARATOR.encode()),) * 2))


@dataclass(frozen=True)
class Corpus:
    """Text for training and for validation."""

    name: str
    train: tuple[TextRange, ...]
    val: tuple[TextRange, ...]
    nats_per_document: float | None = None
    """Entropy of a document, if it is known: no model can reach a lower mean loss per document."""


def open_corpus(source: str, val_fraction: float, cache: Path) -> Corpus:
    """Find the text of `--data.source` and hold out `val_fraction` (0 to 1) of its bytes for validation.

    Several files: whole files are held out, selected by a hash of their names. One file: its last documents, or the end
    of a long one. A named corpus has a split of its own. `cache` is the folder for what is generated or downloaded.

    Raises `UserError`: no text, or text that cannot be read (3); a cache that cannot be written (6).
    """
    if source in GENERATED:
        train, val = map(_whole_file, generated_files(source, cache))
        return Corpus(source, (train,), (val,), GENERATED[source].entropy())
    if source == "shakespeare":
        train, val = _split_file(download_shakespeare(cache), SHAKESPEARE_VAL_FRACTION)
        return Corpus(source, (train,), (val,))
    files = find_files(source)
    if len(files) == 1:
        train, val = _split_file(files[0], val_fraction)
        return Corpus(source, (train,), (val,))
    texts = [_whole_file(path) for path in files]
    held_out = _select_files(texts, val_fraction)
    return Corpus(source, tuple(t for t in texts if t not in held_out), tuple(t for t in texts if t in held_out))


def is_in_cache(source: str, cache: Path) -> bool:
    """Whether `open_corpus` has nothing to generate and nothing to download."""
    if source in GENERATED:
        return (_generated_folder(source, cache) / "val.txt").exists()  # written last
    return source != "shakespeare" or (cache / SHAKESPEARE_FILE).exists()


def _generated_folder(name: str, cache: Path) -> Path:
    """A folder for the texts that the present code generates."""
    code = "".join(inspect.getsource(module) for module in (*GENERATED.values(), story_grammar))
    return cache / f"{name}-{hashlib.sha256(code.encode()).hexdigest()[:12]}"


def generated_files(name: str, cache: Path) -> tuple[Path, Path]:
    """Training and validation file of a generated corpus, written the first time. Raises `UserError` (6)."""
    folder = _generated_folder(name, cache)
    for split in ("train", "val"):
        if not (folder / f"{split}.txt").exists():
            text = f"\n{SEPARATOR}\n".join(GENERATED[name].documents(split))
            write_atomic(folder / f"{split}.txt", [text.encode()])
    return folder / "train.txt", folder / "val.txt"


def download_shakespeare(cache: Path) -> Path:
    """Tiny Shakespeare, downloaded if it is not in the cache; its sha256 is checked in either case.

    Raises `UserError`: there is no such text, or a different one (3); the cache cannot be written (6).
    """
    path = cache / SHAKESPEARE_FILE
    try:
        if path.exists():
            data = path.read_bytes()
        else:
            with urllib.request.urlopen(SHAKESPEARE_URL, timeout=_TIMEOUT_SECONDS) as response:
                data = response.read(SHAKESPEARE_BYTES + 1)
    except (OSError, ValueError, http.client.HTTPException) as error:
        why = os_reason(error)
    else:
        if hashlib.sha256(data).hexdigest() == SHAKESPEARE_SHA256:
            if not path.exists():
                write_atomic(path, [data])
            return path
        why = f"its sha256 differs, {len(data)} bytes"
    raise UserError(
        f"cannot use or download Tiny Shakespeare ({why}): download {SHAKESPEARE_URL} by other means to "
        f"{escape_control_chars(path)}, or use --data.source stories, which needs no network",
        DATA,
    )


def _whole_file(path: Path) -> TextRange:
    with open_text(path) as file:
        return TextRange(path, 0, os.fstat(file.fileno()).st_size)


def _select_files(texts: Sequence[TextRange], val_fraction: float) -> set[TextRange]:
    """Some of several files, at least one and never all, with about `val_fraction` of the bytes.

    The choice depends on the names below the common folder alone, not on the file system or the folder's place.
    """
    common = os.path.commonpath([text.path.parent for text in texts])

    def name_hash(text: TextRange) -> bytes:
        name = Path(os.path.relpath(text.path, common)).as_posix()
        return hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()

    missing = val_fraction * sum(text.n_bytes for text in texts)
    selected: list[TextRange] = []
    for text in sorted(texts, key=name_hash):
        # Selected if it brings the sum nearer to the target and leaves another file to train on.
        if text.n_bytes < 2 * missing and len(selected) < len(texts) - 1:
            selected.append(text)
            missing -= text.n_bytes
    return set(selected or [min(texts, key=lambda text: text.n_bytes)])


def _split_file(path: Path, val_fraction: float) -> tuple[TextRange, TextRange]:
    """Hold out the documents that start in the last `val_fraction` of a file; if none does, that part of the last."""
    with open_text(path) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        size = len(data)
        cut = min(int(size * (1 - val_fraction)), size - 1)
        if start := _DOCUMENT_START.search(data, cut):
            cut = start.start()
        else:
            while cut and data[cut] & 0xC0 == 0x80:  # inside of a character
                cut -= 1
    return TextRange(path, 0, cut), TextRange(path, cut, size)
