"""Text in other encodings and rows of JSON are copied into the cache as UTF-8 text, once: `text-<key>/rows.jsonl`."""

import codecs
import hashlib
import itertools
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from common.errors import DATA, UserError, escape_control_chars
from common.files import write_atomic
from data.text_files import BLOCK_BYTES, SEPARATOR, TextRange, open_text, read_blocks
from data.tokenizer import progress_bar

MAX_ROW_CHARACTERS = 64 * 1024 * 1024
_MARKS = (  # the mark of UTF-32 starts with that of UTF-16
    *((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32")),
    *((codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16")),
)


def utf8_file(path: Path, encoding: str, cache: Path, write: bool = True) -> Path:
    """The file itself if it is UTF-8 text, else its copy; a byte-order mark goes before `encoding`.

    Raises `UserError`: a text that cannot be decoded, a bad row, no copy and not `write` (3); no space (6).
    """
    has_rows = path.suffix.lower() == ".jsonl"
    with open_text(path) as file:
        start = file.read(4)
        codec = next((name for mark, name in _MARKS if start.startswith(mark)), codecs.lookup(encoding).name)
        if codec == "utf-8" and not has_rows:
            return path
        file.seek(0)
        key = hashlib.file_digest(file, "sha256")
        size = file.tell()
    key.update(f"{codec} {has_rows}".encode())
    copy = cache / f"text-{key.hexdigest()[:20]}" / path.name
    if not copy.exists():
        if not write:
            raise UserError(f"{escape_control_chars(path)} is not prepared yet", DATA)
        blocks = _read(TextRange(path, 0, size), codec)
        write_atomic(copy, _documents(blocks, path) if has_rows else (block.encode() for block in blocks))
    return copy


def _read(text: TextRange, codec: str) -> Iterator[str]:
    with progress_bar("copying the text", text.n_bytes, True) as bar:
        for block in read_blocks(text, BLOCK_BYTES, codec):
            yield block
            bar.update(BLOCK_BYTES)


def _documents(blocks: Iterable[str], path: Path) -> Iterator[bytes]:
    """The text in each row of JSON and a separator. It is in the field `text` or `content`, or in that with the longest
    string in the first row. Raises `UserError` (3)."""
    field = ""
    for number, line in enumerate(_lines(blocks), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            texts = {k: v for k, v in row.items() if isinstance(v, str)} if isinstance(row, dict) else {}
            if texts and not field:
                field = next((k for k in ("text", "content") if k in texts), max(texts, key=lambda k: len(texts[k])))
                print(escape_control_chars(f"{path}: each row is a document, its '{field}'"), file=sys.stderr)
            document = texts[field].encode()
            if b"\0" in document:
                raise ValueError("a NUL character")
        except (ValueError, KeyError, RecursionError) as error:
            what = f"text in '{field}'" if field else "a field of text"
            why = "" if isinstance(error, KeyError) else f" ({error})"
            message = f"{path}, line {number} is not a row of JSON with {what}{why}: correct or remove it"
            raise UserError(escape_control_chars(message), DATA) from None
        yield document + f"\n{SEPARATOR}\n".encode()


def _lines(blocks: Iterable[str]) -> Iterator[str]:
    rest = ""
    for block in itertools.chain(blocks, ["\n"]):
        *lines, rest = (rest + block).split("\n")
        yield from lines
        if len(rest) > MAX_ROW_CHARACTERS:  # no more memory for a row without end: it is no JSON
            yield rest
