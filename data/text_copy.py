"""Compressed text, text in other encodings, rows and lists of lines are copied into the cache once: `text-<key>/NAME`.

A copy is UTF-8 text. Its documents are the rows or lines, with a separator after each.
"""

import codecs
import gzip
import hashlib
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from common.errors import DATA, UserError, warn
from common.files import remove_temporary_files, write_atomic
from data.rows import ROWS, lines_of, read_rows
from data.text_files import (
    BLOCK_BYTES,
    COMPRESSED,
    SEPARATOR,
    TextRange,
    import_pyarrow,
    is_utf8,
    open_text,
    read_blocks,
)
from data.tokenizer import progress_bar

START_BYTES = 65_536  # of a file that say how it is read
_MARKS = (  # the mark of UTF-32 starts with that of UTF-16
    *((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32")),
    *((codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16")),
)
_SEPARATOR_LINE = re.compile(rf"^{re.escape(SEPARATOR)}$", re.MULTILINE)  # in a row, which is one document
# A name, a word or a title of a list (of up to four words): not a verse, a sentence, code, a log or a table.
_ENTRY = re.compile(r"(?=.*[^\W\d_])\w[^\t,;:=<>{}|\u3000-\u303f\uff01-\uff1f]*(?<![.!?\u2026\u0964])")


def plain_text(path: Path, encoding: str, lines: str, cache: Path, field: str = "") -> Path:
    """The file itself if it is UTF-8 text, else its copy; a byte-order mark overrides `encoding`.

    Each line is a document if `lines` is `on`, or `auto` and the file begins as a list; so is each row, by its `field`.

    Raises `UserError`: a text that cannot be decoded, a bad row (3); no space (6).
    """
    path = decompress(path, cache)
    with open_text(path) as file:
        start = file.read(START_BYTES)
        codec = find_codec(start, encoding)
        has_rows = path.suffix.lower() in ROWS and (path.suffix.lower() != ".json" or is_json_list(start, codec))
        whole = start.decode(codec, "replace").splitlines()[: -1 if len(start) == START_BYTES else None]
        has_lines = not has_rows and (lines == "on" or (lines == "auto" and is_list(whole)))
        if codec == "utf-8" and not has_rows and not has_lines:
            return path
        is_wide = codec.startswith(("utf-16", "utf-32"))  # ASCII is the same text in the other encodings
        if (is_wide or not start.isascii()) and not codec.startswith("utf-8") and is_utf8(start):
            warn(f"{path} is UTF-8, but is read as {encoding}")
        file.seek(0)
        key = hashlib.file_digest(file, "sha256")
        size = file.tell()
    key.update(f"{codec} {has_rows} {has_lines} {field}".encode())
    copy = cache / f"text-{key.hexdigest()[:20]}" / path.name
    if not copy.exists():
        remove_temporary_files(copy.parent)
        texts = _read(TextRange(path, 0, size), codec)
        if has_rows:
            rows = (_SEPARATOR_LINE.sub(f"{SEPARATOR} ", row) for row in read_rows(path, texts, field))
            texts = (f"{row}\n{SEPARATOR}\n" for row in rows)
        elif has_lines:
            texts = _shuffled_lines(texts, path)
        write_atomic(copy, (text.encode() for text in texts))
    return copy


def decompress(path: Path, cache: Path) -> Path:
    """The file itself, or if it is compressed its copy without the suffix. Raises `UserError`: damaged (3), no space (6)."""
    if path.suffix.lower() not in COMPRESSED:
        return path
    with open_text(path) as file:
        key = hashlib.file_digest(file, "sha256").hexdigest()[:20]
    copy = cache / f"text-{key}" / path.stem
    if not copy.exists():
        write_atomic(copy, _decompressed(path))
    return copy


def _decompressed(path: Path) -> Iterator[bytes]:
    with open_text(path) as raw, progress_bar("decompressing", path.stat().st_size, True) as bar:
        is_gzip = path.suffix.lower() == ".gz"
        try:
            with gzip.open(raw) if is_gzip else import_pyarrow(path).input_stream(raw, compression="zstd") as file:
                while block := file.read(BLOCK_BYTES):
                    bar.update(raw.tell() - bar.n)
                    yield block
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path} is damaged: {error}; get it again", DATA) from error


def find_codec(start: bytes, encoding: str) -> str:
    """The name of Python's codec for a text that begins with `start`."""
    return next((name for mark, name in _MARKS if start.startswith(mark)), codecs.lookup(encoding).name)


def is_json_list(start: bytes, codec: str) -> bool:
    """Whether a `.json` file begins as a list of objects or texts; another one is text as it is."""
    return bool(re.match(r"\s*\[\s*[{\"]", start.decode(codec, "replace").removeprefix("\ufeff")))


def is_list(lines: list[str]) -> bool:
    """Whether nearly all of at least 100 lines are short entries, few of them equal."""
    entries = sum(len(x.encode()) <= 40 and x.count(" ") < 4 and bool(_ENTRY.fullmatch(x)) for x in lines)
    return len(lines) >= 100 and entries >= 0.95 * len(lines) and len(set(lines)) >= 0.8 * len(lines)


def _read(text: TextRange, codec: str) -> Iterator[str]:
    with progress_bar("copying the text", text.n_bytes, True) as bar:
        for block in read_blocks(text, BLOCK_BYTES, codec):
            yield block
            bar.update(BLOCK_BYTES)


def _shuffled_lines(blocks: Iterable[str], path: Path) -> Iterator[str]:
    """The lines that are not blank and a separator after each, by their hash: a part of a sorted list is like the rest."""
    warn(f"{path}: each line is a document")
    lines = (line for line in lines_of(blocks) if line.strip() and line != SEPARATOR)
    for line in sorted(lines, key=lambda line: hashlib.sha256(line.encode()).digest()):
        yield f"{line}\n{SEPARATOR}\n"
