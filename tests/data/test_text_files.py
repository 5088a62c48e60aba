"""Text files: documents are the same however a file is read in blocks; unusable files are one clear line."""

from __future__ import annotations

import os
import re
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from common.errors import DATA, UserError
from data.text_files import SEPARATOR, find_files, read_documents
from tests.data.texts import data_error, documents, write, write_range

FRAGMENTS = [
    SEPARATOR, f"\n{SEPARATOR}\n", f"\r\n{SEPARATOR}\r\n", "<|endof", f"x{SEPARATOR}", "\n", "\r\n", " ", "   ",
    "\t", "a", "word", "123456", "é", "שלום", "你好", "😀", "\u00a0", "\u2028",
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(FRAGMENTS), max_size=40).map("".join)
INVALID = [b"\xff", b"\xe9", b"\x80", b"\xe2\x82", b"\xf0\x9f\x98", b"\xed\xa0\x80", b"\x80" * 9]


def reference(text: str) -> list[str]:
    """The documents of a text, line by line and without streaming."""
    split, lines = [], text.split("\n")
    current: list[str] = []
    for number, line in enumerate(lines):
        if line == SEPARATOR or (line == SEPARATOR + "\r" and number < len(lines) - 1):
            split.append("\n".join(current).removesuffix("\r"))
            current = []
        else:
            current.append(line)
    return [document for document in [*split, "\n".join(current)] if document.strip()]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("documents") / "text.txt"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one\n<|endoftext|>\ntwo", ["one", "two"]),
        ("one\n<|endoftext|>\n<|endoftext|>\n\n<|endoftext|>\ntwo\n<|endoftext|>\n", ["one", "two"]),
        ("<|endoftext|>\n one \n\n<|endoftext|>", [" one \n"]),
        ("one\r\ntwo\r\n<|endoftext|>\r\nthree\r\n", ["one\r\ntwo", "three\r\n"]),
        ("one <|endoftext|>\ntwo<|endoftext|>", ["one <|endoftext|>\ntwo<|endoftext|>"]),
        ("one\n<|endoftext|> \ntwo", ["one\n<|endoftext|> \ntwo"]),
        ("\n\none\n<|endoftext|>\n\n two", ["\n\none", "\n two"]),
        (" \n\n", []),
    ],
)
def test_separators_and_their_newlines_are_not_text(path: Path, text: str, expected: list[str]) -> None:
    assert documents([write_range(path, text)]) == expected


@settings(max_examples=300, deadline=None)
@given(TEXTS, st.integers(4, 64))
@example("word\n<|endoftext|>\nword", 4)
@example("\r\n<|endoftext|>\r\n" * 3, 16)
def test_documents_do_not_depend_on_the_block_size(path: Path, text: str, block_bytes: int) -> None:
    text_range = write_range(path, text)
    assert [d for d in documents([text_range], block_bytes) if d.strip()] == reference(text)
    assert all(len(piece.text) <= 2 * block_bytes + 20 for piece in read_documents(text_range, block_bytes))


def test_memory_does_not_grow_with_the_file(path: Path) -> None:
    text_range = write_range(path, b"a line without an end " * 400_000)  # 8.8 MB, one document
    tracemalloc.start()
    n_bytes = sum(len(piece.text) for piece in read_documents(text_range, 64 * 1024))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n_bytes == text_range.end and peak < 1_000_000


@settings(max_examples=200, deadline=None)
@given(TEXTS, st.sampled_from(INVALID), st.integers(0, 200), st.integers(4, 32))
def test_invalid_utf8_is_reported_with_its_offset(
    path: Path, text: str, invalid: bytes, place: int, block_bytes: int
) -> None:
    data = text[:place].encode() + invalid + text[place:].encode()
    offset = -1
    try:
        data.decode()
    except UnicodeDecodeError as error:
        offset = error.start
    with pytest.raises(UserError, match=rf"text\.txt.* \(byte 0x{data[offset]:02x} at offset {offset}\)") as caught:
        list(read_documents(write_range(path, data), block_bytes))
    assert caught.value.exit_code == DATA


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "no text found.*a text file, a folder, or a glob"),
        (b" \n\n\t", "contains no text"),
        (b"x", "contains no text"),
        (b"GIF89a\x01\0\x01\0\0", "binary file"),
        ("text".encode("utf-16"), "is not UTF-8.*iconv -f UTF-16 -t UTF-8"),
        ("\ufefftext".encode("utf-16-be"), "is not UTF-8.*iconv -f UTF-16 -t UTF-8"),
        ("café au lait".encode("latin-1"), r"is not UTF-8 \(byte 0xe9 at offset 3\): .*iconv -f LATIN1"),
        (b"cut at the end \xf0\x9f\x98", r"\(byte 0xf0 at offset 15\)"),
    ],
)
def test_unusable_file_is_one_clear_line(tmp_path: Path, data: bytes, expected: str) -> None:
    message = data_error(write(tmp_path / "odd\x1b[31m\n.txt", data), tmp_path / "cache")
    assert re.search(expected, message) and r"odd\x1b[31m\n.txt" in message


def test_source_without_files_says_what_is_accepted(tmp_path: Path) -> None:
    accepted = "matches it; name a text file"
    assert accepted in data_error(tmp_path / "no\x07where", tmp_path)
    assert accepted in data_error(tmp_path / "*.md", tmp_path) and accepted in data_error("/dev/null", tmp_path)
    write(tmp_path / "code" / "main.py", "print()")
    write(tmp_path / "code" / "empty.txt", "")
    message = data_error(tmp_path / "code", tmp_path)
    assert "no file that has text ends in .txt .text .md" in message and "**/*.py" in message


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_unreadable_files_and_folders(tmp_path: Path) -> None:
    folder = write(tmp_path / "texts" / "part.txt", "text").parent
    for path, error in ((folder / "part.txt", "part.txt: Permission denied"), (folder, "texts: Permission denied")):
        path.chmod(0)
        try:
            assert error in data_error(folder, tmp_path)
        finally:
            path.chmod(0o700)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of texts and other files, some of them linked."""
    texts = tmp_path / "texts"
    for i in range(10):
        write(texts / "ab"[i % 2] / f"part {i:02d}.txt", f"{i} " * 20)
    for name in ("README.MD", "code.py", ".hidden.txt", ".git/message.txt"):
        write(texts / name, "# text")
    write(texts / "empty.txt", "")
    for place in (texts, texts / "a"):
        (place / "loop").symlink_to(texts)
    (texts / "copy.txt").symlink_to(texts / "a" / "part 00.txt")
    (texts / "broken.txt").symlink_to(texts / "nowhere.txt")
    (texts / "itself.txt").symlink_to(texts / "itself.txt")
    return texts


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("", ["README.MD", *(f"{'ab'[i % 2]}/part {i:02d}.txt" for i in (0, 2, 4, 6, 8, 1, 3, 5, 7, 9))]),
        ("*.MD", ["README.MD"]),
        ("*/part 0[0-3].txt", ["a/part 00.txt", "a/part 02.txt", "b/part 01.txt", "b/part 03.txt"]),
        ("b/**/part ?7.txt", ["b/part 07.txt"]),
        ("a/../b/part 01.txt", ["a/../b/part 01.txt"]),
        (".hid*", [".hidden.txt"]),
        (".git/*", [".git/message.txt"]),
    ],
)
def test_files_of_a_folder_or_a_glob(folder: Path, pattern: str, expected: list[str]) -> None:
    assert find_files(f"{folder}/{pattern}".rstrip("/")) == [folder / name for name in expected]
