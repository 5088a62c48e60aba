"""What a page holds, as text: a dump's numbers as blocks, tables as JSON, tokens as words; and how much of them.

Serves `page.py`; `page/data.js` reads what is written here. A block is some arrays one after the other, each as byte
planes (all first bytes, then all second bytes: like bytes lie together and deflate finds them), deflated, in base64.
"""

from __future__ import annotations

import base64
import json
import math
import unicodedata
import zlib
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from inspection.attention_file import AttentionRecord

HALF, FLOAT, INDEX, EIGHT_BITS = "<f2", "<f4", "<u4", "|u1"
FIRST_TEXTS = 2
"""So many texts keep every step when the steps of the others are thinned."""
MARKUP = 64
"""Characters of the element around a block."""
JOINERS = "\u200c\u200d"
"""Invisible, but they hold letters and emoji together."""
LEAST_TOKENS = 64
"""Before a page has fewer tokens than this, layers and heads are left out."""


class TooLarge(Exception):
    """The page would outgrow its limit."""


class Blocks:
    """The blocks of one page. What was packed once is remembered, for pages are tried in several sizes."""

    def __init__(self) -> None:
        self._packed: dict[Hashable, str] = {}
        self.begin(0)

    def begin(self, limit: int) -> None:
        """A new page, of at most `limit` characters."""
        self.kept: list[str] = []
        self.size, self.limit = 0, limit

    def add(self, name: Hashable, arrays: Callable[[], list[NDArray[Any]]]) -> int:
        """The number of a block in the page.

        Raises:
            TooLarge: if the page has no room for it.
        """
        if name not in self._packed:
            planes = [np.ascontiguousarray(a).view(np.uint8).reshape(-1, a.itemsize).T.tobytes() for a in arrays()]
            self._packed[name] = base64.b64encode(zlib.compress(b"".join(planes), 6)).decode("ascii")
        self.kept.append(self._packed[name])
        self.size += len(self._packed[name]) + MARKUP
        if self.size > self.limit:
            raise TooLarge
        return len(self.kept) - 1


def parts(token: bytes) -> list[str]:
    r"""A token as pieces that are safe to show, each with its kind in front: `s·` a space, `n↵` a line break, `x\xc3`
    something that cannot be shown as it is, `tMia` text. End-of-text, which has no bytes, is `x<end>`.
    """
    if not token:
        return ["x<end>"]
    found: list[str] = []
    for c in token.decode("utf-8", "surrogateescape"):  # a broken byte b becomes U+DC00 + b
        if c in " \n":
            found.append("s·" if c == " " else "n↵")
            continue
        begun = bool(found) and found[-1][0] == "t"
        if "\udc80" <= c <= "\udcff":
            kind, shown = "x", f"\\x{ord(c) - 0xDC00:02x}"
        elif unicodedata.category(c).startswith("M"):  # an accent melts into what stands before it
            kind, shown = "t", c if begun else "\N{DOTTED CIRCLE}" + c
        elif c.isprintable() or (c in JOINERS and begun):
            kind, shown = "t", c
        else:
            kind, shown = "x", c.encode("unicode_escape").decode("ascii")
        if found and found[-1][0] == kind and kind == "t":
            found[-1] += shown
        else:
            found.append(kind + shown)
    return found


class Vocabulary:
    """The tokens that a page shows, each once."""

    def __init__(self) -> None:
        self._index: dict[bytes, int] = {}

    def index(self, token: bytes) -> int:
        return self._index.setdefault(token, len(self._index))

    def table(self) -> list[list[str]]:
        """The pieces of every token, by number."""
        return [parts(token) for token in self._index]


@dataclass(frozen=True)
class Plan:
    """How much of the dumps a page holds."""

    details: str = "all"
    """Queries, keys and values of `all` steps, of the `last` one, or of the last one for the first texts (`few`)."""
    half: bool = False
    """Queries, keys and values in 16 bits."""
    every: int = 1
    """Texts after the first ones keep one step in so many; 0: the last alone."""
    eight: str = ""
    """Whose weights are 8 bits of their square root (off by 1/255 at most): `some`, those of texts after the first ones
    but for the last step, or `all`."""
    tokens: int = 0
    """The last tokens of a text that are kept; 0: all. Likewise the first layers and heads."""
    layers: int = 0
    heads: int = 0

    def keeps(self, text: int, step: int, last: int) -> bool:
        """Whether this text (counted from 0) has its weights of this step."""
        if step == last or self.every == 1:
            return True
        return text < FIRST_TEXTS or (self.every > 0 and (last - step) % self.every == 0)

    def explains(self, text: int, step: int, last: int) -> bool:
        """Whether it has queries, keys and values there; a part of a text has not all the keys of a query."""
        if self.tokens or not self.keeps(text, step, last):
            return False
        return self.details == "all" or (step == last and (self.details == "last" or text < FIRST_TEXTS))

    def coarse(self, text: int, step: int, last: int) -> bool:
        """Whether its weights there are kept in 8 bits."""
        return self.eight == "all" or (self.eight == "some" and text >= FIRST_TEXTS and step != last)

    def smaller(self, tokens: int, layers: int, heads: int) -> Iterator[Plan]:
        """This plan for ever fewer of so many tokens, layers and heads: half of one of them, each time."""
        full, whole = layers, heads
        while max(tokens, layers, heads) > 1:
            if tokens > LEAST_TOKENS or max(layers, heads) == 1:
                tokens = math.ceil(tokens / 2)
            elif layers >= heads:
                layers = math.ceil(layers / 2)
            else:
                heads = math.ceil(heads / 2)
            yield replace(self, tokens=tokens, layers=layers % full, heads=heads % whole)

    def first_token(self, text: AttentionRecord) -> int:
        """The first position that is kept."""
        return max(0, len(text.tokens) - self.tokens) if self.tokens else 0

    def pattern(self, text: AttentionRecord, layer: int, coarse: bool) -> list[NDArray[Any]]:
        """The weights of one layer, one array (H, t (t + 1) / 2), in 16 bits or in 8."""
        packed = text.pattern_tril[layer, : self.heads or None]
        if first := self.first_token(text):
            rows, columns = np.tril_indices(len(text.tokens))
            packed = packed[:, (rows >= first) & (columns >= first)]
        if coarse:
            share = np.clip(np.nan_to_num(packed.astype(np.float32)), 0, 1)
            return [np.rint(np.sqrt(share) * 255).astype(EIGHT_BITS)]
        return [packed.astype(HALF)]

    def side(self, text: AttentionRecord, words: Vocabulary) -> list[NDArray[Any]]:
        """What goes with the weights: tokens (t), loss (t), value norms (L H t), likely next tokens and theirs (t N).

        Of value norms the ratios alone matter: divided by each head's largest they fit into 16 bits.
        """
        first = self.first_token(text)
        tokens = np.array([words.index(token) for token in text.token_bytes[first:]], INDEX)
        loss = np.concatenate([[np.nan], np.asarray(text.loss)]).astype(FLOAT)[first:]
        norms = np.asarray(text.value_norms, dtype=np.float64)[: self.layers or None, : self.heads or None, first:]
        norms = np.nan_to_num(norms, posinf=0, neginf=0)
        norms = norms / np.maximum(norms.max(axis=-1, keepdims=True), np.finfo(np.float32).tiny)
        top = [pair for row in (text.top_tokens or [])[first:] for pair in row]
        likely = np.array([words.index(token) for token, _ in top], INDEX)
        return [tokens, loss, norms.astype(HALF), likely, np.array([p for _, p in top], HALF)]

    def details_kind(self, text: AttentionRecord) -> str:
        """The number format of queries, keys, values and what they come to: 16 bits where they hold it."""
        arrays = [part for part in (text.queries, text.keys, text.values, text.attn_out) if part is not None]
        largest = max(float(np.abs(part).max(initial=0)) for part in arrays)
        wide = any(part.dtype.itemsize > 2 for part in arrays[:3])
        return HALF if largest < float(np.finfo(HALF).max) and (self.half or not wide) else FLOAT

    def explained(self, text: AttentionRecord, layer: int, kind: str) -> list[NDArray[Any]]:
        """Queries, keys, values (H, T, D) of one layer; what it adds to the stream (T, C), if that is there."""
        assert text.queries is not None and text.keys is not None and text.values is not None
        arrays = [part[layer, : self.heads or None] for part in (text.queries, text.keys, text.values)]
        if text.attn_out is not None:
            arrays.append(text.attn_out[layer])
        return [array.astype(kind) for array in arrays]


def table(score: ArrayLike, layers: int, heads: int) -> list[list[float | None]]:
    """A score of every head that is shown, to seven digits; None where it has no value."""
    rows = np.asarray(score, dtype=np.float64)[:layers, :heads].tolist()
    return [[float(f"{v:.7g}") if math.isfinite(v) else None for v in row] for row in rows]


def plain(value: Any) -> Any:
    """JSON's own types, numbers to six digits and finite, everything else as text."""
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def as_json(value: Any) -> str:
    """JSON that holds nothing which could end the element around it, and no character outside ASCII."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
