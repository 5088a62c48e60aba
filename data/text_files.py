"""Text files: which files a source names, and their documents, streamed in constant memory.

A line that holds only `<|endoftext|>` separates documents. That line, the newline before it and the one after it
belong to no document. Documents of white space alone are skipped.
"""

import codecs
import contextlib
import glob
import importlib
import io
import itertools
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import DATA, UserError
from data.hub import PREFIX, hub_files

SEPARATOR = "<|endoftext|>"  # On a line of its own it ends one document and starts the next.
PROSE = (".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".org", ".jsonl", ".csv", ".parquet")
"""Suffixes of the files that are read from a folder, also compressed, unless it has more of other text."""
COMPRESSED = (".gz", ".zst")
BLOCK_BYTES = 1024 * 1024  # Text that is read at a time.

# The newline after a separator is not consumed: it may be the one before the next separator.
_SEPARATOR = re.compile(rf"\n{re.escape(SEPARATOR)}(?=\n)")
_LONGEST = len(SEPARATOR) + 2
# Without Latin-1: its text is cp1252 too, where bytes 0x80 to 0x9f are quotes and dashes. Without Mac Roman, which
# short texts in cp1252 or cp1254 resemble.
_ENCODINGS = [
    "cp1252", "cp1250", "cp1251", "cp1253", "cp1254", "cp1255", "cp1256", "cp1257", "cp874", "cp866", "cp437", "koi8_r",
    "iso2022_jp", "iso8859_2", "iso8859_5", "gb18030", "big5", "cp932", "euc_jp", "cp949", "utf_16_le", "utf_16_be",
]  # fmt: skip

_NO_TEXT = {"\0": "a NUL byte", "\x1b$B": "an escape of ISO-2022-JP"}  # valid UTF-8, but no text


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


def find_files(source: str, encoding: str) -> list[Path]:
    """The files that a path, a folder, a glob or `hf:NAME` names, sorted; empty ones are skipped.

    Of a folder those of prose if they have most of its text, else all that begin as UTF-8 text, or as text in `encoding`.

    Raises `UserError` (3) if there are none.
    """
    if source.startswith(PREFIX):
        return hub_files(source)
    path = Path(os.path.expanduser(source))
    try:
        paths = [path] if path.exists() else map(Path, glob.iglob(str(path), recursive=True))
        candidates: Iterable[Path] = _texts_below(path, encoding) if path.is_dir() else paths
        # Each file once, however many links lead to it.
        files = {file.resolve(): file for file in sorted(candidates, reverse=True) if file.is_file()}
        non_empty = sorted(file for file in files.values() if file.stat().st_size)
    except (OSError, ValueError) as error:
        where = getattr(error, "filename", None) or source
        raise UserError(f"cannot read {where}: {os_reason(error)}", DATA) from error
    if not non_empty:
        hint = "name a text file, a folder of texts or a glob (or for --data.source: stories, repeats, shakespeare)"
        moved = "after a move give --data.source or --data.val the new place"
        raise UserError(f"no text found for {source}: {hint}; {moved}", DATA)
    return non_empty


def _texts_below(folder: Path, encoding: str) -> list[Path]:
    """The files of text in a folder; none hidden. Raises OSError if an inner folder cannot be read."""

    def fail(error: OSError) -> None:
        raise error

    prose: list[Path] = []
    others: list[Path] = []
    for inner, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(inner, name) for name in names if not name.startswith(".")):
            suffix = Path(path.stem if path.suffix.lower() in COMPRESSED else path.name).suffix.lower()
            if suffix in (*PROSE, *([".json"] if suffix != path.suffix.lower() else [])) and path.is_file():
                prose.append(path)
            elif path.is_file() and _begins_as_text(path, encoding):
                others.append(path)
    n_prose, n_others = (sum(path.stat().st_size for path in paths) for paths in (prose, others))
    return prose if n_prose >= n_others else prose + others


def _begins_as_text(path: Path, encoding: str) -> bool:
    with contextlib.suppress(OSError), path.open("rb") as file:
        start = file.read(4096)
        for codec in ("utf-8", encoding):
            with contextlib.suppress(ValueError):
                return "\0" not in codecs.getincrementaldecoder(codec)().decode(start)
    return False


def read_documents(text: TextRange, block_bytes: int = BLOCK_BYTES) -> Iterator[Piece]:
    """Yield the documents of a range, CR LF and CR as newlines; one longer than `block_bytes` comes in several pieces.

    Holds about two blocks in memory, however long the file and its documents are. Raises `UserError` (3) if the file
    cannot be read or is not UTF-8 text.
    """
    # A newline before the text and a separator after it: so every document is between two separators.
    rest, starts = "\n", True
    for block in itertools.chain(read_blocks(text, block_bytes), [f"\n{SEPARATOR}\n"]):
        *ended, rest = _SEPARATOR.split(rest + block)
        for part in ended:
            document = part.removeprefix("\n") if starts else part
            if document.strip() or not starts:
                yield Piece(document, True)
            starts = True
        # The last characters may be the beginning of a separator.
        while len(rest) > block_bytes + _LONGEST:
            # A token rarely continues over a space, so the ids of the pieces are those of the document.
            cut = rest.rfind(" ", 1, block_bytes)
            cut = cut if cut > 0 else block_bytes
            yield Piece(rest[:cut].removeprefix("\n") if starts else rest[:cut], False)
            rest, starts = rest[cut:], False


def read_blocks(text: TextRange, block_bytes: int, encoding: str = "utf-8") -> Iterator[str]:
    """The text of a range, about `block_bytes` at a time, without a byte-order mark; CR LF and CR become newlines."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder(encoding)(), translate=True)
    with open_text(text.path) as file:
        position = file.seek(text.start)
        while data := file.read(min(block_bytes, text.end - position)):
            at_start, position = position == 0, position + len(data)
            try:
                block = decoder.decode(data, final=position == text.end)
                where = next((what for mark, what in _NO_TEXT.items() if mark in block), "")
            except UnicodeError as error:
                data, at = getattr(error, "object", data), getattr(error, "start", 0)
                where = f"byte 0x{data[at]:02x} at offset {position - len(data) + at}"
                data = data if b"\0" in data else data[data.rfind(b"\n", 0, at) + 1 :]  # not inside of UTF-16
            if where:
                raise UserError(_describe_not_decoded(text.path, encoding, data, where), DATA)
            yield block.removeprefix("\ufeff") if at_start else block


def _describe_not_decoded(path: Path, encoding: str, data: bytes, where: str) -> str:
    """The line about `data` from the file at `path`, which are no text in `encoding`."""
    start = f"{path} is not {encoding.upper()} ({where})"
    replaced = data.decode("utf-8", "replace")
    n_wrong = replaced.count("\ufffd")
    if encoding == "utf-8" and 0 < 10 * n_wrong < len(data) - len(replaced):  # two bytes or more for most other letters
        return f"{start}, although the text around is: correct or remove it"
    guess = guess_encoding(data)
    advice = f"it looks like {guess}: give" if guess else "if it is text, name its encoding:"
    words = re.search(r".{,20}[^\0-\x7f].{,20}", data.decode(guess, "replace") if guess else "")
    read = f'it then reads "{words[0].strip()}"; ' if words else ""
    others = "others: cp1252, gbk, shift_jis, koi8_r, utf-16-le, ..."
    return f"{start}; {advice} --data.encoding {guess or 'NAME'} ({read}{others})"


def is_utf8(data: bytes) -> bool:
    """Whether the bytes, whose last line may be cut within a character, are text in UTF-8."""
    with contextlib.suppress(UnicodeError):
        text = (data.rpartition(b"\n")[0] or data).decode()
        return not any(mark in text for mark in _NO_TEXT)
    return False


def guess_encoding(data: bytes) -> str:
    """UTF-8 if the bytes are, else the most likely encoding by the frequencies of letters; empty if they are no text."""
    from charset_normalizer import from_bytes

    if is_utf8(data):
        return "utf-8"
    data = data[:65536]
    end = len(data) // 2 * 2 if b"\0" in data else data.rfind(b"\n") + 1  # not inside of a character
    matches = from_bytes(data[:end] or data, cp_isolation=_ENCODINGS, preemptive_behaviour=False)
    if not (best := matches.best()):
        return ""
    equal = [match for match in matches if (match.chaos, match.coherence) == (best.chaos, best.coherence)]
    # Western text is often as likely in the encodings of other regions.
    return "cp1252" if any("cp1252" in match.could_be_from_charset for match in equal) else best.encoding


def import_pyarrow(path: Path, module: str = "pyarrow") -> Any:
    """The package that reads the file at `path`. Raises `UserError` (3) if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{path} needs the package pyarrow: pip install pyarrow", DATA) from error


@contextlib.contextmanager
def open_text(path: Path) -> Iterator[io.BufferedReader]:
    """Open a file for its bytes. Raises `UserError` (3) if it cannot be read."""
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise UserError(f"cannot read {path}: {os_reason(error)}", DATA) from error


def os_reason(error: Exception) -> str:
    """The operating system's own description of an error."""
    return str(getattr(error, "strerror", None) or getattr(error, "reason", None) or error)
