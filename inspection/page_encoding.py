"""How the numbers of a page are written: arrays as compressed blocks, tokens as safe text, tables as JSON.

`page_builder.py` decides what goes into a page; `web/data.js` reads it. A block is a few little-endian arrays, one after
the other, deflated and in base64.
"""

from __future__ import annotations

import base64
import json
import unicodedata
import zlib
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inspection.attention_file import AttentionRecord

DTYPES = {"float16": "<f2", "float32": "<f4", "uint32": "<u4", "sqrt8": "|u1"}
"""The dtypes of blocks; `sqrt8` is round(255 √a) for a in [0, 1], off by at most 1/255."""
FULL_TEXTS = 2
"""The first texts keep every step when steps of the other texts are left out."""
BLOCK_MARKUP = 64
"""Characters of the element around a block."""
JOINERS = "\u200c\u200d"
"""Invisible characters that join letters or emoji."""


class PageTooLarge(Exception):
    """The page would exceed its size limit."""


class Blocks:
    """The blocks of one page, and its distinct tokens. Both are kept while smaller contents of the page are tried."""

    def __init__(self) -> None:
        self._encoded: dict[Hashable, str] = {}
        self._token_ids: dict[bytes, int] = {}
        self.begin(0)

    def begin(self, limit: int) -> None:
        """Start a page of at most `limit` characters."""
        self.blocks: list[str] = []
        self.size, self.limit = 0, limit

    def add(self, name: Hashable, arrays: Callable[[], list[NDArray[Any]]]) -> int:
        """Add a block; its index in the page.

        Raises:
            PageTooLarge: if it does not fit into the page.
        """
        if name not in self._encoded:
            data = b"".join(array.tobytes() for array in arrays())
            self._encoded[name] = base64.b64encode(zlib.compress(data, 6)).decode("ascii")
        self.blocks.append(self._encoded[name])
        self.size += len(self._encoded[name]) + BLOCK_MARKUP
        if self.size > self.limit:
            raise PageTooLarge
        return len(self.blocks) - 1

    def token_id(self, token: bytes) -> int:
        """The number of a token in the vocabulary of the page."""
        return self._token_ids.setdefault(token, len(self._token_ids))

    def vocabulary(self) -> list[list[str]]:
        """The pieces of each token."""
        return [display_pieces(token) for token in self._token_ids]


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
            pieces.append("s·" if c == " " else "n↵")
            continue
        if "\udc80" <= c <= "\udcff":
            kind, shown = "x", f"\\x{ord(c) - 0xDC00:02x}"
        elif unicodedata.category(c).startswith("M"):  # combining marks need a character to combine with
            kind, shown = "t", c if after_text else "\N{DOTTED CIRCLE}" + c
        elif c.isprintable() or (c in JOINERS and after_text):
            kind, shown = "t", c
        else:
            kind, shown = "x", c.encode("unicode_escape").decode("ascii")
        if kind == "t" and after_text:
            pieces[-1] += shown
        else:
            pieces.append(kind + shown)
    return pieces


@dataclass(frozen=True)
class Content:
    """How much of the attention files a page holds."""

    qkv: str = "all"
    """Queries, keys and values: of `all` steps; of the `last` step, as float16; or likewise of the first texts only (`few`)."""
    every: int = 1
    """Texts after the first ones keep every n-th step; 0: only the last."""
    sqrt8: bool = False
    """Store patterns as 8-bit square roots instead of float16."""
    tokens: int = 0
    """Keep only the last tokens of each text; 0: all."""

    def has_text(self, text: int, step: int, last: int) -> bool:
        """Whether the page holds text number `text` at step number `step`."""
        if step == last or self.every == 1 or text < FULL_TEXTS:
            return True
        return self.every > 0 and (last - step) % self.every == 0

    def has_qkv(self, text: int, step: int, last: int) -> bool:
        """Whether it also holds queries, keys and values; never for a part of a text, where keys are missing."""
        if self.tokens:
            return False
        return self.qkv == "all" or (step == last and (self.qkv == "last" or text < FULL_TEXTS))

    def first_token(self, text: AttentionRecord) -> int:
        """The first position that is kept."""
        return max(0, len(text.tokens) - self.tokens) if self.tokens else 0

    def pattern_arrays(self, text: AttentionRecord, layer: int) -> list[NDArray[Any]]:
        """The attention patterns of a layer: one array (H, T (T + 1) / 2)."""
        pattern = text.pattern_tril[layer]
        if first := self.first_token(text):
            rows, columns = np.tril_indices(len(text.tokens))
            pattern = pattern[:, (rows >= first) & (columns >= first)]
        if self.sqrt8:
            weights = np.clip(np.nan_to_num(pattern.astype(np.float32)), 0, 1)
            return [np.rint(np.sqrt(weights) * 255).astype(DTYPES["sqrt8"])]
        return [pattern.astype(DTYPES["float16"])]

    def token_arrays(self, text: AttentionRecord, token_id: Callable[[bytes], int]) -> list[NDArray[Any]]:
        """Tokens (T), loss (T), value norms (L H T), top next tokens (T N) and their probabilities (T N).

        Only ratios of value norms matter: they are divided by each head's largest to fit into float16.
        """
        first = self.first_token(text)
        tokens = np.array([token_id(token) for token in text.token_bytes[first:]], DTYPES["uint32"])
        loss = np.concatenate([[np.nan], np.asarray(text.loss)]).astype(DTYPES["float32"])[first:]
        norms = np.asarray(text.value_norms, dtype=np.float64)[..., first:]
        norms = np.nan_to_num(norms, posinf=0, neginf=0)
        norms = norms / np.maximum(norms.max(axis=-1, keepdims=True), np.finfo(np.float32).tiny)
        top = [pair for row in (text.top_tokens or [])[first:] for pair in row]
        top_ids = np.array([token_id(token) for token, _ in top], DTYPES["uint32"])
        probabilities = np.array([p for _, p in top], DTYPES["float16"])
        return [tokens, loss, norms.astype(DTYPES["float16"]), top_ids, probabilities]

    def qkv_dtype(self, text: AttentionRecord) -> str:
        """The dtype of queries, keys, values and attention output."""
        half = text.queries is not None and text.queries.dtype.itemsize == 2
        return "float16" if self.qkv != "all" or half else "float32"

    def qkv_arrays(self, text: AttentionRecord, layer: int, dtype: str) -> list[NDArray[Any]]:
        """Queries, keys, values (H, T, D) of a layer, and its attention output (T, C) if the file has it."""
        assert text.queries is not None and text.keys is not None and text.values is not None
        arrays = [text.queries, text.keys, text.values, *([] if text.attn_out is None else [text.attn_out])]
        return [array[layer].astype(DTYPES[dtype]) for array in arrays]


def as_json(value: Mapping[str, Any]) -> str:
    """ASCII JSON without `<`, `>` and `&`, which could end the element around it."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
