"""How the numbers of a page are written: compressed arrays, tokens as safe text, tables as JSON. `web/data.js` reads them."""

import base64
import json
import unicodedata
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

DTYPES = {"int8": "i1", "float16": "<f2", "float32": "<f4", "uint32": "<u4"}
JOINERS = "\u200c\u200d"  # Invisible characters that join letters or emoji.


class Encoder:
    """Encodes the arrays and tokens of one page, whose arrays take at most `limit` characters; tokens of `vocabulary` keep their
    numbers in it."""

    def __init__(self, limit: int, vocabulary: Iterable[bytes] = ()) -> None:
        self._tokens = list(vocabulary)
        self._numbers = {token: k for k, token in enumerate(self._tokens)}
        self._left = limit

    def array(self, array: ArrayLike, dtype: str) -> list[str]:
        """An array as its dtype and the base64 of its deflated bytes, in C order.

        Raises:
            OverflowError: if the arrays of the page exceed the limit.
        """
        data = zlib.compress(np.asarray(array).astype(DTYPES[dtype]).tobytes(), 6)
        text = base64.b64encode(data).decode("ascii")
        self._left -= len(text)
        if self._left < 0:
            raise OverflowError("the page would exceed its size limit")
        return [dtype, text]

    def tokens(self, tokens: Iterable[bytes]) -> list[str]:
        """Tokens as an array of their numbers in the vocabulary of the page."""
        numbers = []
        for token in tokens:
            if token not in self._numbers:
                self._numbers[token] = len(self._tokens)
                self._tokens.append(token)
            numbers.append(self._numbers[token])
        return self.array(numbers, "uint32")

    def vocabulary(self) -> list[list[str]]:
        """The pieces of each token."""
        return [display_pieces(token) for token in self._tokens]


def display_pieces(token: bytes) -> list[str]:
    r"""A token as pieces of text that are safe to show, the first character of each being its kind.

    `s·` is a space, `n↵` a line break, `x\xc3` an escaped byte or control character, `tMia` text. The end-of-text
    token, which has no bytes, is `x<end>`.
    """
    if not token:
        return ["x<end>"]
    pieces: list[str] = []
    for c in token.decode("utf-8", "surrogateescape"):  # an undecodable byte b becomes U+DC00 + b
        after_text = bool(pieces) and pieces[-1][0] == "t"
        if c in " \n":
            piece = "s·" if c == " " else "n↵"
        elif "\udc80" <= c <= "\udcff":
            piece = f"x\\x{ord(c) - 0xDC00:02x}"
        elif unicodedata.category(c).startswith("M"):  # combining marks need a character to combine with
            piece = f"t{c}" if after_text else f"t\N{DOTTED CIRCLE}{c}"
        elif c.isprintable() or (c in JOINERS and after_text):
            piece = f"t{c}"
        else:
            piece = "x" + c.encode("unicode_escape").decode("ascii")
        if piece[0] == "t" and after_text:
            pieces[-1] += piece[1:]
        else:
            pieces.append(piece)
    return pieces


def as_json(value: Mapping[str, Any]) -> str:
    """ASCII JSON without `<`, `>` and `&`, which could end the element around it."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
