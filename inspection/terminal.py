"""Attention and numbers as plain text: strongest attention, a heat map, tables, sparklines; and JSON.

Needs NumPy only. The text holds no colors and no control characters; its numbers are rounded, those of JSON are not.
"""

import json
import math
import re
import textwrap
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from common.errors import escape_control_chars

SHADES = "·░▒▓█"
BLOCKS = "▁▂▃▄▅▆▇█"
TO_ASCII = str.maketrans(SHADES + BLOCKS[:-1], "_:+*#" + "_.-=+*%")
JOINERS = "\u200c\u200d"  # invisible characters that join letters or emoji
LABEL_WIDTH = 12
MAX_WIDTH = 200  # columns of a terminal that are used
DISCLAIMER = "An attention weight shows what a head attends to, not why."
Cell = str | int | float | None


def printable(lines: Sequence[str], encoding: str | None) -> str:
    """Lines for a stream: control characters are escaped; shades and blocks become ASCII where the encoding lacks them.
    `run_main` lets the streams escape all other characters that they cannot encode."""
    text = "\n".join(escape_control_chars(line.rstrip()) for line in lines)
    try:
        (SHADES + BLOCKS).encode(encoding or "ascii")
    except UnicodeEncodeError:
        return text.translate(TO_ASCII)
    return text


# Tokens and heads


def head_name(layer: int, head: int) -> str:
    """`L1H2` is layer 1, head 2, both counted from 0."""
    return f"L{layer}H{head}"


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


def token_text(token: bytes, space: str = "·") -> str:
    r"""A token as printable text: ` She` as `·She`, a line break as `\n`, an incomplete UTF-8 sequence as `\xc3`."""
    text = ""
    for piece in display_pieces(token):
        kind, shown = piece[0], piece[1:]
        text += {"s": space, "n": r"\n", "t": shown.replace("\\", r"\\")}.get(kind, shown)
    return text


def quote_token(token: bytes) -> str:
    """A token in double quotes, its spaces kept."""
    return '"' + token_text(token, " ").replace('"', '\\"') + '"'


# Patterns


def _candidates(pattern: ArrayLike) -> NDArray[np.floating[Any]]:
    """A pattern (..., T, T) with 0 where a query does not attend to an earlier token other than the first.

    The first token is an attention sink (Xiao et al. 2023), and attention to the query's own token moves nothing.
    """
    pattern = np.asarray(pattern)
    T = pattern.shape[-1]
    return np.where(np.tri(T, k=-1, dtype=bool) & (np.arange(T) > 0), pattern, 0.0)


def strongest_attention(pattern: ArrayLike, tokens: Sequence[bytes], top: int = 3) -> list[str]:
    """The strongest attention of each head, such as `L0H1  " She" attends to " Mia" 0.62 (5 back)`.

    Each query contributes its strongest key among earlier tokens other than the first; the `top` strongest of these
    queries are listed for each head. `pattern` is (L, H, T, T), `tokens` the bytes of T tokens.
    """
    candidates, texts = _candidates(pattern), [quote_token(token) for token in tokens]
    lines = []
    for layer, head in np.ndindex(candidates.shape[:2]):
        strength, keys = candidates[layer, head].max(axis=1), candidates[layer, head].argmax(axis=1)
        for i in np.argsort(-strength[2:], kind="stable")[:top] + 2:
            what = f"{texts[i]} attends to {texts[keys[i]]} {strength[i]:.2f} ({i - keys[i]} back)"
            lines.append(f"{head_name(layer, head)}  {what}")
    return lines


def clearest_head(pattern: ArrayLike) -> tuple[int, int]:
    """(layer, head) with the highest mean, over queries, of the largest attention to an earlier token but the first."""
    strength = _candidates(pattern).max(axis=-1).mean(axis=-1)
    layer, head = np.unravel_index(strength.argmax(), strength.shape)
    return int(layer), int(head)


def display_width(text: str) -> int:
    """Columns of a terminal that a text takes."""
    joined = ("Mn", "Me", "Cf")  # the categories of marks and joiners, which take none of their own
    return sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in text if unicodedata.category(c) not in joined)


def heat_map(pattern: ArrayLike, tokens: Sequence[bytes], width: int) -> list[str]:
    """One head (T, T) as rows of characters: row = query, column = key, darker = more attention. Only the last tokens are
    shown where not all columns fit into the width, of which at least 40 are used."""
    levels = np.rint(np.nan_to_num(pattern) * (len(SHADES) - 1)).astype(int)
    T = len(levels)
    digits = len(str(T - 1))
    margin = digits + LABEL_WIDTH + 2
    room = max(width, 40) - margin
    cell = 2 if room >= 2 * T else 1
    first = max(0, T - room)
    tens = range(-(-first // 10) * 10, T, 10)
    header = " " * (margin + cell * (tens.start - first)) + "".join(f"{k:<{10 * cell}}" for k in tens)
    lines = [f"the last {T - first} of {T} tokens"] * bool(first) + [header]
    cells = [SHADES[0].ljust(cell), *(shade * cell for shade in SHADES[1:])]
    for i in range(first, T):
        label = token_text(tokens[i])
        while display_width(label) > LABEL_WIDTH:
            label = label[:-1]
        label += " " * (LABEL_WIDTH - display_width(label))
        lines.append(f"{i:>{digits}} {label} {''.join(cells[level] for level in levels[i, first : i + 1])}")
    return [*lines, f"row: query, column: key; 0 {SHADES} 1"]


# Numbers


def number(value: float | None, digits: int = 2, signed: bool = False) -> str:
    """A rounded number; `-` for None, nan and infinity. What rounds to zero has no sign."""
    if value is None or not math.isfinite(value):
        return "-"
    text = f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"
    return text if float(text) else text.lstrip("+-")


def interval(triple: Sequence[float] | NDArray[np.float64] | None, digits: int = 2) -> str:
    """(value, low, high) as `+0.31 [+0.28, +0.35]`; `-` for None."""
    if triple is None:
        return "-"
    value, low, high = (number(part, digits, signed=True) for part in triple)
    return f"{value} [{low}, {high}]"


def table(titles: Sequence[str], rows: Sequence[Sequence[Cell]], width: int = 100, fixed: int = 1) -> list[str]:
    """Rows under their titles, numbers right-aligned. Columns that do not fit are continued in further blocks below,
    each of which repeats the first `fixed` columns."""
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


def sparkline(values: ArrayLike, low: float, high: float, width: int = 60) -> str:
    """A series as a row of blocks from `low` to `high`, clipped to them, blank for nan; longer ones are averaged."""
    line = ""
    for part in np.array_split(np.asarray(values, dtype=np.float64), min(np.size(values), width)):
        finite = np.clip(part[np.isfinite(part)], low, high)
        fraction = (finite.mean() - low) / ((high - low) or 1.0) if len(finite) else 0.0
        line += BLOCKS[min(int(fraction * len(BLOCKS)), len(BLOCKS) - 1)] if len(finite) else " "
    return line


def json_values(values: Any, digits: int = 17) -> Any:
    """A value, in mappings, lists or arrays too, as JSON takes it: numbers of so many significant digits (17 are all of a
    float), None where not finite (not measured)."""
    if isinstance(values, Mapping):
        return {key: json_values(value, digits) for key, value in values.items()}
    if isinstance(values, list | tuple | np.ndarray):
        return [json_values(value, digits) for value in values]
    if not isinstance(values, float | np.floating):
        return values
    return float(f"{values:.{digits}g}") if math.isfinite(values) else None


def to_json(data: Mapping[str, Any]) -> str:
    """Indented JSON in ASCII; nan and infinity become null."""
    return json.dumps(json_values(data), indent=1, allow_nan=False)
