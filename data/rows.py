"""Files of rows: `.jsonl`, `.json` (a list), `.csv` and `.parquet`. Each row is a document; they are read in constant memory."""

import csv
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from common.errors import DATA, UserError, warn
from data.text_files import import_pyarrow

ROWS = (".jsonl", ".json", ".csv", ".parquet")
FIELDS = ("text", "content")  # taken if no field is named
MAX_ROW_CHARACTERS = 1 << 26
csv.field_size_limit(MAX_ROW_CHARACTERS)


class RowError(ValueError):
    """A row that cannot be read: its number, and the problem."""


def read_rows(path: Path, blocks: Iterable[str], field: str) -> Iterator[str]:
    """The documents of a file of rows: the field `field` of each, else `text` or `content`, else the longest of the first row.

    `blocks` are the text of the file, which is not used for parquet.
    Raises `UserError` (3): a row that cannot be read or has no such text, with its number; a missing package.
    """
    kind = path.suffix.lower()
    what = "line" if kind in (".jsonl", ".csv") else "row"
    reader = {".jsonl": _json_lines, ".json": _json_list, ".csv": _csv_rows}.get(kind)
    try:
        for number, row in reader(blocks) if reader else _parquet_rows(path, field):
            if not field:
                field = _choose_field(row, number)
                warn(f"{path}: each row is a document, its '{field}'")
            yield _document(row, field, number)
    except RowError as error:
        number, problem = error.args
        raise UserError(f"{path}, {what} {number} cannot be read: {str(problem)[:300]}", DATA) from None


def _document(row: Any, field: str, number: int) -> str:
    if isinstance(row, Mapping) and field not in row:
        raise RowError(number, f"it has no field '{field}' but {', '.join(map(str, row))}; name one with --data.field")
    document = row[field] if isinstance(row, Mapping) else row
    if not isinstance(document, str):
        raise RowError(number, f"its '{field}' is no text; correct or remove it, or name another with --data.field")
    if "\0" in document or any("\ud800" <= character <= "\udfff" for character in document):
        raise RowError(number, "it has a NUL character or half of a surrogate pair; correct or remove it")
    return document


def _choose_field(row: Any, number: int) -> str:
    if isinstance(row, str):
        return "text"
    texts = [name for name, value in row.items() if isinstance(value, str)] if isinstance(row, Mapping) else []
    if not texts:
        raise RowError(number, "it has no field of text")
    longest = max(row, key=lambda name: len(row[name] if name in texts else json.dumps(row[name], default=str)))
    return next((name for name in FIELDS if name in row), longest)


def lines_of(blocks: Iterable[str]) -> Iterator[str]:
    """Lines without their newlines."""
    rest = ""
    for block in itertools.chain(blocks, ["\n"]):
        *lines, rest = (rest + block).split("\n")
        yield from lines


def _json_lines(blocks: Iterable[str]) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(lines_of(blocks), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise RowError(number, error) from None


def _json_list(blocks: Iterable[str]) -> Iterator[tuple[int, Any]]:
    """The elements of a JSON list, one at a time."""
    decoder, text, number, start = json.JSONDecoder(), "", 0, 0
    for block in blocks:
        text, start = text[start:] + block, 0
        if number == 0 and text.lstrip():
            number, start = 1, text.index("[") + 1
        while number and (start := _skip_space(text, start)) < len(text) and text[start] != "]":
            try:
                row, end = decoder.raw_decode(text, start)
            except (ValueError, RecursionError) as error:
                if len(text) > MAX_ROW_CHARACTERS or isinstance(error, RecursionError):
                    raise RowError(number, error) from None
                break  # the row continues in the next block
            if (end := _skip_space(text, end)) == len(text):
                break
            if text[end] not in ",]":
                raise RowError(number, f"expected , or ] after it, found {text[end]!r}")
            yield number, row
            start, number = end + (text[end] == ","), number + 1
    if text[start : start + 1] != "]":
        raise RowError(number, "the list is broken or cut there")


def _skip_space(text: str, start: int) -> int:
    while start < len(text) and text[start].isspace():
        start += 1
    return start


def _csv_rows(blocks: Iterable[str]) -> Iterator[tuple[int, Any]]:
    reader = csv.DictReader((f"{line}\n" for line in lines_of(blocks)), strict=True)
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise RowError(reader.line_num + 1, error) from None


def _parquet_rows(path: Path, field: str) -> Iterator[tuple[int, Any]]:
    pyarrow, parquet, number = import_pyarrow(path), import_pyarrow(path, "pyarrow.parquet"), 0
    try:
        with parquet.ParquetFile(path) as file:
            if field and field not in file.schema_arrow.names:
                yield 1, dict.fromkeys(file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=1024, columns=[field] if field else None):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        raise RowError(number + 1, error) from error
