"""Text files: which files a source names, and their documents, streamed in constant memory.

A line that holds only `<|endoftext|>` separates documents. That line, the newline before it and the one after it
belong to no document. Documents of white space alone are skipped.
"""

from __future__ import annotations

import glob
import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from common.errors import DATA, UserError, escape_control_chars

SEPARATOR = "<|endoftext|>"
"""On a line of its own it ends one document and starts the next."""
PROSE = (".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".org")
"""Suffixes of the files that are read from a folder."""
BLOCK_BYTES = 1024 * 1024
"""Maximum size of a piece of text."""

_BYTE_ORDER_MARKS = (  # the longer ones first: UTF-32LE begins as UTF-16LE does
    (b"\xff\xfe\0\0", "UTF-32LE"),
    (b"\0\0\xfe\xff", "UTF-32BE"),
    (b"\xff\xfe", "UTF-16LE"),
    (b"\xfe\xff", "UTF-16BE"),
)
_UTF8_MARK = b"\xef\xbb\xbf"
# A separator with the newline before it; the newline after it may be the one before the next separator.
_SEPARATOR = re.compile(rb"\r?\n" + re.escape(SEPARATOR.encode()) + rb"(?=(\r?\n))")
_LONGEST = len(SEPARATOR) + 4
_SEARCH_BYTES = 4096
# Cutting is safe before a space that follows a visible character, and before any white space that follows a letter:
# no pre-token of GPT-2, cl100k or o200k crosses these places, so the ids of the pieces are the ids of the document.
# (Punctuation with a newline after it, and white space before a space, can be one pre-token. The three-byte
# characters are those of blocks without white space: the Indic scripts, Thai, Chinese and Korean.)
_SAFE_CUT = re.compile(rb"(?:[!-~]|[\xc3-\xdf][\x80-\xbf]|[\xe0\xe4-\xed][\x80-\xbf]{2})(?= )|[A-Za-z](?=[\t\r\n])")


@dataclass(frozen=True)
class TextRange:
    """Bytes `start` to `end` of a file, between characters."""

    path: Path
    start: int
    end: int

    @property
    def n_bytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Piece:
    """A document, or a part of a long one; the last part has `ends_document`."""

    text: str
    ends_document: bool


def find_files(source: str) -> list[Path]:
    """The files that a path, a folder or a glob names, sorted; empty ones are skipped.

    Raises `UserError` (3) if there are none.
    """
    path, name = Path(os.path.expanduser(source)), escape_control_chars(source)
    candidates: Iterable[Path] = [path]
    wanted = ""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        if not glob.has_magic(source):
            why = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read: {os_reason(error)}"
            accepted = "--data.source accepts stories, repeats, shakespeare, a text file, a folder, or a glob"
            raise UserError(f"{name} {why}; {accepted}", DATA) from error
        candidates = map(Path, glob.iglob(str(path), recursive=True))
        wanted = "matches it; ** matches folders at any depth"
    else:
        if stat.S_ISDIR(mode):
            candidates = (file for file in _files_below(path) if file.name.lower().endswith(PROSE))
            wanted = f"ends in {' '.join(PROSE)}; for others use a glob, such as '{name}/**/*.py'"
        elif not stat.S_ISREG(mode):
            raise UserError(f"{name} is not a regular file; give a file of UTF-8 text", DATA)
    # Each file once, however many links lead to it.
    files = sorted({os.path.realpath(file): file for file in sorted(candidates)[::-1] if os.path.isfile(file)}.values())
    if not files:
        raise UserError(f"no text found for {name}: no file {wanted}", DATA)
    non_empty = [file for file in files if file.stat().st_size]
    if not non_empty:
        raise UserError(f"{name} is empty: there is no text to train on", DATA)
    return non_empty


def _files_below(folder: Path) -> Iterator[Path]:
    """The files in a folder that are not hidden. Links are followed, but no folder is visited twice."""

    def fail(error: OSError) -> None:
        raise UserError(f"cannot read the folder {escape_control_chars(error.filename)}: {os_reason(error)}", DATA)

    visited: set[str] = set()
    for inner, folders, names in os.walk(folder, followlinks=True, onerror=fail):
        if (real := os.path.realpath(inner)) in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(inner, name) for name in names if not name.startswith("."))


def whole_file(path: Path) -> TextRange:
    """The text of a file without its byte-order mark. Raises `UserError` (3) if the mark is not that of UTF-8."""
    with open_text(path) as file:
        head, size = file.read(4), os.fstat(file.fileno()).st_size
    for mark, encoding in _BYTE_ORDER_MARKS:
        if head.startswith(mark):
            message = f"{encoding}, not UTF-8: convert it with `iconv -f {encoding} -t UTF-8 OLD > NEW`"
            raise UserError(f"{escape_control_chars(path)} is {message}", DATA)
    return TextRange(path, len(_UTF8_MARK) if head.startswith(_UTF8_MARK) else 0, size)


def read_documents(text: TextRange, block_bytes: int = BLOCK_BYTES) -> Iterator[Piece]:
    """Yield the documents of a range, in pieces of at most `block_bytes` bytes (4 or more), newlines unchanged.

    Holds about two blocks in memory, however long the file and its documents are. Raises `UserError` (3), with the
    offset in the file, for a NUL byte, for invalid UTF-8, and if the file cannot be read or was truncated.
    """
    assert block_bytes >= 4, "a block must hold the longest character"
    # A newline before and after the text lets a separator match on the first and on the last line.
    buffer, offset, starts = b"\n", text.start - 1, True
    for block, is_last in _blocks(text, block_bytes):
        buffer += block + b"\n" * is_last
        at, ends = 0, [match.span() for match in _SEPARATOR.finditer(buffer)]
        # The last bytes may be the beginning of a separator, unless these are the last bytes of the text.
        after_last = ends[-1][1] if ends else 0
        ends.append((len(buffer) - 1, 0) if is_last else (max(after_last, len(buffer) - _LONGEST), -1))
        for end, after in ends:
            *pieces, last = _cuts(buffer, at, end, block_bytes)
            for start, stop in [*pieces, last] if after >= 0 else pieces:
                if starts:  # the newline before a document's first line
                    start += 2 if buffer.startswith(b"\r\n", start, stop) else buffer.startswith(b"\n", start, stop)
                piece = _decode(buffer[start:stop], text.path, offset + start)
                if piece.strip() or not (starts and stop == end):
                    yield Piece(piece, stop == end)
                starts = False
            at, starts = (after, True) if after >= 0 else (last[0], starts)
        buffer, offset = buffer[at:], offset + at


def sample_text(texts: Iterable[TextRange], n_bytes: int) -> Iterator[str]:
    """About `n_bytes` of the text, in blocks spread evenly over the ranges; all of it if there is no more."""
    texts = list(texts)
    ratio = max(1.0, sum(text.n_bytes for text in texts) / n_bytes)
    position, due = 0, 0.0
    for text in texts:
        while due < position + text.n_bytes:
            start = text.start + int(due) - position
            size = text.end - start if ratio == 1 else min(BLOCK_BYTES, text.end - start)
            low, high = (max(text.start, character_start(text.path, p)) for p in (start, start + size))
            yield from (piece.text for piece in read_documents(TextRange(text.path, low, high)))
            due += max(1, size) * ratio
        position += text.n_bytes


def has_text(text: TextRange) -> bool:
    """Whether there is anything but separators and white space. Reads no further than the first of it."""
    return any(piece.text.strip() for piece in read_documents(text))


def find_separators(text: TextRange, low: int, high: int) -> list[tuple[int, int]]:
    """Start and end, newlines included, of the separators in a range whose marks begin in `low` to `high`."""
    first, last = max(text.start, low - 2), min(text.end, high + _LONGEST)
    with open_text(text.path) as file:
        file.seek(first)
        data = file.read(last - first)
    before, after = b"\n" * (first == text.start), b"\n" * (last == text.end)
    base, data = first - len(before), before + data + after
    spans = []
    for match in _SEPARATOR.finditer(data):
        if low <= base + match.end() - len(SEPARATOR) < high:
            spans.append((max(text.start, base + match.start()), min(text.end, base + match.end(1))))
    return spans


def character_start(path: Path, position: int) -> int:
    """`position` in a file, moved back to the start of a UTF-8 character."""
    with open_text(path) as file:
        low = max(0, position - 3)
        file.seek(low)
        return low + _boundary(file.read(position - low + 1), position - low)


@contextmanager
def open_text(path: Path) -> Iterator[BinaryIO]:
    """Open a file for its bytes. Raises `UserError` (3) if it cannot be read."""
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise UserError(f"cannot read {escape_control_chars(path)}: {os_reason(error)}", DATA) from error


def os_reason(error: Exception) -> str:
    """The operating system's own description of an error."""
    return escape_control_chars(getattr(error, "strerror", None) or getattr(error, "reason", None) or error)


def _blocks(text: TextRange, block_bytes: int) -> Iterator[tuple[bytes, bool]]:
    """The bytes of a range in blocks, and whether each is the last."""
    offset, name = text.start, escape_control_chars(text.path)
    with open_text(text.path) as file:
        file.seek(offset)
        while True:
            block = file.read(min(block_bytes, text.end - offset))
            if (nul := block.find(0)) >= 0:
                message = f"{name} is a binary file (NUL byte at offset {offset + nul}): give a file of UTF-8 text"
                raise UserError(message, DATA)
            if not block and offset < text.end:
                raise UserError(f"{name} was truncated to {offset} bytes while it was read: start again", DATA)
            offset += len(block)
            yield block, offset == text.end
            if offset == text.end:
                return


def _cuts(data: bytes, start: int, end: int, most: int) -> Iterator[tuple[int, int]]:
    """Cut `start` to `end` of `data` into parts of at most `most` bytes, at safe places if there are any."""
    while end - start > most:
        cut = _last_cut(data, start, start + most)
        yield start, cut
        start = cut
    yield start, end


def _last_cut(data: bytes, start: int, limit: int) -> int:
    """The last safe place to cut after `start` and up to `limit`; else the last place between characters."""
    places = list(_SAFE_CUT.finditer(data, max(start, limit - _SEARCH_BYTES), limit + 1))
    cut = places[-1].end() if places else _boundary(data, limit)
    return cut if cut > start else limit


def _boundary(data: bytes, position: int) -> int:
    """`position`, moved back by at most three bytes to the start of a UTF-8 character."""
    for cut in range(position, max(-1, position - 4), -1):
        if cut >= len(data) or data[cut] & 0xC0 != 0x80:  # 10xxxxxx continues a character
            return cut
    return position


def _decode(data: bytes, path: Path, offset: int) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{escape_control_chars(path)} is not UTF-8 (byte 0x{data[error.start]:02x} at offset "
            f"{offset + error.start}): convert text in another encoding, such as LATIN1, with "
            "`iconv -f LATIN1 -t UTF-8 OLD > NEW`; export other files as text",
            DATA,
        ) from None
