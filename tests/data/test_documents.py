"""Documents out of files: however a file is cut into blocks and jobs, it reads the same."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import pytest
import regex  # type: ignore[import-untyped, unused-ignore]
from hypothesis import example, given, settings
from hypothesis import strategies as st

from common.errors import DATA, UserError
from data import documents
from data.documents import DOCUMENT_SEPARATOR, Span, jobs, read_documents, sample, split_span

FRAGMENTS = [
    DOCUMENT_SEPARATOR, f"\n{DOCUMENT_SEPARATOR}\n", f"\r\n{DOCUMENT_SEPARATOR}\r\n", "<|endof",
    f"x{DOCUMENT_SEPARATOR}", "\n", "\r\n", "\r", " ", "   ", "\t", "a", "word", "It's", "123456", "!?", "//",
    "é", "שלום", "你好", "。", "한국", "😀", "\u00a0", "\u3000", "\u2028", "\u0301", "ﬁ",
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(FRAGMENTS), max_size=40).map("".join)
BROKEN = [b"\xff", b"\xe9", b"\x80", b"\xe2\x82", b"\xf0\x9f\x98", b"\xed\xa0\x80", b"\x80" * 9]
# What GPT-2, cl100k and o200k cut text into before they look for tokens.
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
    found, lines = [], text.split("\n")
    current: list[str] = []
    for number, line in enumerate(lines):
        if line == DOCUMENT_SEPARATOR or (line == DOCUMENT_SEPARATOR + "\r" and number < len(lines) - 1):
            found.append("\n".join(current).removesuffix("\r"))
            current = []
        else:
            current.append(line)
    return [document for document in [*found, "\n".join(current)] if document.strip()]


def read(spans: Iterable[Span], block_bytes: int = 1 << 20) -> list[str]:
    found, parts = [], []
    for span in spans:
        for piece in read_documents(span, block_bytes):
            parts.append(piece.text)
            if piece.ends_document:
                found.append("".join(parts))
                parts = []
    assert not parts, "the last document has no end"
    return [document for document in found if document.strip()]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("documents") / "text.txt"


def whole(path: Path, text: str | bytes) -> Span:
    data = text.encode() if isinstance(text, str) else text
    path.write_bytes(data)
    return Span(path, 0, len(data))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one\n<|endoftext|>\ntwo", ["one", "two"]),
        ("one\n<|endoftext|>\n<|endoftext|>\n\n<|endoftext|>\ntwo\n<|endoftext|>\n", ["one", "two"]),
        ("<|endoftext|>\n one \n\n<|endoftext|>", [" one \n"]),
        ("one\r\ntwo\r\n<|endoftext|>\r\nthree\r\n", ["one\r\ntwo", "three\r\n"]),
        ("one <|endoftext|>\ntwo<|endoftext|>", ["one <|endoftext|>\ntwo<|endoftext|>"]),
        ("one\n<|endoftext|> \ntwo", ["one\n<|endoftext|> \ntwo"]),
        (" \n\n", []),
    ],
)
def test_separator_lines_and_the_newlines_around_them_belong_to_no_document(
    path: Path, text: str, expected: list[str]
) -> None:
    span = whole(path, text)
    assert read([span]) == expected
    assert [piece.text for piece in read_documents(span)] == expected  # blank documents are passed over


@settings(max_examples=300, deadline=None)
@given(TEXTS, st.integers(4, 64))
@example("word\n<|endoftext|>\nword", 4)
@example("\r\n<|endoftext|>\r\n" * 3, 16)
@example("éééé<|endoftext|>\n" + "é" * 20, 4)  # a cut falls before what is no separator
def test_blocks_of_any_size_give_the_same_documents(path: Path, text: str, block_bytes: int) -> None:
    span = whole(path, text)
    assert read([span], block_bytes) == reference(text)
    assert all(len(piece.text.encode()) <= block_bytes for piece in read_documents(span, block_bytes))


@settings(max_examples=300, deadline=None)
@given(TEXTS, st.integers(4, 64), st.integers(1, 40), st.integers(4, 64))
def test_jobs_of_any_size_give_the_same_documents(
    path: Path, text: str, job_bytes: int, window: int, block_bytes: int
) -> None:
    span = whole(path, text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "_WINDOW", window)
        parts = list(split_span(span, job_bytes))
    assert read(parts, block_bytes) == reference(text)
    assert all(part.end - part.start <= job_bytes + window + 40 for part in parts)
    for before, after in pairwise(parts):
        assert before.end <= after.start and before.ends_document == after.starts_document


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(FRAGMENTS[5:]), st.sampled_from(["", "", " x", "x\n", "שx "])),
        min_size=8,
        max_size=40,
    )
)
def test_no_word_lies_across_a_cut(path: Path, pattern: str, fragments: list[tuple[str, str]]) -> None:
    # A safe place every few bytes, so that every cut can be one.
    text = "".join(a + b + (" ok " if i % 2 == 0 else "") for i, (a, b) in enumerate(fragments)) + "end"
    span = whole(path, text)
    split = regex.compile(pattern).findall
    for pieces in (
        read_documents(span, 48),
        (p for part in split_span(span, 48) for p in read_documents(part)),
    ):
        assert [word for piece in pieces for word in split(piece.text)] == split(text)


@pytest.mark.parametrize(
    ("word", "blank"), [("12.", " "), ("מילה", " "), ("word", "\n"), ("word", "\r\n"), ("x", "\t")]
)
def test_a_long_document_comes_in_pieces_that_begin_with_a_blank(path: Path, word: str, blank: str) -> None:
    text = (word + blank) * 2000
    pieces = list(read_documents(whole(path, text), 1000))
    assert len(pieces) > len(text) // 1000 and "".join(piece.text for piece in pieces) == text
    assert [piece.ends_document for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert all(piece.text.startswith(blank) for piece in pieces[1:])


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize(
    "line", ["ok ok!\n", "ok ok!?\r\n\r\n", "é é  \t\n", "ok 12345\n", "ok \u3000\u00a0 ש\n", "ok //\n/"]
)
def test_no_cut_where_some_encoding_sees_one_word(path: Path, pattern: str, line: str) -> None:
    span = whole(path, line * 30)
    split = regex.compile(pattern).findall
    for block_bytes in range(40, 60):
        pieces = read_documents(span, block_bytes)
        assert [word for piece in pieces for word in split(piece.text)] == split(line * 30)


def test_memory_does_not_grow_with_the_file(path: Path) -> None:
    import tracemalloc

    span = whole(path, b"a line without an end " * 400_000)  # 8.8 MB, one document
    tracemalloc.start()
    n_bytes = sum(len(piece.text) for piece in read_documents(span, 64 * 1024))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n_bytes == span.end and peak < 1_000_000


def test_jobs_gather_short_spans_and_keep_the_order(path: Path, tmp_path: Path) -> None:
    long = whole(path, "some words " * 1000)
    spans = [whole(tmp_path / f"{i}", f"text {i}") for i in range(50)]
    made = list(jobs([*spans, long], 2000))
    assert read(span for job in made for span in job) == [f"text {i}" for i in range(50)] + ["some words " * 1000]
    assert made[0] == tuple(spans) and 5 <= len(made) <= 8


def test_a_sample_is_spread_over_the_text(path: Path) -> None:
    line = "about sixty bytes of text, to fill a file of ten megabytes: {:08d}\n"
    span = whole(path, "".join(line.format(i) for i in range(150_000)))
    drawn = "".join(sample([span], 3 << 20))
    assert 2.9e6 < len(drawn) < 3.3e6
    assert any(line.format(i) in drawn for i in range(5)) and any(
        line.format(i) in drawn for i in range(100_000, 110_000)
    )
    assert "".join(sample([span], 1 << 30)).encode() == path.read_bytes()


@settings(max_examples=200, deadline=None)
@given(TEXTS, st.sampled_from(BROKEN), st.integers(0, 200), st.integers(4, 32))
def test_broken_utf8_is_told_with_its_place_in_the_file(
    path: Path, text: str, bad: bytes, place: int, block_bytes: int
) -> None:
    text = text.replace(DOCUMENT_SEPARATOR, "-")
    data = text[:place].encode() + bad + text[place:].encode()
    offset = -1
    try:
        data.decode()
    except UnicodeDecodeError as error:
        offset = error.start
    span = whole(path, data)
    with pytest.raises(UserError, match=rf"text\.txt.* 0x{data[offset]:02x} at offset {offset};") as caught:
        list(read_documents(span, block_bytes))
    assert caught.value.exit_code == DATA
    with pytest.raises(UserError, match=rf" at offset {offset};"):
        [list(read_documents(part, block_bytes)) for part in split_span(span, 20)]


def test_a_nul_byte_a_shorter_file_and_a_lost_one_are_told(path: Path) -> None:
    span = whole(path, b"text " * 100 + b"\0" + b"text" * 100)
    with pytest.raises(UserError, match="NUL byte at offset 500"):
        list(read_documents(span, 64))
    with pytest.raises(UserError, match="ends at byte 901, earlier"):
        list(read_documents(Span(path, 600, 1000), 64))
    with pytest.raises(UserError, match=r"cannot read .*gone\\x1b: No such file"):
        list(read_documents(Span(path.parent / "gone\x1b", 0, 10)))
