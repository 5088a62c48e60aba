"""Text to ids and back, behind one small interface.

Where this stands: `prepare.py` trains a tokenizer on a corpus, encodes the corpus with it and keeps it beside
the tokens; it then travels with every checkpoint, so that `sample.py` and `attend.py` need nothing else. The
tokenizers themselves stand in `vocabulary.py` (char, byte) and `bpe.py` (the others).

    char    one id for each character of the corpus
    byte    one id for each of the 256 bytes of UTF-8
    bpe     byte-pair encoding, trained on the corpus
    gpt2, cl100k_base, o200k_base, ...   the encodings that tiktoken knows

What they have in common: ids 0 ... `vocab_size - 1`, of which `end_of_text` stands between documents. Text
never encodes to it: the characters `<|endoftext|>` in a text are characters like any others.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from common.errors import CHECKPOINT, UserError, escape_control_chars
from data.bpe import MAX_TOKEN_BYTES, BPETokenizer, TiktokenTokenizer, encoding_names, train_bpe
from data.vocabulary import FORMAT, ByteTokenizer, CharTokenizer, Tokenizer, tokenizer_json, train_char

__all__ = ["StreamDecoder", "Tokenizer", "fingerprint", "load", "train_tokenizer"]

_MAX_FILE_BYTES = 64 * 1024 * 1024


class StreamDecoder:
    """Tokens to text one at a time, as they are sampled.

    A character split over several tokens is held back until it is whole. The parts joined are what
    `Tokenizer.decode` gives for all the tokens at once.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        """The text that this token completes; may be empty."""
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def finish(self) -> str:
        """What was held back, as U+FFFD; empty when all was whole."""
        return self._decoder.decode(b"", True)


def train_tokenizer(name: str, vocab_size: int, texts: Iterable[str] | Callable[[], Iterable[str]]) -> Tokenizer:
    """The tokenizer of that name, learned from `texts` where it is one that learns.

    `char` takes the characters of all the texts; give it the validation text too: which characters exist is
    no knowledge worth hiding, and a held-out text with an unknown character could not be evaluated. `bpe`
    should see training text alone; it reads the first `bpe.BPE_SAMPLE_CHARACTERS` of it at most
    (`corpus.sample` spreads as much over a larger text) and learns `vocab_size - 257` merges, or as many as
    there are pairs that occur twice. `byte` and tiktoken's encodings read nothing. The same texts give the
    same tokenizer. Raises `UserError`: an unknown name (2), no text (3), an encoding that cannot be fetched
    (3).
    """
    if name == "byte":
        return ByteTokenizer()
    if name not in ("char", "bpe"):
        return TiktokenTokenizer(name)
    pieces = texts() if callable(texts) else texts
    return train_char(pieces) if name == "char" else train_bpe(pieces, vocab_size)


def fingerprint(tokenizer: Tokenizer) -> str:
    """The sha256 of the saved form: equal for tokenizers that encode alike."""
    return hashlib.sha256(tokenizer_json(tokenizer)).hexdigest()


def load(path: Path) -> Tokenizer:
    """Read what `Tokenizer.save` wrote.

    Raises `UserError`: missing or damaged (4), or an encoding of tiktoken's that cannot be fetched (3).
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
        if len(data) > _MAX_FILE_BYTES:
            raise ValueError(f"it is larger than {_MAX_FILE_BYTES} bytes")
        return _from_saved(json.loads(data))
    except OSError as error:
        raise UserError(f"cannot read {escape_control_chars(path)}: {error.strerror or error}", CHECKPOINT) from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(
            f"{escape_control_chars(path)} is damaged or no tokenizer ({escape_control_chars(error)}): take another checkpoint",
            CHECKPOINT,
        ) from error


def _from_saved(saved: Any) -> Tokenizer:
    """Raises ValueError, TypeError or KeyError for all that `save` would not have written."""
    if not isinstance(saved, dict) or saved.get("format") != FORMAT:
        raise ValueError(f"not of format {FORMAT}")
    kind = saved["kind"]
    if kind == "byte":
        return ByteTokenizer()
    if kind == "char":
        characters = saved["characters"]
        if not isinstance(characters, str) or list(characters) != sorted(set(characters)):
            raise ValueError("its characters are not a sorted set")
        characters.encode()
        return CharTokenizer(characters)
    if kind == "bpe":
        texts = saved["merged"]
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError("its merges are no list of strings")
        merged = [text.encode("latin-1") for text in texts]
        if len(set(merged)) < len(merged) or not all(1 < len(m) <= MAX_TOKEN_BYTES for m in merged):
            raise ValueError(f"its merges are not distinct tokens of 2 to {MAX_TOKEN_BYTES} bytes")
        return BPETokenizer(merged)
    if kind != "tiktoken":
        raise ValueError(f"unknown kind {kind!r}")
    if not isinstance(saved["name"], str) or saved["name"] not in encoding_names():
        raise ValueError(f"tiktoken has no encoding {saved['name']!r}")
    tokenizer = TiktokenTokenizer(saved["name"])
    if {"format": FORMAT, **tokenizer.described()} != saved:
        raise ValueError(f"the installed tiktoken's {saved['name']} is another one than it was saved with")
    return tokenizer
