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
import os
import urllib.request
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from common.errors import DATA, DISK_OR_MEMORY, UserError, escape_control_chars
from common.files import write_atomic
from data import repeated_tokens, stories, story_grammar
from data.text_files import (
    SEPARATOR,
    TextRange,
    character_start,
    find_files,
    find_separators,
    has_text,
    open_text,
    os_reason,
    whole_file,
)

GENERATED = {"stories": stories, "repeats": repeated_tokens}
"""Generated corpora."""
SHAKESPEARE_VAL_FRACTION = 0.1
"""The last tenth is the validation split, as in nanoGPT, so that losses are comparable."""
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_FILE = "tinyshakespeare.txt"
SHAKESPEARE_BYTES = 1_115_394
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

_TIMEOUT_SECONDS = 20
_STEP_BYTES = 1024 * 1024


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

    Several files: whole files are held out, selected by a hash of their names. One file with separators: its last
    documents. Otherwise the end of the text. A named corpus has a split of its own. `cache` is the folder for what is
    generated or downloaded.

    Raises `UserError`: no text, or text that cannot be read (3); a cache that cannot be written (6).
    """
    if source in GENERATED:
        train, val = map(whole_file, generated_files(source, cache))
        return Corpus(source, (train,), (val,), GENERATED[source].entropy())
    if source == "shakespeare":
        train, val = _split_file(whole_file(download_shakespeare(cache)), SHAKESPEARE_VAL_FRACTION)
        return Corpus(source, (train,), (val,))
    texts = [whole_file(path) for path in find_files(source)]
    if len(texts) == 1:
        train, val = _split_file(texts[0], val_fraction)
        return Corpus(source, (train,), (val,))
    held_out = _select_files(texts, val_fraction)
    train_files, val_files = ([t for t in texts if (t in held_out) == wanted] for wanted in (False, True))
    return Corpus(source, tuple(train_files), tuple(val_files))


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
            _write(folder / f"{split}.txt", f"\n{SEPARATOR}\n".join(GENERATED[name].documents(split)).encode())
    return folder / "train.txt", folder / "val.txt"


def download_shakespeare(cache: Path) -> Path:
    """Tiny Shakespeare, downloaded if it is not in the cache; its sha256 is checked in either case.

    Raises `UserError`: it cannot be downloaded, or the file is another text (3); the cache cannot be written (6).
    """
    path = cache / SHAKESPEARE_FILE
    if not path.exists():
        _write(path, _download(path))
    with open_text(path) as file:
        if hashlib.sha256(file.read(SHAKESPEARE_BYTES + 1)).hexdigest() == SHAKESPEARE_SHA256:
            return path
    name = escape_control_chars(path)
    raise UserError(f"{name} is not Tiny Shakespeare (its sha256 differs): delete it to download it again", DATA)


def _write(path: Path, data: bytes) -> None:
    try:
        write_atomic(path, [data])
    except UserError as error:
        hint = "free some space, or set GLASSGPT_CACHE to another folder"
        raise UserError(f"{error}; {hint}", DISK_OR_MEMORY) from error


def _download(path: Path) -> bytes:
    try:
        with urllib.request.urlopen(SHAKESPEARE_URL, timeout=_TIMEOUT_SECONDS) as response:
            data: bytes = response.read(SHAKESPEARE_BYTES + 1)
    except (OSError, ValueError, http.client.HTTPException) as error:
        why = os_reason(error)
    else:
        if hashlib.sha256(data).hexdigest() == SHAKESPEARE_SHA256:
            return data
        why = f"received {len(data)} bytes that are not the text"
    raise UserError(
        f"cannot download Tiny Shakespeare ({why}): download {SHAKESPEARE_URL} by other means to "
        f"{escape_control_chars(path)}, or use --data.source stories, which needs no network",
        DATA,
    )


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


def _split_file(text: TextRange, val_fraction: float) -> tuple[TextRange, TextRange]:
    """Hold out the last documents of a file, or the end of its only document."""
    position = text.start + int(text.n_bytes * (1 - val_fraction))
    if separator := _nearest_separator(text, position):
        return replace(text, end=separator[0]), replace(text, start=separator[1])
    only = _only_document(text)
    cut = character_start(text.path, only.start + int(only.n_bytes * (1 - val_fraction)))
    train, val = replace(only, end=cut), replace(only, start=cut)
    if not (has_text(train) and has_text(val)):
        message = f"{escape_control_chars(text.path)} is too short to hold out a part of it: give it more text"
        raise UserError(message, DATA)
    return train, val


def _nearest_separator(text: TextRange, position: int) -> tuple[int, int] | None:
    """Start and end of the separator nearest to a position that has text before and after it."""

    def first(separators: Iterable[tuple[int, int]]) -> tuple[int, int] | None:
        for start, end in separators:
            if has_text(replace(text, start=end)) and has_text(replace(text, end=start)):
                return start, end
        return None

    forward = range(position, text.end, _STEP_BYTES)
    after = first(s for low in forward for s in find_separators(text, low, min(text.end, low + _STEP_BYTES)))
    lowest = max(text.start, 2 * position - after[0]) if after else text.start
    backward = range(position, lowest, -_STEP_BYTES)
    before = first(s for high in backward for s in find_separators(text, max(lowest, high - _STEP_BYTES), high)[::-1])
    return before or after


def _only_document(text: TextRange) -> TextRange:
    """The part with text of a file in which no separator has text before and after it."""
    steps = range(text.start, text.end, _STEP_BYTES)
    separators = [s for low in steps for s in find_separators(text, low, min(text.end, low + _STEP_BYTES))]
    starts = [text.start, *(end for _, end in separators)]
    ends = [*(start for start, _ in separators), text.end]
    for start, end in zip(starts, ends, strict=True):
        if has_text(part := replace(text, start=start, end=max(start, end))):
            return part
    message = f"{escape_control_chars(text.path)} contains only white space: there is no text to train on"
    raise UserError(message, DATA)
