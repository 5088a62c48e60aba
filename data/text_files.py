"""Which files a source names, and whether they are text.

Where this stands: `corpus.py` asks `find_files` for the files of a path, a folder or a glob, and `whole_file`
for the text of each. It looks at names and at the first few kilobytes; what is wrong further on shows when
the text is read (`documents.py`).
"""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from common.errors import DATA, UserError, escape_control_chars
from data.documents import Span, not_utf8, reading, reason

PROSE = (".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".org")
"""What the names of files end in that are taken from a folder."""

_FIRST_BYTES = 8192
_BYTE_ORDER_MARKS = (  # the longer ones first: UTF-32LE begins as UTF-16LE does
    (b"\xff\xfe\0\0", "UTF-32LE"),
    (b"\0\0\xfe\xff", "UTF-32BE"),
    (b"\xff\xfe", "UTF-16LE"),
    (b"\xfe\xff", "UTF-16BE"),
)
_UTF8_MARK = b"\xef\xbb\xbf"


def find_files(source: str) -> list[Path]:
    """The files of text that a path, a folder or a glob names, sorted; empty ones are passed over.

    Raises `UserError` (3) when there are none.
    """
    path = Path(os.path.expanduser(source))
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        if not glob.has_magic(source):
            why = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read: {reason(error)}"
            accepted = "--data.source takes stories, repeats, shakespeare, a text file, a folder, or a glob"
            raise UserError(f"{escape_control_chars(source)} {why}; {accepted}", DATA) from error
        found, wanted = _matching(path), "matches it; ** stands for folders of any depth"
    else:
        if stat.S_ISDIR(mode):
            found = (file for file in _below(path) if file.name.lower().endswith(PROSE))
            wanted = (
                f"ends in {' '.join(PROSE)}; name others with a glob, such as '{escape_control_chars(source)}/**/*.py'"
            )
        elif stat.S_ISREG(mode):
            found, wanted = iter([path]), ""
        else:
            raise UserError(f"{escape_control_chars(source)} is no regular file; give a file of UTF-8 text", DATA)
    files = _distinct(found)
    if not files:
        raise UserError(f"no text found for {escape_control_chars(source)}: no file {wanted}", DATA)
    if not (filled := [file for file in files if file.stat().st_size]):
        raise UserError(f"{escape_control_chars(source)} is empty: there is no text to train on", DATA)
    return filled


def _matching(pattern: Path) -> Iterator[Path]:
    """What a glob matches. As in a shell, `*` matches nothing hidden; `**` stands for any number of folders.

    Unlike `glob.glob` it ends in any tangle of links.
    """
    root = Path(pattern.anchor)
    parts = pattern.parts[1:] if pattern.anchor else pattern.parts
    places = [root]
    for position, part in enumerate(parts):
        last = position == len(parts) - 1
        if part == "**":
            places = [found for place in places for found in (_below(place) if last else _folders_below(place))]
        elif glob.has_magic(part):
            places = [
                place / name
                for place in places
                if os.path.isdir(place)
                for name in _names(place)
                if fnmatchcase(name, part) and (part.startswith(".") or not name.startswith("."))
            ]
        else:
            places = [place / part for place in places]
    return iter(places)


def _below(folder: Path) -> Iterator[Path]:
    """What lies below a folder, at any depth, and is not hidden."""
    for place in _folders_below(folder):
        yield from (place / name for name in _names(place) if not name.startswith("."))


def _folders_below(folder: Path) -> Iterator[Path]:
    """A folder and those below it that are not hidden. Links are followed, but no folder is entered twice."""
    entered: set[str] = set()
    waiting = [folder] if os.path.isdir(folder) else []
    while waiting:
        place = waiting.pop()
        real = os.path.realpath(place)
        if real not in entered:
            entered.add(real)
            yield place
            inside = (place / name for name in reversed(_names(place)) if not name.startswith("."))
            waiting += (path for path in inside if os.path.isdir(path))


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise UserError(f"cannot read the folder {escape_control_chars(folder)}: {reason(error)}", DATA) from error


def _distinct(paths: Iterable[Path]) -> list[Path]:
    """The regular files among them, sorted; each once, however many links lead to it: not in both splits."""
    files = {os.path.realpath(path): path for path in sorted(paths, reverse=True) if os.path.isfile(path)}
    return sorted(files.values())


def whole_file(path: Path) -> Span:
    """A file as a span, the byte-order mark left out; its first bytes are looked at to see that it is text.

    Raises `UserError` (3).
    """
    with reading(path) as file:
        head = file.read(_FIRST_BYTES)
        size = os.fstat(file.fileno()).st_size
    if encoding := _wide_encoding(head):
        raise UserError(
            f"{escape_control_chars(path)} is {encoding}, and only UTF-8 is read: convert it with "
            f"`iconv -f {encoding} -t UTF-8 OLD > NEW`",
            DATA,
        )
    if (nul := head.find(0)) >= 0:
        raise UserError(
            f"{escape_control_chars(path)} is a binary file (NUL byte at offset {nul}): give a file of UTF-8 text", DATA
        )
    try:
        head.decode()
    except UnicodeDecodeError as error:
        # A character that the end of these first bytes cuts in two is no error.
        if size <= len(head) or error.reason != "unexpected end of data":
            raise not_utf8(path, error.start, head[error.start]) from None
    return Span(path, len(_UTF8_MARK) if head.startswith(_UTF8_MARK) else 0, size)


def _wide_encoding(head: bytes) -> str | None:
    """The name of an encoding with two or four bytes for a character: known by its byte-order mark or, for
    text that is mostly Latin letters, by where its NUL bytes are."""
    for mark, name in _BYTE_ORDER_MARKS:
        if head.startswith(mark):
            return name
    lanes = [head[lane : len(head) // 4 * 4 : 4] for lane in range(4)]
    shares = [lane.count(0) / max(1, len(lane)) for lane in lanes]
    pattern = "".join("0" if share > 0.6 else "x" if share < 0.1 else "?" for share in shares)
    return {"x0x0": "UTF-16LE", "0x0x": "UTF-16BE", "x000": "UTF-32LE", "000x": "UTF-32BE"}.get(pattern)
