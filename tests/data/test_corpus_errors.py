"""Text that cannot be used: it is said in one line what is wrong, where, and what to do."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from data.corpora import open_corpus
from tests.data.texts import documents, refusal, write


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "is empty"),
        (b" \n\n\t", "nothing but white space"),
        (b"\n<|endoftext|>\n\n<|endoftext|>\n", "nothing but white space"),
        (b"x", "too short"),
        (b"GIF89a\x01\0\x01\0\0", "NUL byte at offset 7"),
        ("text".encode("utf-16"), "UTF-16LE.*iconv -f UTF-16LE -t UTF-8"),
        ("\ufefftext".encode("utf-16-be"), "UTF-16BE.*iconv"),
        ("\ufefftext".encode("utf-32-le"), "UTF-32LE.*iconv"),
        ("\ufefftext".encode("utf-32-be"), "UTF-32BE.*iconv"),
        ("some Latin text, no mark".encode("utf-16-le"), "UTF-16LE.*iconv"),
        ("some Latin text, no mark".encode("utf-16-be"), "UTF-16BE.*iconv"),
        ("some Latin text, no mark".encode("utf-32-le"), "UTF-32LE.*iconv"),
        ("some Latin text, no mark".encode("utf-32-be"), "UTF-32BE.*iconv"),
        ("café au lait".encode("latin-1"), "byte 0xe9 at offset 3; .*iconv"),
        (b"text " * 4000 + b"\xff", "byte 0xff at offset 20000;"),
        (b"text " * 4000 + b"\0", "NUL byte at offset 20000"),
        (b"cut at the end \xf0\x9f\x98", "byte 0xf0 at offset 15;"),
    ],
)
def test_what_is_no_text_is_refused_in_one_line(tmp_path: Path, cache: Path, data: bytes, expected: str) -> None:
    path = write(tmp_path / "odd\x1b[31m\n.txt", data)
    message = refusal(path, cache)
    assert re.search(expected, message) and r"odd\x1b[31m\n.txt" in message


def test_a_character_across_the_first_look_is_no_error(tmp_path: Path, cache: Path) -> None:
    for shift in range(4):
        text = "x" * (8192 - shift) + "😀" * 10
        corpus = open_corpus(str(write(tmp_path / "book.txt", text)), 0.5, cache)
        assert "".join(documents(corpus.train + corpus.val)) == text


def test_a_source_that_names_nothing_says_what_would(tmp_path: Path, cache: Path) -> None:
    assert "does not exist; --data.source takes stories" in refusal(tmp_path / "no\x07where", cache)
    write(tmp_path / "code" / "main.py", "print()")
    assert "no file ends in .txt .text .md" in refusal(tmp_path / "code", cache)
    assert "**/*.py" in refusal(tmp_path / "code", cache)
    write(tmp_path / "void" / "empty.txt", "")
    assert "is empty" in refusal(tmp_path / "void", cache)
    assert "is no regular file" in refusal("/dev/null", cache)
    assert "cannot be read: embedded null byte" in refusal("a\0b", cache)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_files_and_folders_that_may_not_be_read_are_told(tmp_path: Path, cache: Path) -> None:
    texts = tmp_path / "texts"
    for folder in "ab":
        write(texts / folder / "part 00.txt", "text")
    (texts / "a" / "part 00.txt").chmod(0)
    assert "part 00.txt: Permission denied" in refusal(texts, cache)
    (texts / "b").chmod(0)
    try:
        assert "cannot read the folder" in refusal(texts, cache)
    finally:
        (texts / "b").chmod(0o700)


def test_a_refused_read_is_told(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise PermissionError(13, "Permission denied")

    write(tmp_path / "book.txt", "text " * 50)
    monkeypatch.setattr(Path, "open", refuse)
    assert "book.txt: Permission denied" in refusal(tmp_path / "book.txt", cache)
