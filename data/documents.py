"""Documents out of text files: streamed, in constant memory, from any stretch of a file.

Where this stands: `corpus.py` decides which stretches (`Span`) of which files are training and validation
text; here they are cut into jobs of a few megabytes (`jobs`) and read (`read_documents`), perhaps by several
processes. A line that holds only `<|endoftext|>` separates documents. That line, the newline before it and
the one after it belong to no document. Documents of white space alone are passed over.

A long document is read as several pieces, and may be shared by several jobs. It is cut where no token can lie
across the cut: the encodings in use split text at such places before they look for tokens, so that the ids of
the pieces are the ids of the whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from common.errors import DATA, UserError, escape_control_chars

DOCUMENT_SEPARATOR = "<|endoftext|>"
"""On a line of its own it ends one document and begins the next."""
BLOCK_BYTES = 1024 * 1024
"""Bytes of a piece at most."""

_MARK = DOCUMENT_SEPARATOR.encode()
_HOLD = len(_MARK) + 4  # a separator with the longest newline (CR LF) on either side
_WINDOW = 64 * 1024  # how far to look for a good place to cut
_STEP = 4096
# A cut is safe before a space that follows a visible character, and before any white space that follows a
# letter: in the patterns of GPT-2, cl100k and o200k no match reaches across. (Punctuation with a newline
# after it is one match in some of them, and white space before a space in all; so the characters of three
# bytes are those of blocks without white space: the Indic scripts, Thai, Chinese and Korean.)
_SAFE = re.compile(rb"(?:[!-~]|[\xc3-\xdf][\x80-\xbf]|[\xe0\xe4-\xed][\x80-\xbf]{2})(?= )|[A-Za-z](?=[\t\r\n])")


@dataclass(frozen=True)
class Span:
    """Bytes `start` to `end` of a file, cut only between characters, the byte-order mark left out.

    A document shared by two spans does not end in the first (`ends_document` is false) and does not begin in
    the second (`starts_document` is false).
    """

    path: Path
    start: int
    end: int
    starts_document: bool = True
    ends_document: bool = True


@dataclass(frozen=True)
class Piece:
    """A document, or a part of a long one; `ends_document` tells whether it is the last."""

    text: str
    ends_document: bool


def read_documents(span: Span, block_bytes: int = BLOCK_BYTES) -> Iterator[Piece]:
    """The documents of a span, in pieces of at most `block_bytes` bytes (4 or more).

    Newlines are left as they are. Holds some two blocks in memory, however long the file and its documents
    are. Raises `UserError` (3), with the offset in the file, at a NUL byte and at what is no UTF-8, and when
    the file cannot be read or was cut short.
    """
    assert block_bytes >= 4, "a block must hold the longest character"
    place, left = span.start, span.end - span.start
    buffer, starts = b"", span.starts_document
    with reading(span.path) as file:
        file.seek(place)
        while True:
            block = _read_text(file, span.path, min(block_bytes, left))
            left -= len(block)
            buffer += block
            at = 0
            while found := _separator(buffer, at, starts, span.ends_document and not left):
                yield from _pieces(buffer[at : found[0]], span.path, place + at, starts, True, block_bytes)
                at, starts = found[1], True
            if not left:
                yield from _pieces(buffer[at:], span.path, place + at, starts, span.ends_document, block_bytes)
                return
            # What is held back may be the beginning of a separator.
            while len(buffer) - at > block_bytes + _HOLD:
                cut = _last_cut(buffer, at, at + block_bytes)
                yield Piece(_decode(buffer[at:cut], span.path, place + at), False)
                at, starts = cut, False
            buffer, place = buffer[at:], place + at


def jobs(spans: Iterable[Span], n_bytes: int) -> Iterator[tuple[Span, ...]]:
    """The same text, in the same order, as jobs of about `n_bytes`: long spans are split, short ones
    gathered."""
    gathered: list[Span] = []
    size = 0
    for span in spans:
        for part in split_span(span, n_bytes):
            length = part.end - part.start
            if gathered and size + length > n_bytes:
                yield tuple(gathered)
                gathered, size = [], 0
            gathered.append(part)
            size += length
    if gathered:
        yield tuple(gathered)


def split_span(span: Span, n_bytes: int) -> Iterator[Span]:
    """Cut a span into spans of about `n_bytes` (at most 64 KB more) that hold the same documents in order.

    Reads a small window around each cut and no more. Preferred are cuts between documents, then safe ones
    inside a document, then any between two characters.
    """
    assert n_bytes >= 4, "a span must hold the longest character"
    if span.end - span.start <= n_bytes:
        yield span
        return
    with reading(span.path) as file:
        rest = span
        while rest.end - rest.start > n_bytes:
            before, after, between = _cut_near(file, rest, rest.start + n_bytes)
            if after >= rest.end:
                break
            if before > rest.start:
                yield Span(span.path, rest.start, before, rest.starts_document, between)
            rest = Span(span.path, after, span.end, between, span.ends_document)
        yield rest


def sample(spans: Iterable[Span], n_bytes: int) -> Iterator[str]:
    """About `n_bytes` of the text, evenly spread over the spans; all of it where there is no more."""
    parts = list(jobs(spans, BLOCK_BYTES))
    take = max(1, n_bytes // BLOCK_BYTES)
    if len(parts) > take:
        parts = [parts[i * len(parts) // take] for i in range(take)]
    return (piece.text for job in parts for span in job for piece in read_documents(span))


def has_text(span: Span) -> bool:
    """Whether there is anything but separators and white space. Reads as far as the first of it."""
    return any(piece.text.strip() for piece in read_documents(span))


def separators(span: Span, low: int, high: int) -> list[tuple[int, int]]:
    """Where the separator lines with marks that begin in `low` to `high` begin and end, newlines included."""
    first, last = max(span.start, low - 2), min(span.end, high + _HOLD)
    with reading(span.path) as file:
        file.seek(first)
        data = file.read(last - first)
    found, at = [], 0
    begins, ends = first == span.start and span.starts_document, last == span.end and span.ends_document
    while line := _separator(data, at, begins, ends):
        at = line[1]
        mark = first + data.index(_MARK, line[0])
        if low <= mark < high:
            found.append((first + line[0], first + line[1]))
    return found


def character_start(path: Path, position: int) -> int:
    """`position` in a file, moved back to where a UTF-8 character begins."""
    with reading(path) as file:
        low = max(0, position - 3)
        file.seek(low)
        return low + _boundary(file.read(position - low + 1), position - low)


@contextmanager
def reading(path: Path) -> Iterator[BinaryIO]:
    """Open a file for its bytes. Raises `UserError` (3) where the system refuses."""
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise UserError(f"cannot read {escape_control_chars(path)}: {reason(error)}", DATA) from error


def reason(error: Exception) -> str:
    """Why the system refused, in its own words."""
    return escape_control_chars(getattr(error, "strerror", None) or getattr(error, "reason", None) or error)


def not_utf8(path: Path, offset: int, byte: int) -> UserError:
    """The error for a byte that is no UTF-8."""
    return UserError(
        f"{escape_control_chars(path)} is not UTF-8 text: byte 0x{byte:02x} at offset {offset}; convert text in another "
        "encoding, such as LATIN1, with `iconv -f LATIN1 -t UTF-8 OLD > NEW`, export other files as text",
        DATA,
    )


def _separator(data: bytes, at: int, begins: bool, ends: bool) -> tuple[int, int] | None:
    """The first separator line at or after `at`: where it begins and ends, with the newlines on either side.

    `begins`: `data` begins where a line begins; `ends`: a document ends where `data` ends.
    """
    look = at
    while (mark := data.find(_MARK, look)) >= 0:
        look = end = mark + len(_MARK)
        if data.startswith(b"\r\n", end):
            end += 2
        elif data.startswith(b"\n", end):
            end += 1
        elif not (ends and end == len(data)):
            continue
        if mark == 0 and begins:
            return 0, end
        if mark > 0 and data[mark - 1] == 0x0A:
            newline = 2 if mark > 1 and data[mark - 2] == 0x0D else 1
            # Two separators in a row share the newline between them.
            return max(at, mark - newline), end
    return None


def _pieces(data: bytes, path: Path, place: int, starts: bool, ends: bool, most: int) -> Iterator[Piece]:
    """The rest of a document, `data`, which lies at `place` in the file, in pieces of `most` bytes at
    most."""
    at = 0
    while len(data) - at > most:
        cut = _last_cut(data, at, at + most)
        yield Piece(_decode(data[at:cut], path, place + at), False)
        at, starts = cut, False
    text = _decode(data[at:], path, place + at)
    if text.strip() or not (starts and ends):
        yield Piece(text, ends)


def _last_cut(data: bytes, at: int, limit: int) -> int:
    """The last safe place to cut after `at` and up to `limit`, which lies inside `data`; else a place between
    characters."""
    # Backwards in steps: where there are good places at all, one is near.
    for high in range(limit, at, -_STEP):
        places = list(_SAFE.finditer(data, max(at, high - _STEP - 2), high + 1))
        if places:
            return places[-1].end()
    cut = _boundary(data, limit)
    return cut if cut > at else limit


def _cut_near(file: BinaryIO, span: Span, target: int) -> tuple[int, int, bool]:
    """Where to cut a span at or after `target`: the end of what comes before, the start of what comes after,
    and whether it is between documents."""
    low, high = max(span.start, target - _HOLD), min(span.end, target + _WINDOW + _HOLD)
    file.seek(low)
    data = file.read(high - low)
    at = 0
    begins, ends = low == span.start and span.starts_document, high == span.end and span.ends_document
    while line := _separator(data, at, begins, ends):
        at = line[1]
        if low + at > target:
            return low + line[0], low + at, True
    # Nearer to the end of the window a separator might begin that is not seen whole.
    if place := _SAFE.search(data, target - low, len(data) if high == span.end else len(data) - _HOLD):
        return low + place.end(), low + place.end(), False
    if high == span.end:
        return high, high, span.ends_document
    cut = low + _boundary(data, target - low)
    cut = cut if cut > span.start else target
    return cut, cut, False


def _boundary(data: bytes, position: int) -> int:
    """`position`, moved back by at most three bytes to where a UTF-8 character begins."""
    for cut in range(position, max(-1, position - 4), -1):
        # 10xxxxxx continues a character.
        if cut >= len(data) or data[cut] & 0xC0 != 0x80:
            return cut
    return position


def _read_text(file: BinaryIO, path: Path, n_bytes: int) -> bytes:
    """The next `n_bytes` of a file, which must be there and hold no NUL."""
    place = file.tell()
    block = file.read(n_bytes)
    if len(block) < n_bytes:
        raise UserError(
            f"{escape_control_chars(path)} ends at byte {place + len(block)}, earlier than when it was first looked at: "
            "something changes it; start again when it is finished",
            DATA,
        )
    if (nul := block.find(0)) >= 0:
        raise UserError(
            f"{escape_control_chars(path)} is no text file: NUL byte at offset {place + nul}; give one of UTF-8 text",
            DATA,
        )
    return block


def _decode(data: bytes, path: Path, place: int) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise not_utf8(path, place + error.start, data[error.start]) from None
