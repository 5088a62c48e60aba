"""What every tokenizer offers, and the two that need nothing but a table: characters and bytes.

Where this stands: `tokenizer.py` makes and loads tokenizers; these are two of them, `bpe.py` has the others.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import DATA, UserError, escape_control_chars

FORMAT = 1
"""Version of the saved form."""


class Tokenizer(ABC):
    """What a model needs to know of text."""

    name: str
    vocab_size: int
    end_of_text: int

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """The ids of a text, int64, shape (n,). Never holds `end_of_text`. Lone surrogates, which no UTF-8
        holds, count as U+FFFD."""

    @abstractmethod
    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes of one token, which may be a part of a character.

        Empty for `end_of_text`, for other special tokens and for ids that an encoding leaves unused. Raises
        `IndexError` outside the vocabulary.
        """

    @abstractmethod
    def described(self) -> dict[str, Any]:
        """All that `load` needs to make it again, as plain JSON values."""

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of some ids. Bytes that are no UTF-8 become U+FFFD; `end_of_text` becomes nothing."""
        return b"".join(self.token_bytes(int(token)) for token in ids).decode("utf-8", "replace")

    def save(self, path: Path) -> None:
        """Write the saved form, a JSON file, which `load` reads."""
        path.write_bytes(tokenizer_json(self))

    def _check(self, token: int) -> None:
        if not 0 <= token < self.vocab_size:
            raise IndexError(f"token {token} is outside the vocabulary of {self.vocab_size}")


class CharTokenizer(Tokenizer):
    """One id for each character, in the order of their code points; the last id is end-of-text."""

    name = "char"

    def __init__(self, characters: str) -> None:
        self.characters = characters
        self.vocab_size = len(characters) + 1
        self.end_of_text = len(characters)
        points = _code_points(characters)
        # Index 0 ... largest code point; one more entry, where all larger code points are looked up.
        self._ids = np.full(int(points.max(initial=0)) + 2, -1, np.int64)
        self._ids[points] = np.arange(len(points))

    def encode(self, text: str) -> np.ndarray:
        """As every `encode`. Raises `UserError` (2) for characters that the corpus did not hold."""
        text = replace_surrogates(text)
        ids = self._ids[np.minimum(_code_points(text), len(self._ids) - 1)]
        if unknown := np.flatnonzero(ids < 0).tolist():
            shown = ", ".join(f"'{escape_control_chars(text[i])}' at position {i}" for i in unknown[:5])
            more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
            raise UserError(
                f"characters that are not in the vocabulary: {shown}{more}; leave them out, or train "
                "with --data.tokenizer byte or bpe, which know every character"
            )
        return ids

    def token_bytes(self, token: int) -> bytes:
        self._check(token)
        return self.characters[token : token + 1].encode()

    def described(self) -> dict[str, Any]:
        return {"kind": "char", "characters": self.characters}


class ByteTokenizer(Tokenizer):
    """Ids 0 ... 255 are the bytes of UTF-8; 256 is end-of-text."""

    name = "byte"
    vocab_size = 257
    end_of_text = 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(replace_surrogates(text).encode(), np.uint8).astype(np.int64)

    def token_bytes(self, token: int) -> bytes:
        self._check(token)
        return bytes([token]) if token < 256 else b""

    def described(self) -> dict[str, Any]:
        return {"kind": "byte"}


def tokenizer_json(tokenizer: Tokenizer) -> bytes:
    """A tokenizer as JSON, one value a line."""
    saved = {"format": FORMAT, **tokenizer.described()}
    return json.dumps(saved, ensure_ascii=False, indent=0).encode() + b"\n"


def train_char(texts: Iterable[str]) -> CharTokenizer:
    """The characters that occur in some texts. Raises `UserError` (3) when there are none."""
    seen = np.zeros(0x110000, np.bool_)
    for text in texts:
        seen[_code_points(replace_surrogates(text))] = True
    if not seen.any():
        raise UserError("there is no text to take characters from", DATA)
    return CharTokenizer("".join(map(chr, np.flatnonzero(seen).tolist())))


def replace_surrogates(text: str) -> str:
    """`text` with lone surrogates, such as stand for stray bytes of a command line, replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), "<u4").astype(np.int64)
