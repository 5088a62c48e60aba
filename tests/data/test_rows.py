"""Rows and compressed files: the same text through each door, and what is wrong with a file in one line."""

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from data.text_copy import plain_text
from data.text_files import SEPARATOR
from tests.data.texts import data_error, prepared, write

DOCUMENTS = [f'Row {i}: the "fox", the hen,\nand a 🌳 {"x" * i}.' for i in range(40)]


def csv_text(rows: list[dict[str, Any]]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def parquet_bytes(table: dict[str, list[Any]]) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(table), file, row_group_size=7)
    return file.getvalue()


def zstd(data: bytes) -> bytes:
    return bytes(pyarrow.compress(data, "zstd", asbytes=True))


ROWS = [{"id": i, "body": document} for i, document in enumerate(DOCUMENTS)]
FILES = {
    "a.txt": f"\n{SEPARATOR}\n".join(DOCUMENTS).encode(),
    "a.jsonl": "\n".join(map(json.dumps, ROWS)).encode(),
    "a.json": json.dumps(ROWS, indent=1).encode(),
    "texts.json": json.dumps(DOCUMENTS).encode(),
    "a.csv": csv_text(ROWS).encode(),
    "a.parquet": parquet_bytes({"id": list(range(40)), "body": DOCUMENTS}),
}
PACK = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".zst": lambda d: zstd(d[:99]) + zstd(d[99:]),
}


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("name", FILES)
def test_every_door_leads_to_the_same_tokens(name: str, packed: str, tmp_path: Path) -> None:
    expected = prepared(write(tmp_path / "plain.txt", FILES["a.txt"]), tmp_path / "cache")
    path = write(tmp_path / "in" / f"{name}{packed}", PACK[packed](FILES[name]))
    for source in (path, path.parent, path.parent / "*"):
        if (name.endswith(".json") and source == path.parent and not packed) or (name, source) == ("a.txt", path):
            continue  # in a folder, plain .json is code
        found = prepared(source, tmp_path / "cache")
        assert np.array_equal(found.train.tokens, expected.train.tokens)
        assert np.array_equal(found.val.tokens, expected.val.tokens)


def test_field_is_chosen_or_named(tmp_path: Path) -> None:
    rows = [{"title": f"T{i}" * 9, "text": f"text {i}", "n": i} for i in range(9)]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    assert b"text 0" in bytes(prepared(path, tmp_path / "c").train.tokens.astype(np.uint8))
    assert b"T0T0" in bytes(prepared(path, tmp_path / "c", field="title").train.tokens.astype(np.uint8))


def test_separator_in_a_row_does_not_split_it(tmp_path: Path) -> None:
    rows = [{"text": f"one\n{SEPARATOR}\ntwo {i}"} for i in range(20)]
    corpus = prepared(write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows))), tmp_path / "c")
    assert corpus.train.n_documents + corpus.val.n_documents == 20


def test_json_that_is_no_list_of_rows_is_text(tmp_path: Path) -> None:
    path = write(tmp_path / "package.json", json.dumps({"name": "fox", "numbers": list(range(99))}, indent=1))
    assert b'"numbers"' in bytes(prepared(path, tmp_path / "c").train.tokens.astype(np.uint8))


def test_memory_of_a_long_list_is_constant(tmp_path: Path) -> None:
    import tracemalloc

    path = write(tmp_path / "a.json", "[" + ",\n".join(json.dumps({"text": "fox " * 250}) for _ in range(20_000)) + "]")
    tracemalloc.start()
    plain_text(path, "utf-8", "off", tmp_path / "c")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 19e6 and peak < 12e6


GOOD = b'{"text": "good"}\n'
BAD = {
    "field of no row": (
        "a.jsonl",
        GOOD,
        {"field": "body"},
        "line 1 cannot be read: it has no field 'body' but text; name one",
    ),
    "field of no column": ("a.parquet", FILES["a.parquet"], {"field": "txt"}, "no field 'txt' but id, body"),
    "broken json": ("a.jsonl", GOOD * 4 + b'{"text": "x', {}, "line 5 cannot be read: Unterminated string"),
    "broken list": (
        "a.json",
        b'[{"text": "a"}, {"text": 3',
        {},
        "row 2 cannot be read: the list is broken or cut there",
    ),
    "missing comma": ("a.json", b'[{"text": "a"} {"text": "b"}]', {}, "row 1 cannot be read: expected , or ]"),
    "open quote": ("a.csv", b'text\n"abc\n', {}, "line 2 cannot be read: unexpected end of data"),
    "short row": ("a.csv", b"id,text\n1,a\n2\n", {}, "line 3 cannot be read: its 'text' is no text"),
    "null": ("a.parquet", parquet_bytes({"text": ["a", None]}), {}, "row 2 cannot be read: its 'text' is no text"),
    "truncated parquet": ("a.parquet", FILES["a.parquet"][:200], {}, "row 1 cannot be read: "),
    "truncated gz": ("a.txt.gz", gzip.compress(b"text " * 999)[:40], {}, "a.txt.gz is damaged: Compressed file ended"),
    "no gz": ("a.txt.gz", b"text " * 99, {}, "a.txt.gz is damaged: Not a gzipped file"),
    "truncated zst": (
        "a.txt.zst",
        zstd(b"text " * 999)[:-3],
        {},
        "a.txt.zst is damaged: Truncated compressed stream",
    ),
    "no zst": ("a.txt.zst", b"text " * 99, {}, "a.txt.zst is damaged: "),
    "no rows": ("a.jsonl.gz", gzip.compress(b""), {}, "contains no text"),
    "empty shard": ("a.parquet", parquet_bytes({"text": []}), {}, "contains no text"),
    "chat with an id": ("a.jsonl", b'{"messages": [{"role": "user"}], "id": "abc"}', {}, "its 'messages' is no text"),
    "number": ("a.jsonl", b'{"n": 1}', {}, "line 1 cannot be read: it has no field of text"),
}
ROWS_OF_NO_TEXT = ("{", '{"text": null, "id": "abc"}', '{"text": 1}', '{"other": "text"}', "[]", "[" * 99999)
for row in (*ROWS_OF_NO_TEXT, '{"text": "\\ud800"}', '{"text": "\\u0000"}'):
    BAD[row[:20]] = ("a.jsonl", GOOD + b"\n" + row.encode(), {}, "a.jsonl, line 3 cannot be read")


@pytest.mark.parametrize("name", BAD)
def test_bad_file_is_one_clear_line(name: str, tmp_path: Path) -> None:
    file, data, options, words = BAD[name]
    assert words in data_error(write(tmp_path / file, data), tmp_path / "cache", **options)
    assert words == "contains no text" or not [*tmp_path.glob("cache/*/*")]


@pytest.mark.parametrize("name", ["a.parquet", "a.txt.zst"])
def test_missing_package_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    assert "pip install pyarrow" in data_error(write(tmp_path / name, b"x" * 9), tmp_path / "cache")


# The hub


REPOSITORY = {
    None: [
        "README.md",
        "data/train-00000-of-00002.parquet",
        "data/train-00001-of-00002.parquet",
        "data/validation-00000.parquet",
        "sample/10BT/000_00000.parquet",
    ],
    "refs/convert/parquet": ["small/partial-train/0000.parquet", "small/test/0000.parquet"],
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the hub: one dataset, whose every file has a row with the file's name."""

    def list_files(name: str, repo_type: str, revision: str | None) -> list[str]:
        if name != "me/tales":
            raise OSError("404 Client Error: Repository Not Found\nmore")
        return REPOSITORY[revision]

    def download(name: str, file: str, repo_type: str, revision: str | None) -> str:
        data = parquet_bytes({"text": [f"{file} row {i}" for i in range(20)]})
        return str(write(tmp_path / "hub" / file, data))

    monkeypatch.setattr("huggingface_hub.list_repo_files", list_files)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    return tmp_path


@pytest.mark.parametrize(
    ("source", "train", "val"),
    [
        ("hf:me/tales", "data/train-00001-of-00002.parquet", "data/validation-00000.parquet"),
        ("hf:me/tales:sample/10BT", "sample/10BT/000_00000.parquet", "sample/10BT/000_00000.parquet"),
        ("hf:me/tales:small", "small/partial-train/0000.parquet", "small/test/0000.parquet"),
        ("hf:me/tales:validation", "data/validation-00000.parquet", "data/validation-00000.parquet"),
    ],
)
def test_dataset_of_the_hub(source: str, train: str, val: str, hub: Path) -> None:
    corpus = prepared(source, hub / "cache")  # type: ignore[arg-type]
    texts = [bytes(split.tokens.astype(np.uint8)).decode("latin-1") for split in (corpus.train, corpus.val)]
    assert train in texts[0] and val in texts[1]


def test_dataset_that_is_not_there(hub: Path) -> None:
    assert "hf:you/tales cannot be fetched from the hub: 404 Client Error" in data_error("hf:you/tales", hub / "cache")
    message = data_error("hf:me/tales:large", hub / "cache")
    assert "no parquet files of that configuration and split; the dataset has the folders small/" in message
