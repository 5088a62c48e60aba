"""Corpora: which text is for training and which for validation.

    stories        generated stories whose entropy is known, written to the cache once
    repeats        random letters, repeated, whose entropy is known too (`repeated_tokens.py`)
    shakespeare    Tiny Shakespeare, 1.1 MB, downloaded once
    book.txt       any one file of text: UTF-8, or `--data.encoding`
    rows.jsonl     rows of JSON: the text in each is a document
    names.txt      a list of short lines: each line is a document
    texts/         the prose in a folder: .txt .text .md .markdown .rst .tex .org, else its other texts; nothing hidden
    'src/**/*.py'  all files that a glob matches, whatever their suffix

A file or folder that has the name of a corpus is given as `./stories`. To add a generated corpus: a module with
`documents(split)` and `entropy()`, and a line in `GENERATED`.
"""

import hashlib
import http.client
import inspect
import mmap
import os
import re
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from common.errors import DATA, UserError, escape_control_chars
from common.files import write_atomic
from data import repeated_tokens, stories, story_grammar
from data.text_files import ALL_LINES, SEPARATOR, TextRange, find_files, line_hash, open_text, os_reason
from data.utf8_copy import utf8_file

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

# A name, a word or a title of a list (of up to four words): not a verse, a sentence, code, a log or a table.
_ENTRY = re.compile(r"(?=.*[^\W\d_])\w[^\t,;:=<>{}|\u3000-\u303f\uff01-\uff1f]*(?<![.!?\u2026\u0964])")


@dataclass(frozen=True)
class Corpus:
    """Text for training and for validation."""

    name: str
    train: tuple[TextRange, ...]
    val: tuple[TextRange, ...]
    nats_per_document: float | None = None
    """Entropy of a document, if it is known: no model can reach a lower mean loss per document."""
    how: str = ""
    """What of the user's text is held out, in words."""


def open_corpus(
    source: str,
    val_fraction: float,
    cache: Path,
    val: str = "",
    lines: str = "auto",
    encoding: str = "utf-8",
    write: bool = True,
) -> Corpus:
    """Find the text of `--data.source` and hold out `val_fraction` (0 to 1) of its bytes for validation.

    Several files: whole files are held out, selected by a hash of their names; if that comes to less than half or more
    than twice of what is asked, the end of each long file. One file: its last documents, or the end of a long one. A list
    (`lines`: auto, on, off): lines all over it. `val` names another text for validation. A named corpus has a split of its
    own. `cache` is the folder for what is generated or downloaded.

    Raises `UserError`: no text or unreadable (3); a cache that cannot be written (6); `val` with a named corpus (2).
    """
    if val and source in NAMED:
        raise UserError(f"--data.val is for text of your own; {source} has a validation text already")
    if source in GENERATED:
        first, last = map(_open_file, generated_files(source, cache))
        return Corpus(source, (first,), (last,), GENERATED[source].entropy())
    if source == "shakespeare":
        first, last = _split_file(_open_file(download_shakespeare(cache)), SHAKESPEARE_VAL_FRACTION)
        return Corpus(source, (first,), (last,))
    files = {_open_file(utf8_file(path, encoding, cache, write), lines): path for path in find_files(source)}
    if not val:
        return _hold_out(source, files, val_fraction)
    held_out = [_open_file(utf8_file(path, encoding, cache, write), lines) for path in find_files(val)]
    paths = {text.path.resolve() for text in held_out}
    texts = [text for text in files if text.path.resolve() not in paths]
    if not texts:
        raise UserError(f"--data.val {escape_control_chars(val)} is all of data.source: name another text", DATA)
    return Corpus(source, tuple(texts), tuple(held_out), how="data.val")


def _hold_out(source: str, texts: Mapping[TextRange, Path], val_fraction: float) -> Corpus:
    """Hold out whole files or else the end of each long one, and lines of each list, given the user's files of the texts."""
    lists, others = {text for text in texts if text.lines}, {text: texts[text] for text in texts if not text.lines}
    whole, total = _select_files(others, val_fraction), sum(text.n_bytes for text in others)
    # Long: 20 kB, or half of the mean, since all files shorter than that are less than half of the text.
    long = {text for text in others if not whole and text.n_bytes >= min(20_000, total / len(others) / 2)}
    share = min(val_fraction * total / max(1, sum(text.n_bytes for text in long)), (1 + val_fraction) / 2)
    split = {
        text: _split_list(text, val_fraction) if text in lists else _split_file(text, share) for text in long | lists
    }
    train = tuple(split.get(text, (text,))[0] for text in texts if text not in whole)
    val = tuple(split.get(text, (text,))[-1] for text in texts if text in whole or text in split)
    parts = (("{}", whole), ("the end of {}", long), ("lines of {}, each a document", lists))
    how = ", ".join(words.format(f"{len(part)} file{'s' * (len(part) != 1)}") for words, part in parts if part)
    return Corpus(source, train, val, how=how)


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


def _select_files(texts: Mapping[TextRange, Path], val_fraction: float) -> set[TextRange]:
    """Some of several files, never all, with about `val_fraction` of the bytes; empty if no choice comes near.

    The choice depends on the names below the common folder alone, not on the file system or the folder's place.
    """
    common = os.path.commonpath([path.parent.absolute() for path in texts.values()] or [Path()])

    def name_hash(text: TextRange) -> bytes:
        name = Path(os.path.relpath(texts[text], common)).as_posix()
        return hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()

    total = sum(text.n_bytes for text in texts)
    missing = val_fraction * total
    selected: set[TextRange] = set()
    for text in sorted(texts, key=name_hash):
        # Selected if it brings the sum nearer to the target and leaves another file to train on.
        if text.n_bytes < 2 * missing and len(selected) < len(texts) - 1:
            selected.add(text)
            missing -= text.n_bytes
    share = sum(text.n_bytes for text in selected) / max(1, total)
    # Not all the short files, with one long file left for training.
    is_near = val_fraction / 2 <= share <= 2 * val_fraction and len(selected) <= 2 * val_fraction * len(texts)
    return selected if is_near else set()


def _split_file(text: TextRange, val_fraction: float) -> tuple[TextRange, TextRange]:
    """Hold out the last documents of a file if they are about `val_fraction` of it, else that part of the text."""
    size = text.end
    low, high = int(size * max(1 - 2 * val_fraction, (1 - val_fraction) / 2)), int(size * (1 - val_fraction / 2))
    cut = min(int(size * (1 - val_fraction)), size - 1)
    with open_text(text.path) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        # Not in a separator: one that begins a little before the cut counts as after it.
        after = _DOCUMENT_START.search(data, max(cut - len(SEPARATOR) - 4, 0), high)
        start = (
            after.start() if after else max((m.start() for m in _DOCUMENT_START.finditer(data, low, cut)), default=0)
        )
        if start:
            cut = start
        else:
            while cut and data[cut] & 0xC0 == 0x80:  # inside of a character
                cut -= 1
    return replace(text, end=cut), replace(text, start=cut)


def _open_file(path: Path, lines: str = "off") -> TextRange:
    """A whole file, as lines if `lines` is `on`, or `auto` and it is a list. Raises `UserError` (3)."""
    with open_text(path) as file:
        text = TextRange(path, 0, os.fstat(file.fileno()).st_size)
    sample = _sample_lines(text) if lines == "auto" else []
    entries = sum(len(x.encode()) <= 40 and x.count(" ") < 4 and bool(_ENTRY.fullmatch(x)) for x in sample)
    is_list = len(sample) >= 100 and entries >= 0.95 * len(sample) and len(set(sample)) >= 0.8 * len(sample)
    return replace(text, lines=ALL_LINES) if is_list or lines == "on" else text


def _split_list(text: TextRange, val_fraction: float) -> tuple[TextRange, TextRange]:
    """Hold out lines all over a list: those whose hash is below that fraction of the hashes, counted on a sample."""
    hashes = sorted({line_hash(line) for line in _sample_lines(text) if line.strip()}) or [0]
    border = hashes[min(max(round(val_fraction * len(hashes)), 1), len(hashes) - 1)]
    return replace(text, lines=(border, ALL_LINES[1])), replace(text, lines=(0, border))


def _sample_lines(text: TextRange, block_bytes: int = 16 * 1024) -> list[str]:
    """The whole lines in 16 blocks of a file, evenly spread; of a short file nearly all."""
    lines: list[str] = []
    with open_text(text.path) as file:
        for start in range(0, text.end, max(text.end // 16, block_bytes)):
            file.seek(start)
            lines += file.read(block_bytes).decode(errors="replace").splitlines()[start > 0 : -1]
    return lines
