"""Corpora: which text is for training and which for validation.

`docs/running.md` says what is read and what is held out. To add a generated corpus: a module with `documents(split)` and
`entropy()`, and a line in `GENERATED`.
"""

import hashlib
import http.client
import inspect
import mmap
import os
import re
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from common.errors import DATA, UserError, escape_control_chars
from common.files import write_atomic
from data import repeated_tokens, stories, story_grammar
from data.config import DataConfig
from data.hub import PREFIX, hub_files
from data.text_copy import plain_text
from data.text_files import SEPARATOR, TextRange, find_files, open_text, os_reason

GENERATED = {"stories": stories, "repeats": repeated_tokens}  # Generated corpora.
NAMED = (*GENERATED, "shakespeare")  # The values of `--data.source` that are no text of the user's own.
SHAKESPEARE_VAL_FRACTION = 0.1  # The last tenth is the validation split, as in nanoGPT, so that losses are comparable.
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

# A separator before a document with text: white space follows, then anything but another separator.
_DOCUMENT_START = re.compile(rb"\r?\n%b\r?\n\s*(?!%b)\S" % ((re.escape(SEPARATOR.encode()),) * 2))


@dataclass(frozen=True)
class Corpus:
    name: str
    train: tuple[TextRange, ...]
    val: tuple[TextRange, ...]
    nats_per_document: float | None = None
    """Entropy of a document, if it is known: no model can reach a lower mean loss per document."""
    how: str = ""  # What of the user's text is held out, in words.


def open_corpus(config: DataConfig, cache: Path) -> Corpus:
    """Find the text of `data.source`, and hold out `data.val_fraction` of its bytes or take `data.val` for validation.

    A named corpus has a split of its own. `cache` is the folder for what is generated, downloaded or copied.

    Raises `UserError`: no text or unreadable (3); a cache that cannot be written (6); `val` with a named corpus (2).
    """
    source = config.source
    if config.val and source in NAMED:
        raise UserError(f"--data.val is for text of your own; {source} has a validation text already")
    if source in GENERATED:
        first, last = map(_open_file, generated_files(source, cache))
        return Corpus(source, (first,), (last,), GENERATED[source].entropy())
    if source == "shakespeare":
        first, last = _split_file(_open_file(download_shakespeare(cache)), SHAKESPEARE_VAL_FRACTION)
        return Corpus(source, (first,), (last,))
    texts = _open_texts(find_files(source, config.encoding), source, config, cache)
    if config.val:
        val = _open_texts(find_files(config.val, config.encoding), config.val, config, cache)
    elif source.startswith(PREFIX) and (files := hub_files(source, "validation")):
        val = _open_texts(files, source, config, cache)
    else:
        return _hold_out(source, texts, config.val_fraction)
    paths = {text.path.resolve() for text in val}
    train = tuple(text for text in texts if text.path.resolve() not in paths)
    if not train:
        raise UserError(f"--data.val {config.val} is all of data.source: name another text", DATA)
    return Corpus(source, train, tuple(val), how="data.val" if config.val else "its validation split")


def _open_texts(files: Sequence[Path], source: str, config: DataConfig, cache: Path) -> list[TextRange]:
    paths = [plain_text(path, config.encoding, config.lines, cache, config.field) for path in files]
    if not (texts := [text for text in map(_open_file, paths) if text.n_bytes]):
        raise UserError(f"{source} contains no text", DATA)
    return texts


def _hold_out(source: str, texts: Sequence[TextRange], val_fraction: float) -> Corpus:
    """Hold out whole files if that comes to between half and twice of `val_fraction`, else the end of each long file."""
    total = sum(text.n_bytes for text in texts)
    suffixes = " ".join(sorted({text.path.suffix or text.path.name for text in texts}))
    files = f"{len(texts)} files ({suffixes})" if len(texts) > 1 else texts[0].path.name
    files = escape_control_chars(files)
    if whole := dict.fromkeys(_select_files(texts, val_fraction, total)):  # in order, and fast to search
        train = tuple(text for text in texts if text not in whole)
        return Corpus(source, train, tuple(whole), how=f"{len(whole)} of {files}")
    # Long: 20 kB, or half of the mean, since all files shorter than that are less than half of the text.
    long = [text for text in texts if text.n_bytes >= min(20_000, total / len(texts) / 2)]
    share = min(val_fraction * total / sum(text.n_bytes for text in long), (1 + val_fraction) / 2)
    split = {text: _split_file(text, share) for text in long}
    train = tuple(split[text][0] if text in split else text for text in texts)
    number = f"{len(long)} of " if len(texts) > 1 else ""
    return Corpus(source, train, tuple(end for _, end in split.values()), how=f"the end of {number}{files}")


def _select_files(texts: Sequence[TextRange], val_fraction: float, total: int) -> list[TextRange]:
    """Whole files spread evenly over the list, with about `val_fraction` of the bytes; empty if no choice comes near."""
    missing = 0.0
    selected: list[TextRange] = []
    for text in texts:
        missing += val_fraction * text.n_bytes
        # Selected if it brings the sum nearer to the fraction of the files so far and leaves one to train on.
        if text.n_bytes < 2 * missing and len(selected) < len(texts) - 1:
            selected.append(text)
            missing -= text.n_bytes
    share = sum(text.n_bytes for text in selected) / total
    # Not all the short files, with one long file left for training.
    is_near = val_fraction / 2 <= share <= 2 * val_fraction and len(selected) <= 2 * val_fraction * len(texts)
    return selected if is_near else []


def generated_files(name: str, cache: Path) -> tuple[Path, Path]:
    """Training and validation file of a generated corpus, written once for the present code. Raises `UserError` (6)."""
    code = "".join(inspect.getsource(module) for module in (*GENERATED.values(), story_grammar))
    folder = cache / f"{name}-{hashlib.sha256(code.encode()).hexdigest()[:12]}"
    for split in ("train", "val"):
        if not (folder / f"{split}.txt").exists():
            text = f"\n{SEPARATOR}\n".join(GENERATED[name].documents(split))
            write_atomic(folder / f"{split}.txt", [text.encode()])
    return folder / "train.txt", folder / "val.txt"


def download_shakespeare(cache: Path) -> Path:
    """Tiny Shakespeare, downloaded if it is not in the cache. Raises `UserError`: no such text, or a different one (3); a cache
    that cannot be written (6)."""
    path = cache / "tinyshakespeare.txt"
    try:
        if path.exists():
            data = path.read_bytes()
        else:
            with urllib.request.urlopen(SHAKESPEARE_URL, timeout=20) as response:
                data = response.read(2_000_000)
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
        f"{path}, or use --data.source stories, which needs no network",
        DATA,
    )


def _split_file(text: TextRange, val_fraction: float) -> tuple[TextRange, TextRange]:
    """Hold out the last documents of a file if they are about `val_fraction` of it, else that part of the text."""
    with open_text(text.path) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        size = last = text.end
        while last > 1 and data[last - 1 : last].isspace():
            last -= 1
        if size - last > val_fraction / 2 * size:  # so many blank lines at the end are no text to hold out
            size = last
        low, high = int(size * max(1 - 2 * val_fraction, (1 - val_fraction) / 2)), int(size * (1 - val_fraction / 2))
        cut = min(int(size * (1 - val_fraction)), size - 1)
        # Not in a separator: one that begins a little before the cut counts as after it.
        after = _DOCUMENT_START.search(data, max(cut - len(SEPARATOR) - 4, 0), high)
        starts = [after] if after else _DOCUMENT_START.finditer(data, low, cut)
        cut = max((match.start() for match in starts), default=0) or cut
        while cut and data[cut] & 0xC0 == 0x80:  # inside of a character
            cut -= 1
    return replace(text, end=cut), replace(text, start=cut)


def _open_file(path: Path) -> TextRange:
    """A whole file. Raises `UserError` (3)."""
    with open_text(path) as file:
        return TextRange(path, 0, os.fstat(file.fileno()).st_size)
