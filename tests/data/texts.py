"""Texts and helpers for the tests of corpora and tokenizers."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from common.errors import DATA
from data.config import DataConfig
from data.prepare import TokenizedCorpus, prepare
from data.text_files import TextRange, read_documents
from tests.runs import user_error

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


def write_range(path: Path, text: str | bytes) -> TextRange:
    return TextRange(path, 0, write(path, text).stat().st_size)


def documents(texts: Iterable[TextRange], block_bytes: int = 1 << 20) -> list[str]:
    """The documents of some ranges, their pieces joined."""
    joined, parts = [], []
    for text in texts:
        for piece in read_documents(text, block_bytes):
            parts.append(piece.text)
            if piece.ends_document:
                joined.append("".join(parts))
                parts = []
    assert not parts, "the last document has no end"
    return joined


def prepared(source: str | Path, cache: Path, tokenizer: str = "byte", **options: Any) -> TokenizedCorpus:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLASSGPT_CACHE", str(cache))
        return prepare(DataConfig(source=str(source), tokenizer=tokenizer, **options), progress=False)


def data_error(source: str | Path, cache: Path, **options: Any) -> str:
    """The message for an unusable source: one line, exit code 3."""
    with user_error(DATA) as caught:
        prepared(source, cache, **options)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 400
    return message


def no_network(*args: object) -> bytes:
    raise ConnectionError("no network")
