"""Texts and small helpers that the tests of corpora and tokenizers share."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from common.errors import DATA, UserError
from data.corpora import Span, open_corpus, read_documents

PROSE = (
    "She didn't say what they'd seen: 12 foxes, 3,141 bears — and one über-owl!\r\n\r\n"
    "    def f(x):\n\t\treturn x ** 2  # ok\n" + " " * 40 + "שלום עולם, מה שלומך? Здравствуй, мир. 你好。 "
    "😀👩‍👩‍👧‍👦 e\u0301 \u00a0\u3000 \u2028 ----------------------------------------\n\n\n"
    "the cat and the hat and the bat sat on the mat, then the other cat ran after them all.\n"
)


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def documents(spans: Iterable[Span]) -> list[str]:
    return [piece.text for span in spans for piece in read_documents(span)]


def refusal(source: str | Path, cache: Path) -> str:
    """What is said about a source that cannot be used: one line, and exit code 3."""
    with pytest.raises(UserError) as caught:
        corpus = open_corpus(str(source), 0.1, cache)
        documents(corpus.train + corpus.val)
    message = str(caught.value)
    assert caught.value.exit_code == DATA and message.isprintable() and len(message) < 400
    return message


def no_network(*args: object) -> bytes:
    raise ConnectionError("no network")
