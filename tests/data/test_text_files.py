"""Text files: documents are the same however a file is read in blocks; unusable files are one clear line."""

import json
import os
import re
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from common.errors import DATA, UserError
from data.config import DataConfig
from data.text_copy import plain_text
from data.text_files import SEPARATOR, TextRange, find_files, guess_encoding, read_documents
from tests.data.texts import data_error, documents, write, write_range
from tests.runs import user_error

FRAGMENTS = [
    SEPARATOR, f"\n{SEPARATOR}\n", f"\r\n{SEPARATOR}\r\n", "<|endof", f"x{SEPARATOR}", "\n", "\r\n", " ", "   ",
    "\t", "a", "word", "123456", "\r", "é", "שלום", "你好", "😀", "\u00a0", "\u2028",
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(FRAGMENTS), max_size=40).map("".join)
INVALID = [b"\xff", b"\xe9", b"\x80", b"\xe2\x82", b"\xf0\x9f\x98", b"\xed\xa0\x80", b"\x80" * 9]


def reference(text: str) -> list[str]:
    """The documents of a text, line by line and without streaming."""
    split: list[str] = []
    current: list[str] = []
    for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n"):
        if line == SEPARATOR:
            split.append("\n".join(current))
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
        ("one\r\ntwo\r\n<|endoftext|>\r\nthree\r\r\n", ["one\ntwo", "three\n\n"]),
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
    with user_error(DATA, rf"text\.txt.* \(byte 0x{data[offset]:02x} at offset {offset}\)"):
        list(read_documents(write_range(path, data), block_bytes))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "no text found.*a text file, a folder of texts or a glob"),
        (b" \n\n\t", "contains no text"),
        (b"x", "contains no text"),
        (b"GIF89a\x01\0\x01\0\0", "a NUL byte.*if it is text, name its encoding"),
        ("café au lait".encode("latin-1"), r"is not UTF-8 \(byte 0xe9 at offset 3\); .* --data.encoding cp1252"),
        (b"cut at the end \xf0\x9f\x98", r"\(byte 0xf0 at offset 15\)"),
    ],
)
def test_unusable_file_is_one_clear_line(tmp_path: Path, data: bytes, expected: str) -> None:
    message = data_error(write(tmp_path / "odd\x1b[31m\n.txt", data), tmp_path / "cache")
    assert re.search(expected, message) and r"odd\x1b[31m\n.txt" in message


@pytest.mark.parametrize("name", ["rows.jsonl", "blank.txt", "mark.txt", "letter.txt"])
def test_text_that_is_empty_when_read_is_one_clear_line(tmp_path: Path, name: str) -> None:
    data = {"rows.jsonl": b"\n\n", "blank.txt": b" \n\n\t\n", "mark.txt": b"\xff\xfe", "letter.txt": b"x"}[name]
    path, lines = write(tmp_path / name, data), "off" if name == "letter.txt" else "on"
    assert "contains no text" in data_error(path, tmp_path / "cache", tokenizer="bpe", lines=lines)


def test_source_without_files_says_what_is_accepted(tmp_path: Path) -> None:
    write(tmp_path / "code" / "main.pyc", b"\xff\0")
    write(tmp_path / "code" / "empty.txt", "")
    for source in (tmp_path / "no\x07where", tmp_path / "*.md", "/dev/null", tmp_path / "code"):
        assert "name a text file, a folder of texts or a glob" in data_error(source, tmp_path)


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
    assert find_files(f"{folder}/{pattern}".rstrip("/"), "utf-8") == [folder / name for name in expected]


SAMPLES = {
    "cp1252": "« Été » — l’œuvre d’un garçon naïf, où çà ? Les élèves étaient “déjà” là.\n",  # noqa: RUF001
    "cp1250": "Zażółć gęślą jaźń. Wszyscy ludzie rodzą się wolni i równi pod względem swej godności.\n",
    "koi8_r": "Все счастливые семьи похожи друг на друга, каждая несчастливая несчастлива по-своему.\n",  # noqa: RUF001
    "cp1251": "Все счастливые семьи похожи друг на друга, каждая несчастливая несчастлива по-своему.\n",  # noqa: RUF001
    "gb18030": "人人生而自由,在尊严和权利上一律平等。他们赋有理性和良心。\n",
    "big5": "人人生而自由,在尊嚴和權利上一律平等。他們賦有理性和良心。\n",
    "cp932": "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。\n",
    "iso2022_jp": "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。\n",
    "cp949": "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.\n",
    "utf_16_le": "Plain café text.\n",
}


@pytest.mark.parametrize("encoding", SAMPLES)
def test_encoding_is_guessed_and_decoded(tmp_path: Path, encoding: str) -> None:
    text = SAMPLES[encoding] * 20
    path = write(tmp_path / "book.txt", text.encode(encoding))
    message = data_error(path, tmp_path / "cache")
    assert f"it looks like {encoding}: give --data.encoding {encoding} " in message
    assert text.isascii() or re.search(f'it then reads "[^"]*{text[:9]}', message)  # a wrong guess is seen
    assert guess_encoding(path.read_bytes()[:-2]) == encoding  # the held-out text may begin inside of a character
    later = write(tmp_path / "later.txt", f"\n{text}".encode(encoding))
    assert f"it looks like {encoding}: give" in data_error(later, tmp_path / "cache")
    assert documents([text_range(plain_text(path, encoding, "off", tmp_path / "cache"))]) == [text]


@pytest.mark.parametrize("encoding", ["ascii", "big5", "cp1252", "utf-16"])
def test_utf8_text_read_in_another_encoding_is_recognised(tmp_path: Path, encoding: str) -> None:
    path = write(tmp_path / "book.txt", "Wir hören „ja“, und alles wird gut.\n" * 20 + "चुना गया है\n")
    with pytest.raises(UserError, match=r"it looks like utf-8: give --data\.encoding utf-8 "):
        plain_text(path, encoding, "off", tmp_path / "cache")


def test_wrong_byte_in_utf8_is_not_another_encoding(tmp_path: Path) -> None:
    line = "« Été » — l’œuvre d’un garçon naïf\n".encode()  # noqa: RUF001
    path = write(tmp_path / "book.txt", line * 20 + b"caf\xe9\n" + line * 20)
    message = f"book.txt is not UTF-8 (byte 0xe9 at offset {20 * len(line) + 3}), although the text around is: correct"
    assert message in data_error(path, tmp_path / "cache")


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16-le", "utf-8"])
def test_utf8_text_read_in_another_encoding_is_noted(
    tmp_path: Path, encoding: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where it can be decoded, as garbage."""
    plain_text(write(tmp_path / "a.txt", "wild garden\n" * 20), "cp1252", "off", tmp_path / "cache")
    assert not capsys.readouterr().err
    path = write(tmp_path / "book.txt", "Grüße und Küsse\n" * 20)
    plain_text(path, encoding, "off", tmp_path / "cache")
    noted = f"{path} is UTF-8, but is read as {encoding}\n"
    assert capsys.readouterr().err == (noted if encoding != "utf-8" else "")


@pytest.mark.parametrize("name", ["foo", "hex", "rot13", "", "a\0", "undefined", "idna", "punycode"])
def test_unknown_encoding_is_refused(name: str) -> None:
    assert "must be a text encoding of Python" in DataConfig(encoding=name).problems()[0]


def text_range(path: Path) -> TextRange:
    return TextRange(path, 0, path.stat().st_size)


@settings(max_examples=60, deadline=None)
@given(TEXTS, st.sampled_from(["utf-8-sig", "utf-16", "utf-32", "gb18030", "utf-7"]), st.integers(4, 64))
def test_text_of_any_encoding_is_read(path: Path, text: str, encoding: str, block_bytes: int) -> None:
    """A byte-order mark decides, whatever encoding is asked for."""
    marked = encoding in ("utf-8-sig", "utf-16", "utf-32")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.text_copy.BLOCK_BYTES", block_bytes)
        copy = plain_text(write(path, text.encode(encoding)), "utf-8" if marked else encoding, "off", path.parent)
    assert [d for d in documents([text_range(copy)]) if d.strip()] == reference(text)


@pytest.mark.parametrize(
    ("rows", "field"),
    [
        ([{"id": "much longer than the text", "text": "a\r\nb"}, {}, {"text": "é 😀"}], "text"),
        ([{"content": "a", "body": "bbbb"}, {"content": "c"}], "content"),
        ([{"id": "1", "body": "the longest"}, {"id": "a longer one", "body": "c"}], "body"),
    ],
)
def test_rows_of_json_are_documents(
    tmp_path: Path, rows: list[dict[str, str]], field: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "rows.jsonl", "\r\n".join(json.dumps(row) if row else "" for row in rows))
    copy = plain_text(path, "utf-8", "auto", tmp_path / "cache")
    assert documents([text_range(copy)]) == [row[field].replace("\r\n", "\n") for row in rows if row]
    assert capsys.readouterr().err == f"{path}: each row is a document, its '{field}'\n"
    assert plain_text(path, "utf-8", "auto", tmp_path / "cache") == copy and copy.name == path.name
    assert not capsys.readouterr().err


def test_folder_is_read_as_what_most_of_it_is(tmp_path: Path) -> None:
    """Prose, or source code with a README."""
    folder = tmp_path / "src"
    for name in ("main.py", "inner/a.py", "lib.C", "Makefile", ".hidden.py"):
        write(folder / name, "text")
    write(folder / "picture.png", b"\x89PNG\0")
    code = [folder / name for name in ("Makefile", "inner/a.py", "lib.C", "main.py")]
    assert find_files(str(folder), "utf-8") == code
    write(folder / "README.md", "text")
    assert find_files(str(folder), "utf-8") == sorted([*code, folder / "README.md"])
    write(folder / "rows.jsonl", "text" * 3)
    assert find_files(str(folder), "utf-8") == [folder / "README.md", folder / "rows.jsonl"]


def test_folder_in_another_encoding_is_read(tmp_path: Path) -> None:
    for name, text in (("a.srt", "Grüße"), ("b.srt", "plain")):
        write(tmp_path / "src" / name, text.encode("cp1252"))
    assert find_files(str(tmp_path / "src"), "utf-8") == [tmp_path / "src" / "b.srt"]
    assert len(find_files(str(tmp_path / "src"), "cp1252")) == 2
