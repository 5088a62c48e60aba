"""Text files: which files a source names, and their documents, streamed in constant memory.

A line that holds only `<|endoftext|>` separates documents. That line, the newline before it and the one after it
belong to no document. Documents of white space alone are skipped. In a list, each line is a document.
"""

from __future__ import annotations

import codecs
import glob
import hashlib
import io
import itertools
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from common.errors import DATA, UserError, escape_control_chars

SEPARATOR = "<|endoftext|>"
"""On a line of its own it ends one document and starts the next."""
PROSE = (".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".org")
"""Suffixes of the files that are read from a folder."""
BLOCK_BYTES = 1024 * 1024
"""Text that is read at a time."""

# The newline after a separator is not consumed: it may be the one before the next separator.
_SEPARATOR = re.compile(rf"\r?\n{re.escape(SEPARATOR)}(?=\r?\n)")
_LINE_END = re.compile(rf"\r?\n(?:{re.escape(SEPARATOR)}(?=\r?\n))?")
_LONGEST = len(SEPARATOR) + 4
ALL_LINES = (0, 1 << 64)


@dataclass(frozen=True)
class TextRange:
    """Bytes `start` to `end` of a file, between characters."""

    path: Path
    start: int
    end: int
    lines: tuple[int, int] | None = None
    """Of a list: its documents are the lines whose `line_hash` is at least the first number and below the second."""

    @property
    def n_bytes(self) -> int:
        """Expected, if it is a part of a list."""
        low, high = self.lines or ALL_LINES
        return (self.end - self.start) * (high - low) // ALL_LINES[1]

    def contains(self, document: str) -> bool:
        """Whether a document in these bytes belongs to this text."""
        return self.lines is None or self.lines[0] <= line_hash(document) < self.lines[1]


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
    try:
        if path.is_dir():
            candidates: Iterable[Path] = _prose_below(path)
            wanted = f"ends in {' '.join(PROSE)}; for others use a glob, such as '{name}/**/*.py'"
        else:
            candidates = [path] if path.exists() else map(Path, glob.iglob(str(path), recursive=True))
            wanted = "matches it; name a text file, a folder, or a glob (or for --data.source: stories, repeats, shakespeare)"
            wanted += ", at its new place if it was moved"
        # Each file once, however many links lead to it.
        files = {file.resolve(): file for file in sorted(candidates, reverse=True) if file.is_file()}
        non_empty = sorted(file for file in files.values() if file.stat().st_size)
    except (OSError, ValueError) as error:
        where = escape_control_chars(getattr(error, "filename", None) or source)
        raise UserError(f"cannot read {where}: {os_reason(error)}", DATA) from error
    if not non_empty:
        raise UserError(f"no text found for {name}: no file that has text {wanted}", DATA)
    return non_empty


def _prose_below(folder: Path) -> Iterator[Path]:
    """The files of prose in a folder that are not hidden. Raises OSError if an inner folder cannot be read."""

    def fail(error: OSError) -> None:
        raise error

    for inner, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(inner, name) for name in names if name.lower().endswith(PROSE) and not name.startswith("."))


def line_hash(line: str) -> int:
    """A number below 2^64. It depends on the text alone, so equal lines are in the same split."""
    return int.from_bytes(hashlib.sha256(line.encode()).digest()[:8], "big")


def read_documents(text: TextRange, block_bytes: int = BLOCK_BYTES) -> Iterator[Piece]:
    """Yield the documents of a range, newlines unchanged; one longer than `block_bytes` comes in several pieces.

    Holds about two blocks in memory, however long the file and its documents are. Raises `UserError` (3) if the file
    cannot be read or is not UTF-8 text.
    """
    # A newline before the text and a separator after it: so every document is between two separators.
    rest, starts, selected = "\n", True, True
    separator = _SEPARATOR if text.lines is None else _LINE_END
    for block in itertools.chain(_read_blocks(text, block_bytes), [f"\n{SEPARATOR}\n"]):
        *ended, rest = separator.split(rest + block)
        for part in ended:
            document = _remove_first_newline(part) if starts else part
            selected = text.contains(document) if starts else selected
            if selected and (document.strip() or not starts):
                yield Piece(document, True)
            starts = True
        # The last characters may be the beginning of a separator.
        while len(rest) > block_bytes + _LONGEST:
            # A token rarely continues over a space, so the ids of the pieces are those of the document.
            cut = rest.rfind(" ", 1, block_bytes)
            cut = cut if cut > 0 else block_bytes
            part = _remove_first_newline(rest[:cut]) if starts else rest[:cut]
            selected = text.contains(part) if starts else selected
            if selected:
                yield Piece(part, False)
            rest, starts = rest[cut:], False


def _remove_first_newline(text: str) -> str:
    return text.removeprefix("\r").removeprefix("\n")


def _read_blocks(text: TextRange, block_bytes: int) -> Iterator[str]:
    """The text of a range without a byte-order mark, about `block_bytes` at a time."""
    name, decoder = escape_control_chars(text.path), codecs.getincrementaldecoder("utf-8")()
    with open_text(text.path) as file:
        position = file.seek(text.start)
        while data := file.read(min(block_bytes, text.end - position)):
            at_start, position = position == 0, position + len(data)
            try:
                block = decoder.decode(data, final=position == text.end)
            except UnicodeDecodeError as error:
                offset = position - len(error.object) + error.start
                encoding = "UTF-16" if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) and at_start else "LATIN1"
                raise UserError(
                    f"{name} is not UTF-8 (byte 0x{error.object[error.start]:02x} at offset {offset}): convert text in "
                    f"another encoding with `iconv -f {encoding} -t UTF-8 OLD > NEW`; export other files as text",
                    DATA,
                ) from None
            if "\0" in block:
                raise UserError(f"{name} is a binary file (it has a NUL byte): give a file of UTF-8 text", DATA)
            yield block.removeprefix("\ufeff") if at_start else block


@contextmanager
def open_text(path: Path) -> Iterator[io.BufferedReader]:
    """Open a file for its bytes. Raises `UserError` (3) if it cannot be read."""
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise UserError(f"cannot read {escape_control_chars(path)}: {os_reason(error)}", DATA) from error


def os_reason(error: Exception) -> str:
    """The operating system's own description of an error."""
    return escape_control_chars(getattr(error, "strerror", None) or getattr(error, "reason", None) or error)
