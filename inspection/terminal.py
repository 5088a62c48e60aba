"""Attention and numbers as plain text: strongest attention, heat maps, tables, sparklines, JSON and CSV.

Needs NumPy only. The text holds no colors and no control characters, and fits any encoding. JSON and CSV carry full
precision; text is rounded for reading.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
import textwrap
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from common.errors import escape_control_chars

ASCII_SHADES = ".:-=+*#%@"
BLOCK_SHADES = "·░▒▓█"
BLOCKS = "▁▂▃▄▅▆▇█"
ASCII_BLOCKS = "_.-=+*#@"
LABEL_WIDTH = 12
MAX_WIDTH = 200
"""Columns of a terminal that are used, at most."""
DISCLAIMER = "An attention weight shows what a head attends to, not why."
Cell = str | int | float | None


@dataclass(frozen=True)
class Terminal:
    """Where the output goes."""

    encoding: str | None = "ascii"
    """Encoding of the stream; None counts as ASCII."""
    width: int = 100
    """Width in columns."""


@dataclass(frozen=True)
class Result:
    """The outcome of a command, in three forms."""

    lines: list[str]
    """Text."""
    data: dict[str, Any] = field(default_factory=dict)
    """What `--json` prints, for commands with this option."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """What `--csv` prints, likewise."""
    ok: bool = True
    """False if a check failed: the result is printed, then the exit code is 4."""


# Tokens and heads


def head_name(layer: int, head: int) -> str:
    """`L1H2` is layer 1, head 2, both counted from 0."""
    return f"L{layer}H{head}"


def can_encode(text: str, encoding: str | None) -> bool:
    """Whether a stream of this encoding can print the text. None and unknown encodings count as ASCII."""
    try:
        text.encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def token_text(token: bytes, encoding: str | None = "utf-8", space: str | None = None) -> str:
    r"""A token's bytes as printable text: ` She` as `·She`, a line break as `\n`, an incomplete UTF-8 sequence as `\xc3`,
    and end-of-text, which has no bytes, as `<end>`.

    Args:
        token: any bytes; a tokenizer can split a UTF-8 sequence.
        encoding: of the output, such as `sys.stdout.encoding`; characters outside it are escaped.
        space: how a space is written; by default `·`, or `_` where the encoding has no `·`.
    """
    if not token:
        return "<end>"
    if space is None:
        space = "·" if can_encode("·", encoding) else "_"
    pieces = []
    for c in token.decode("utf-8", "surrogateescape"):  # each invalid byte b becomes U+DC00 + b
        if "\udc80" <= c <= "\udcff":
            pieces.append(f"\\x{ord(c) - 0xDC00:02x}")
        elif c == " ":
            pieces.append(space)
        elif c != "\\" and c.isprintable() and unicodedata.category(c)[0] != "M" and can_encode(c, encoding):
            pieces.append(c)  # a combining mark (category M) would merge with the character before it
        else:
            pieces.append(c.encode("unicode_escape").decode("ascii"))
    return "".join(pieces)


def quote_token(token: bytes, encoding: str | None = "utf-8") -> str:
    """A token in double quotes, its spaces kept."""
    return quote(token_text(token, encoding, space=" "))


def quote(text: str) -> str:
    return '"' + text.replace('"', '\\"') + '"'


# Patterns


def _candidate_mask(T: int) -> NDArray[np.bool_]:
    """True (T, T) where a query attends to an earlier token other than the first.

    The first token is an attention sink (Xiao et al. 2023), and attention to the query's own token moves nothing. In a
    text so short that no other pair exists, all causal pairs count.
    """
    mask = np.tril(np.ones((T, T), dtype=bool), -1)
    mask[:, 0] = False
    return mask if mask.any() else np.tril(np.ones((T, T), dtype=bool))


def strongest_attention(pattern: ArrayLike, token_texts: Sequence[str], top: int = 3) -> list[str]:
    """The strongest attention of each head, such as `L0H1  " She" attends to " Mia" 0.62 (5 back)`.

    Each query contributes its strongest key among earlier tokens other than the first; the `top` strongest of these
    queries are listed for each head.

    Args:
        pattern: (L, H, T, T).
        token_texts: T texts from `token_text(token, encoding, space=" ")`.

    Returns:
        L * H * top lines (fewer for a text of fewer than top + 2 tokens).
    """
    pattern = np.asarray(pattern)
    L, H, T, _ = pattern.shape
    assert len(token_texts) == T, f"{len(token_texts)} texts for {T} tokens"
    candidates = _candidate_mask(T)
    queries = np.flatnonzero(candidates.any(axis=1))
    lines = []
    for layer, head in np.ndindex(L, H):
        rows = np.where(candidates, pattern[layer, head], -1.0)
        keys = rows.argmax(axis=1)
        order = np.argsort(-rows[queries, keys[queries]], kind="stable")[:top]
        for i in queries[order]:
            j = int(keys[i])
            target = "itself" if j == i else quote(token_texts[j])
            distance = "" if j == i else f" ({i - j} back)"
            query = quote(token_texts[i])
            lines.append(f"{head_name(layer, head)}  {query} attends to {target} {rows[i, j]:.2f}{distance}")
    return lines


def clearest_head(pattern: ArrayLike) -> tuple[int, int]:
    """(layer, head) with the highest mean, over queries, of the largest attention to an earlier token but the first.

    Args:
        pattern: (L, H, T, T).
    """
    pattern = np.asarray(pattern)
    candidates = _candidate_mask(pattern.shape[-1])
    queries = candidates.any(axis=1)
    strength = np.where(candidates, pattern, 0.0).max(axis=-1)[..., queries].mean(axis=-1)
    layer, head = np.unravel_index(strength.argmax(), strength.shape)
    return int(layer), int(head)


def display_width(text: str) -> int:
    """Columns of a terminal that a text takes."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _fit(text: str, columns: int) -> str:
    """The text, cut or padded with spaces to exactly so many columns."""
    while display_width(text) > columns:
        text = text[:-1]
    return text + " " * (columns - display_width(text))


def heat_map(pattern: ArrayLike, token_texts: Sequence[str], terminal: Terminal) -> list[str]:
    """One head as rows of characters: row = query, column = key, darker = more attention.

    Later tokens, which a query cannot attend to, are blank. Where not all columns fit, the last tokens are shown and
    the first line says so.

    Args:
        pattern: (T, T).
        token_texts: T texts from `token_text(token, encoding)`.
        terminal: at least 40 columns are used; block characters where the encoding has them, else ASCII.
    """
    pattern = np.asarray(pattern, dtype=np.float32)
    T = len(pattern)
    assert pattern.shape == (T, T) and len(token_texts) == T, f"{pattern.shape}, {len(token_texts)} texts"
    shades = BLOCK_SHADES if can_encode(BLOCK_SHADES, terminal.encoding) else ASCII_SHADES
    digits = len(str(T - 1))
    margin = digits + 1 + LABEL_WIDTH + 1
    room = max(terminal.width, 40) - margin
    cell = 2 if room >= 2 * T else 1
    first = max(0, T - room)
    lines = [f"the last {T - first} of {T} tokens"] if first else []
    tens = range(-(-first // 10) * 10, T, 10)
    lines.append(
        " " * (margin + cell * ((tens.start if tens else T) - first))
        + "".join(f"{k:<{10 * cell}}" for k in tens).rstrip()
    )
    cells = [shade * cell if k else shade.ljust(cell) for k, shade in enumerate(shades)]
    levels = np.clip(np.rint(np.nan_to_num(pattern) * (len(shades) - 1)), 0, len(shades) - 1).astype(int)
    for i in range(first, T):
        row = "".join(cells[level] for level in levels[i, first : i + 1])
        lines.append(f"{i:>{digits}} {_fit(token_texts[i], LABEL_WIDTH)} {row}")
    lines.append(f"row: query, column: key; 0 {shades} 1")
    return lines


# Numbers


def number(value: float | None, digits: int = 2, signed: bool = False) -> str:
    """A rounded number; `-` for None, nan and infinity. What rounds to zero has no sign."""
    if value is None or not math.isfinite(value):
        return "-"
    text = f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"
    return text if float(text) else text.lstrip("+-")


def interval(triple: Sequence[float] | None, digits: int = 2) -> str:
    """(value, low, high) as `+0.31 [+0.28, +0.35]`; `-` for None."""
    if triple is None:
        return "-"
    value, low, high = (number(part, digits, signed=True) for part in triple)
    return f"{value} [{low}, {high}]"


def table(titles: Sequence[str], rows: Sequence[Sequence[Cell]], width: int = 100, fixed: int = 1) -> list[str]:
    """Rows under their titles, numbers right-aligned. Columns that do not fit are continued in further blocks below.

    Args:
        width: of the terminal, in columns.
        fixed: how many of the first columns each block repeats.
    """
    texts = [[number(v) if v is None or isinstance(v, float) else str(v) for v in row] for row in rows]
    columns = []
    for title, *cells in zip(titles, *texts, strict=True):
        length = max(map(display_width, [title, *cells]))
        right = all(re.fullmatch(r"[+-]?[\d.]*[! ]?", cell) for cell in cells)
        spaces = [" " * (length - display_width(cell)) for cell in [title, *cells]]
        columns.append([space + c if right else c + space for c, space in zip([title, *cells], spaces, strict=True)])
    blocks = [columns[:fixed]]
    for column in columns[fixed:]:
        used = sum(display_width(other[0]) + 2 for other in blocks[-1])
        if used + display_width(column[0]) > max(width, 20) and len(blocks[-1]) > fixed:
            blocks.append(columns[:fixed])
        blocks[-1] = [*blocks[-1], column]
    lines = [["  ".join(cells).rstrip() for cells in zip(*block, strict=True)] for block in blocks]
    return [line for block in lines for line in ["", *block]][1:]


def paragraph(text: str, width: int) -> list[str]:
    """Text wrapped at word boundaries."""
    return textwrap.wrap(text, max(width, 40), break_long_words=False, break_on_hyphens=False)


def sparkline(values: ArrayLike, low: float, high: float, encoding: str | None = "ascii", width: int = 60) -> str:
    """A series as a row of characters from `low` to `high`; blank where a value is missing (nan).

    A series longer than `width` is averaged over neighboring values. Values outside of low and high are clipped.
    """
    marks = BLOCKS if can_encode(BLOCKS, encoding) else ASCII_BLOCKS
    series = np.asarray(values, dtype=np.float64)
    line = ""
    for part in np.array_split(series, max(1, min(len(series), width))):
        finite = np.clip(part[np.isfinite(part)], low, high)
        fraction = (finite.mean() - low) / ((high - low) or 1.0) if len(finite) else 0.0
        line += marks[min(int(fraction * len(marks)), len(marks) - 1)] if len(finite) else " "
    return line if len(series) else ""


# JSON and CSV


def to_plain(value: Any) -> Any:
    """A value as JSON types: arrays as lists; nan and infinity as None."""
    if isinstance(value, Mapping):
        return {str(key): to_plain(part) for key, part in value.items()}
    if isinstance(value, np.ndarray):
        return to_plain(value.tolist())
    if isinstance(value, list | tuple):
        return [to_plain(part) for part in value]
    if isinstance(value, np.generic):
        return to_plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def to_json(data: Mapping[str, Any]) -> str:
    """Indented JSON in ASCII."""
    return json.dumps(to_plain(data), indent=1, allow_nan=False)


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """A header line, then a line for each row; missing values are empty, control characters are escaped."""
    if not rows:
        return ""
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        plain = to_plain(row)
        writer.writerow({k: escape_control_chars(v) if isinstance(v, str) else v for k, v in plain.items()})
    return text.getvalue().rstrip("\n")
