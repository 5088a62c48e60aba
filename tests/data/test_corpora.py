"""Where text comes from: which files a source names, and what of them is held out."""

from __future__ import annotations

from pathlib import Path

import pytest

from data.corpora import Corpus, open_corpus
from tests.data.texts import documents, refusal, write


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder of texts of different lengths, and of files that are none."""
    folder = tmp_path / "texts"
    for i in range(40):
        write(folder / f"{'ab'[i % 2]}/part {i:02d}.txt", f"{i} " * (20 + i))
    write(folder / "README.MD", "# prose as well")
    write(folder / "empty.txt", "")
    for other in ("picture.png", "code.py", ".hidden.txt", ".git/message.txt"):
        write(folder / other, "no prose\0")
    return folder


def paths(corpus: Corpus) -> list[Path]:
    return sorted({span.path for span in corpus.train + corpus.val})


def test_the_end_of_a_plain_file_is_held_out(tmp_path: Path, cache: Path) -> None:
    text = "a line of text\r\n" * 100
    corpus = open_corpus(str(write(tmp_path / "book.txt", text)), 0.25, cache)
    assert documents(corpus.train) == [text[:1200]] and documents(corpus.val) == [text[1200:]]
    assert corpus.nats_per_document is None


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.333, 0.5, 0.9])
def test_a_split_falls_between_characters_and_loses_nothing(tmp_path: Path, cache: Path, fraction: float) -> None:
    text = "é😀ש好" * 11
    corpus = open_corpus(str(write(tmp_path / "book.txt", text)), fraction, cache)
    (train,), (val,) = documents(corpus.train), documents(corpus.val)
    assert train + val == text and train and val
    assert abs(len(val.encode()) - fraction * len(text.encode())) <= 4


def test_a_byte_order_mark_is_left_out(tmp_path: Path, cache: Path) -> None:
    corpus = open_corpus(str(write(tmp_path / "bom.txt", b"\xef\xbb\xbfsome text")), 0.5, cache)
    assert "".join(documents(corpus.train + corpus.val)) == "some text"


@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.5, 0.95])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_the_last_documents_of_a_file_are_held_out(tmp_path: Path, cache: Path, fraction: float, newline: str) -> None:
    wanted = [f"document {i} " * (1 + i % 7) for i in range(60)]
    separator = f"{newline}<|endoftext|>{newline}"
    path = write(tmp_path / "stories.txt", separator + separator.join(wanted) + separator)
    corpus = open_corpus(str(path), fraction, cache)
    train, val = documents(corpus.train), documents(corpus.val)
    assert train + val == wanted and train and val
    # The nearest border is at most half of the longest document, with its separator, away.
    assert abs(corpus.train[0].end - (1 - fraction) * path.stat().st_size) <= (7 * 12 + 20) / 2 + 20


@pytest.mark.parametrize("place", ["near the start", "near the end"])
def test_the_only_border_between_documents_is_found_from_afar(tmp_path: Path, cache: Path, place: str) -> None:
    short, long = "short", "long text " * 300_000
    wanted = [short, long] if place == "near the start" else [long, short]
    path = write(tmp_path / "two.txt", "\n<|endoftext|>\n".join(wanted))
    corpus = open_corpus(str(path), 0.5, cache)
    val = "".join(documents(corpus.val))
    assert val == wanted[1] and "".join(documents(corpus.train)) == wanted[0]


@pytest.mark.parametrize("end", ["\n<|endoftext|>\n", "\n<|endoftext|>\n \n<|endoftext|>\n\n"])
@pytest.mark.parametrize("fraction", [0.1, 0.5])
def test_separators_around_one_document_are_not_text(tmp_path: Path, cache: Path, end: str, fraction: float) -> None:
    path = write(tmp_path / "one.txt", "<|endoftext|>\nabcdefghij" + end)
    corpus = open_corpus(str(path), fraction, cache)
    assert "".join(documents(corpus.train + corpus.val)) == "abcdefghij"
    assert documents(corpus.val) == ["abcdefghij"[-int(10 * fraction) :]]


def test_a_folder_gives_its_prose_sorted_and_whole_files_are_held_out(texts: Path, cache: Path) -> None:
    corpus = open_corpus(str(texts), 0.2, cache)
    assert len(paths(corpus)) == 41 and {path.suffix for path in paths(corpus)} == {".txt", ".MD"}
    assert [span.path for span in corpus.train] == sorted(span.path for span in corpus.train)
    assert not set(corpus.train) & set(corpus.val)
    n_val, n_all = (sum(span.end for span in spans) for spans in (corpus.val, corpus.train + corpus.val))
    assert n_val == pytest.approx(0.2 * n_all, rel=0.1)
    assert corpus == open_corpus(str(texts), 0.2, cache)


def test_what_is_held_out_depends_on_names_alone(texts: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def held_out(source: str, root: Path) -> list[str]:
        return [span.path.relative_to(root).as_posix() for span in open_corpus(source, 0.2, cache).val]

    first = held_out(str(texts), texts)
    moved = texts.rename(texts.with_name("elsewhere"))
    assert held_out(str(moved), moved) == first
    monkeypatch.chdir(moved)
    assert held_out(".", Path()) == first
    # A hash, not the alphabet: it takes from both subfolders.
    assert {name[0] for name in first} >= {"a", "b"}


@pytest.mark.parametrize("fraction", [0.001, 0.5, 0.999])
@pytest.mark.parametrize("sizes", [(10, 10), (1000, 1), (1, 1, 1000)])
def test_neither_split_is_ever_empty(tmp_path: Path, cache: Path, fraction: float, sizes: tuple[int, ...]) -> None:
    for i, size in enumerate(sizes):
        write(tmp_path / "few" / f"{i}.txt", "x" * size)
    corpus = open_corpus(str(tmp_path / "few"), fraction, cache)
    assert corpus.train and corpus.val and len(paths(corpus)) == len(sizes)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.md", []),
        ("*.MD", ["README.MD"]),
        ("*/part 0[0-3].txt", ["a/part 00.txt", "a/part 02.txt", "b/part 01.txt", "b/part 03.txt"]),
        ("**/part ?7.txt", ["b/part 07.txt", "b/part 17.txt", "b/part 27.txt", "b/part 37.txt"]),
        ("a/../**/part 00.txt", ["a/../a/part 00.txt"]),
        (".hid*", [".hidden.txt"]),
        (".git/*", [".git/message.txt"]),
    ],
)
def test_a_glob_names_whatever_it_matches(texts: Path, cache: Path, pattern: str, expected: list[str]) -> None:
    for hidden in (".hidden.txt", ".git/message.txt"):
        write(texts / hidden, "text after all")
    if not expected:
        assert "no file matches" in refusal(texts / pattern, cache)
    else:
        assert paths(open_corpus(f"{texts}/{pattern}", 0.5, cache)) == sorted({texts / name for name in expected})


def test_links_lead_to_each_file_once_and_never_in_circles(texts: Path, cache: Path) -> None:
    plain = [path.resolve() for path in paths(open_corpus(str(texts), 0.2, cache))]
    for folder in (texts, texts / "a", texts / "b"):
        for name in ("loop", "again"):
            (folder / name).symlink_to(texts)
    (texts / "copy.txt").symlink_to(texts / "a" / "part 00.txt")
    (texts / "broken.txt").symlink_to(texts / "nowhere.txt")
    (texts / "itself.txt").symlink_to(texts / "itself.txt")
    for source in (texts, f"{texts}/**", f"{texts}/**/*.[tM]*"):
        if source != f"{texts}/**":
            found = [path.resolve() for path in paths(open_corpus(str(source), 0.2, cache))]
            assert sorted(found) == sorted(plain)
