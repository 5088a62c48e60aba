"""Text files: documents are the same however a file is read in blocks; unusable files are one clear line."""

from __future__ import annotations

import os
import re
import tracemalloc
from pathlib import Path

import pytest
import regex  # type: ignore[import-untyped, unused-ignore]
from hypothesis import example, given, settings
from hypothesis import strategies as st

from common.errors import DATA, UserError
from data.text_files import SEPARATOR, TextRange, find_files, find_separators, read_documents, sample_text
from tests.data.texts import data_error, documents, write, write_range

FRAGMENTS = [
    SEPARATOR, f"\n{SEPARATOR}\n", f"\r\n{SEPARATOR}\r\n", "<|endof", f"x{SEPARATOR}", "\n", "\r\n", "\r", " ", "   ",
    "\t", "a", "word", "It's", "123456", "!?", "//", "é", "שלום", "你好", "。", "한국", "😀", "\u00a0", "\u3000",
    "\u2028", "\u0301", "ﬁ",
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(FRAGMENTS), max_size=40).map("".join)
INVALID = [b"\xff", b"\xe9", b"\x80", b"\xe2\x82", b"\xf0\x9f\x98", b"\xed\xa0\x80", b"\x80" * 9]
# The pre-tokenization patterns of GPT-2, cl100k and o200k.
WORDS = r"[^\r\n\p{L}\p{N}]?"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TAIL = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PATTERNS = {
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "cl100k": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
    "o200k": rf"{WORDS}{UPPER}*{LOWER}+{TAIL}|{WORDS}{UPPER}+{LOWER}*{TAIL}|\p{{N}}{{1,3}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}


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
@example("éééé<|endoftext|>\n" + "é" * 20, 4)
def test_documents_do_not_depend_on_the_block_size(path: Path, text: str, block_bytes: int) -> None:
    span = write_range(path, text)
    assert [d for d in documents([span], block_bytes) if d.strip()] == reference(text)
    assert all(len(piece.text.encode()) <= block_bytes for piece in read_documents(span, block_bytes))


@settings(max_examples=200, deadline=None)
@given(TEXTS, st.integers(1, 60))
def test_separators_are_found_wherever_the_search_starts(path: Path, text: str, step: int) -> None:
    span = write_range(path, text)
    found = [s for low in range(0, span.end, step) for s in find_separators(span, low, min(span.end, low + step))]
    edges = [0, *(edge for separator in found for edge in separator), span.end]
    ranges = [TextRange(path, start, max(start, end)) for start, end in zip(edges[::2], edges[1::2], strict=True)]
    assert [d for d in documents(ranges) if d.strip()] == reference(text)


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(FRAGMENTS[5:]), st.sampled_from(["", "", " x", "x\n", "שx "])),
        min_size=8,
        max_size=40,
    )
)
def test_no_pre_token_crosses_a_cut(path: Path, pattern: str, fragments: list[tuple[str, str]]) -> None:
    # A safe place every few bytes, so that every cut can be safe.
    text = "".join(a + b + (" ok " if i % 2 == 0 else "") for i, (a, b) in enumerate(fragments)) + "end"
    split = regex.compile(pattern).findall
    pieces = read_documents(write_range(path, text), 48)
    assert [word for piece in pieces for word in split(piece.text)] == split(text)


def test_memory_does_not_grow_with_the_file(path: Path) -> None:
    span = write_range(path, b"a line without an end " * 400_000)  # 8.8 MB, one document
    tracemalloc.start()
    n_bytes = sum(len(piece.text) for piece in read_documents(span, 64 * 1024))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n_bytes == span.end and peak < 1_000_000


def test_sample_is_spread_over_the_text(path: Path, tmp_path: Path) -> None:
    line = "about sixty bytes of text, to fill a file of ten megabytes: {:08d}\n"
    span = write_range(path, "".join(line.format(i) for i in range(150_000)))
    text = "".join(sample_text([span], 3 << 20))
    assert 2.9e6 < len(text) < 4.3e6
    assert line.format(3) in text and any(line.format(i) in text for i in range(100_000, 150_000))
    assert "".join(sample_text([span], 1 << 30)).encode() == path.read_bytes()
    small = [write_range(tmp_path / f"{i}.txt", f"{i:05d} " * 100) for i in range(100)]
    sampled = "".join(sample_text(small, 10_000))
    assert 9_000 < len(sampled) < 12_000 and "00000" in sampled and "0009" in sampled


@settings(max_examples=200, deadline=None)
@given(TEXTS, st.sampled_from(INVALID), st.integers(0, 200), st.integers(4, 32))
def test_invalid_utf8_is_reported_with_its_offset(
    path: Path, text: str, invalid: bytes, place: int, block_bytes: int
) -> None:
    text = text.replace(SEPARATOR, "-")
    data = text[:place].encode() + invalid + text[place:].encode()
    offset = -1
    try:
        data.decode()
    except UnicodeDecodeError as error:
        offset = error.start
    span = write_range(path, data)
    with pytest.raises(UserError, match=rf"text\.txt.* \(byte 0x{data[offset]:02x} at offset {offset}\)") as caught:
        list(read_documents(span, block_bytes))
    assert caught.value.exit_code == DATA


def test_nul_byte_truncated_and_missing_file(path: Path) -> None:
    span = write_range(path, b"text " * 100 + b"\0" + b"text" * 100)
    with pytest.raises(UserError, match="NUL byte at offset 500"):
        list(read_documents(span, 64))
    with pytest.raises(UserError, match="truncated to 901 bytes"):
        list(read_documents(TextRange(path, 600, 1000), 64))
    with pytest.raises(UserError, match=r"cannot read .*gone\\x1b: No such file"):
        list(read_documents(TextRange(path.parent / "gone\x1b", 0, 10)))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "is empty"),
        (b" \n\n\t", "only white space"),
        (b"\n<|endoftext|>\n\n<|endoftext|>\n", "only white space"),
        (b"x", "too short"),
        (b"GIF89a\x01\0\x01\0\0", "NUL byte at offset 7"),
        ("text".encode("utf-16"), "UTF-16LE.*iconv -f UTF-16LE -t UTF-8"),
        ("\ufefftext".encode("utf-16-be"), "UTF-16BE.*iconv"),
        ("\ufefftext".encode("utf-32-le"), "UTF-32LE.*iconv"),
        ("\ufefftext".encode("utf-32-be"), "UTF-32BE.*iconv"),
        ("café au lait".encode("latin-1"), r"is not UTF-8 \(byte 0xe9 at offset 3\): .*iconv"),
        (b"text " * 4000 + b"\xff", r"\(byte 0xff at offset 20000\)"),
        (b"text " * 4000 + b"\0", "NUL byte at offset 20000"),
        (b"cut at the end \xf0\x9f\x98", r"\(byte 0xf0 at offset 15\)"),
    ],
)
def test_unusable_file_is_one_clear_line(tmp_path: Path, data: bytes, expected: str) -> None:
    message = data_error(write(tmp_path / "odd\x1b[31m\n.txt", data), tmp_path / "cache")
    assert re.search(expected, message) and r"odd\x1b[31m\n.txt" in message


def test_source_without_files_says_what_is_accepted(tmp_path: Path) -> None:
    assert "does not exist; --data.source accepts stories" in data_error(tmp_path / "no\x07where", tmp_path)
    write(tmp_path / "code" / "main.py", "print()")
    message = data_error(tmp_path / "code", tmp_path)
    assert "no file ends in .txt .text .md" in message and "**/*.py" in message
    write(tmp_path / "void" / "empty.txt", "")
    assert "is empty" in data_error(tmp_path / "void", tmp_path)
    assert "is not a regular file" in data_error("/dev/null", tmp_path)
    assert "cannot be read: embedded null byte" in data_error("a\0b", tmp_path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_unreadable_files_and_folders(tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    for folder in "ab":
        write(texts / folder / "part 00.txt", "text")
    (texts / "a" / "part 00.txt").chmod(0)
    assert "part 00.txt: Permission denied" in data_error(texts, tmp_path)
    (texts / "b").chmod(0)
    try:
        assert "cannot read the folder" in data_error(texts, tmp_path)
    finally:
        (texts / "b").chmod(0o700)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of texts and other files."""
    for i in range(10):
        write(tmp_path / "texts" / "ab"[i % 2] / f"part {i:02d}.txt", f"{i} " * 20)
    for name in ("README.MD", "code.py", ".hidden.txt", ".git/message.txt"):
        write(tmp_path / "texts" / name, "# text")
    write(tmp_path / "texts" / "empty.txt", "")
    return tmp_path / "texts"


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.md", None),
        ("*.MD", ["README.MD"]),
        ("*/part 0[0-3].txt", ["a/part 00.txt", "a/part 02.txt", "b/part 01.txt", "b/part 03.txt"]),
        ("**/part ?7.txt", ["b/part 07.txt"]),
        ("a/../**/part 00.txt", ["a/../a/part 00.txt"]),
        (".hid*", [".hidden.txt"]),
        (".git/*", [".git/message.txt"]),
    ],
)
def test_glob(folder: Path, pattern: str, expected: list[str] | None) -> None:
    if expected is None:
        assert "no file matches" in data_error(folder / pattern, folder)
    else:
        assert find_files(f"{folder}/{pattern}") == [folder / name for name in expected]


def test_links_lead_to_each_file_once(folder: Path) -> None:
    plain = [path.resolve() for path in find_files(str(folder))]
    assert len(plain) == 11
    for place in (folder, folder / "a", folder / "b"):
        for name in ("loop", "again"):
            (place / name).symlink_to(folder)
    (folder / "copy.txt").symlink_to(folder / "a" / "part 00.txt")
    (folder / "broken.txt").symlink_to(folder / "nowhere.txt")
    (folder / "itself.txt").symlink_to(folder / "itself.txt")
    assert sorted(path.resolve() for path in find_files(str(folder))) == sorted(plain)
