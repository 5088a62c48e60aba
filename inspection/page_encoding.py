"""How the numbers of a page are written: compressed arrays, tokens as safe text, tables as JSON. `web/data.js` reads them."""

import base64
import json
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from inspection.terminal import display_pieces

DTYPES = {"int8": "i1", "float16": "<f2", "float32": "<f4", "uint32": "<u4"}


class Encoder:
    """Encodes the arrays and tokens of one page, whose arrays take at most `limit` characters; tokens of `vocabulary` keep their
    numbers in it."""

    def __init__(self, limit: int, vocabulary: Iterable[bytes] = ()) -> None:
        self._tokens = list(vocabulary)
        self._numbers = {token: k for k, token in enumerate(self._tokens)}
        self._left = limit

    def array(self, array: ArrayLike, dtype: str) -> list[str]:
        """An array as its dtype and the base64 of its deflated bytes, in C order. Raises OverflowError beyond the limit."""
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


def as_json(value: Mapping[str, Any]) -> str:
    """ASCII JSON without `<`, `>` and `&`, which could end the element around it."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
