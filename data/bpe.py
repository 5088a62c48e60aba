"""Byte-pair encoding: trained on the corpus, or one of those that tiktoken knows by name.

Where this stands: two of the tokenizers that `tokenizer.py` makes and loads. Training is left to `tokenizers`
and encoding to tiktoken; both are imported only when they are needed.

Byte-pair encoding starts from the bytes of a word and joins neighbours that often stand side by side, the
most frequent pair first (Sennrich et al. 2016, arXiv:1508.07909; on bytes since GPT-2, Radford et al. 2019).
"""

from __future__ import annotations

import base64
import difflib
import hashlib
import threading
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from common.errors import CONFIG, DATA, UserError, escape_control_chars
from data.vocabulary import Tokenizer, replace_surrogates

if TYPE_CHECKING:
    import tiktoken

BPE_SAMPLE_CHARACTERS = 16_000_000
"""As much of the text as `bpe` learns its merges from, at most."""
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
"""What GPT-2 cuts text into before it joins bytes: contractions, words, numbers, signs, white space. With
possessive quantifiers as in tiktoken, which match the same and are quicker."""

MAX_TOKEN_BYTES = 256
"""Bytes of a trained token at most; keeps long rulers of dashes out of the vocabulary."""

_FETCH_SECONDS = 30.0
# Reaches every alternative of the patterns, to tell encodings with the same tokens apart.
_PROBE = "They've  said: \"12345 CAMELCase's\" //\r\n\n \t\n e\u0301\u00a0\u4f60\u597d \U0001f600...  "


class BPETokenizer(Tokenizer):
    """Ids 0 ... 255 are the bytes, then come the merged tokens as they were learned; the last is end-of-text.

    Encoding joins, again and again, the two neighbours that together are the token with the smallest id.
    """

    name = "bpe"

    def __init__(self, merged: Sequence[bytes]) -> None:
        import tiktoken

        self.merged = tuple(merged)
        self._tokens = tuple(bytes([b]) for b in range(256)) + self.merged
        self.end_of_text = len(self._tokens)
        self.vocab_size = self.end_of_text + 1
        self._encoding = tiktoken.Encoding(
            "bpe",
            pat_str=GPT2_PATTERN,
            mergeable_ranks={token: rank for rank, token in enumerate(self._tokens)},
            special_tokens={"<|endoftext|>": self.end_of_text},
        )

    def encode(self, text: str) -> np.ndarray:
        return _encode_ordinary(self._encoding, text)

    def token_bytes(self, token: int) -> bytes:
        self._check(token)
        return self._tokens[token] if token < self.end_of_text else b""

    def described(self) -> dict[str, Any]:
        # Latin-1 gives each byte the character of the same number: plain words stay readable in the file.
        return {"kind": "bpe", "merged": [token.decode("latin-1") for token in self.merged]}


class TiktokenTokenizer(Tokenizer):
    """One of tiktoken's encodings. `end_of_text` is the encoding's own, which need not be the last id."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._encoding = _fetch(name)
        self.vocab_size = self._encoding.n_vocab
        self.end_of_text = self._encoding.eot_token
        self._special = {self._encoding.encode_single_token(s) for s in self._encoding.special_tokens_set}

    def encode(self, text: str) -> np.ndarray:
        return _encode_ordinary(self._encoding, text)

    def token_bytes(self, token: int) -> bytes:
        self._check(token)
        if token in self._special:
            return b""
        try:
            return self._encoding.decode_single_token_bytes(token)
        except KeyError:
            return b""

    def described(self) -> dict[str, Any]:
        digest = hashlib.sha256(self.encode(_PROBE).astype("<i8").tobytes())
        for token in range(self.vocab_size):
            digest.update(base64.b64encode(self.token_bytes(token)) + b"\n")
        described = {"name": self.name, "vocab_size": self.vocab_size, "end_of_text": self.end_of_text}
        return {"kind": "tiktoken", **described, "sha256": digest.hexdigest()}


def train_bpe(texts: Iterable[str], vocab_size: int) -> BPETokenizer:
    """Train with `tokenizers`, which is quick, and keep only the merged tokens in the order learned.

    That is enough. The bytes of a token were joined in the same order wherever they stood, so there is one
    pair of parts that makes it; to join what is a token (tiktoken) is to join what is a listed pair
    (`tokenizers`).
    """
    from tokenizers import Tokenizer as Trained
    from tokenizers import models, pre_tokenizers, trainers

    byte_of = {character: byte for byte, character in _byte_alphabet().items()}
    trained = Trained(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        min_frequency=2,
        initial_alphabet=sorted(byte_of),
        max_token_length=MAX_TOKEN_BYTES,
        show_progress=False,
    )
    trained.train_from_iterator(_at_most(texts, BPE_SAMPLE_CHARACTERS), trainer)
    ids = sorted(trained.get_vocab(with_added_tokens=False).items(), key=lambda item: item[1])
    tokens = [bytes(byte_of[character] for character in token) for token, _ in ids]
    assert all(len(token) == 1 for token in tokens[:256]), "the bytes come first"
    return BPETokenizer(tokens[256:])


def _at_most(texts: Iterable[str], n_characters: int) -> Iterator[str]:
    for text in texts:
        yield replace_surrogates(text[:n_characters])
        n_characters -= len(text)
        if n_characters <= 0:
            return


def _byte_alphabet() -> dict[int, str]:
    """The character that stands for each byte in `tokenizers`, as it did in GPT-2: visible Latin-1 characters
    for themselves, for the other bytes in turn U+0100 and what follows."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in visible)
    return dict(chain(((b, chr(b)) for b in visible), ((b, chr(256 + i)) for i, b in enumerate(others))))


def _encode_ordinary(encoding: tiktoken.Encoding, text: str) -> np.ndarray:
    text = replace_surrogates(text)
    try:
        return encoding.encode_to_numpy(text, disallowed_special=()).astype(np.int64)
    except ValueError:
        # The pattern runs out of stack in some hundred thousand blanks on end; half as many may do.
        if len(text) < 2:
            raise
        middle = len(text) // 2
        return np.concatenate([_encode_ordinary(encoding, text[:middle]), _encode_ordinary(encoding, text[middle:])])


def encoding_names() -> list[str]:
    """The names that tiktoken knows."""
    import tiktoken

    return tiktoken.list_encoding_names()


def _fetch(name: str) -> tiktoken.Encoding:
    """An encoding out of tiktoken's cache, or the first time from the network. Raises `UserError` (2 and
    3)."""
    import tiktoken

    known = ["char", "byte", "bpe", *encoding_names()]
    if name not in known:
        near = difflib.get_close_matches(name, known, 3, 0.5) or known
        raise UserError(f"there is no tokenizer '{escape_control_chars(name)}'; nearest are: {', '.join(near)}", CONFIG)
    outcome: list[tiktoken.Encoding | Exception] = []

    def fetch() -> None:
        try:
            outcome.append(tiktoken.get_encoding(name))
        except Exception as error:
            outcome.append(error)

    # tiktoken downloads without a time limit. A thread can be left behind when the network does not answer.
    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    thread.join(_FETCH_SECONDS)
    if outcome and isinstance(outcome[0], tiktoken.Encoding):
        return outcome[0]
    cause = type(outcome[0]).__name__ if outcome else f"no answer within {_FETCH_SECONDS:.0f} s"
    raise UserError(
        f"cannot get the encoding {name} ({cause}): run once with a network, or let the environment variable "
        "TIKTOKEN_CACHE_DIR name a folder that holds its files (copied from another machine)",
        DATA,
    )
