"""Attention in a terminal: plain text, in any encoding, without a colour or a control character.

Takes patterns from `capture.py` or from a dump (`dump.py`) and needs numpy alone.
"""

from __future__ import annotations

import csv
import io
import json
import math
import textwrap
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from common.errors import escape_control_chars

ASCII_SHADES = ".:-=+*#%@"
BLOCK_SHADES = "·░▒▓█"
LABEL_WIDTH = 12
DISCLAIMER = "Weights show what is read, not why."


def head_name(layer: int, head: int) -> str:
    """`L1H2` is layer 1, head 2, both counted from 0."""
    return f"L{layer}H{head}"


def can_show(text: str, encoding: str | None) -> bool:
    """Whether a stream of this encoding can print the text. `None` and unknown encodings count as ASCII."""
    try:
        text.encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _printable(character: str, encoding: str | None) -> str:
    if character == "\\":
        return "\\\\"
    combining = unicodedata.category(character).startswith("M")  # melts into whatever stands before it
    if character.isprintable() and not combining and can_show(character, encoding):
        return character
    return character.encode("unicode_escape").decode("ascii")


def token_text(token: bytes, encoding: str | None = "utf-8", space: str | None = None) -> str:
    r"""A token's bytes as text that is safe to print: ` She` as `·She`, a line break as `\n`, half a letter
    as `\xc3`, and end-of-text, which has no bytes, as `<end>`.

    Args:
        token: may be any bytes: a tokenizer can cut a UTF-8 sequence in two.
        encoding: what the output can show, such as `sys.stdout.encoding`; everything else is escaped.
        space: how a space is written; `None` takes `·`, or `_` where the encoding has none.
    """
    if not token:
        return "<end>"
    if space is None:
        space = "·" if can_show("·", encoding) else "_"
    # surrogateescape keeps each broken byte b as U+DC00 + b, which no valid text can hold
    characters = token.decode("utf-8", "surrogateescape")
    shown = []
    for c in characters:
        if "\udc80" <= c <= "\udcff":
            shown.append(f"\\x{ord(c) - 0xDC00:02x}")
        else:
            shown.append(space if c == " " else _printable(c, encoding))
    return "".join(shown)


def _quoted(text: str) -> str:
    return '"' + text.replace('"', '\\"') + '"'


def _candidates(T: int) -> NDArray[np.bool_]:
    """True (T, T) where query i reads an earlier token that is not the first one.

    The first token is where heads rest that find nothing (Xiao et al. 2023, "attention sinks"), and a token
    that reads itself moves no information. In a text so short that nothing else is left, both count.
    """
    mask = np.tril(np.ones((T, T), dtype=bool), -1)
    mask[:, 0] = False
    return mask if mask.any() else np.tril(np.ones((T, T), dtype=bool))


def strongest(pattern: ArrayLike, token_texts: Sequence[str], top: int = 3) -> list[str]:
    """Each head's strongest readings in words, such as `L0H1  " She" reads " Mia" 0.62 (5 back)`.

    Of each query only its strongest reading of an earlier token counts, the first token left out (see
    `_candidates`); of those, the `top` heaviest of the head, heaviest first.

    Args:
        pattern: weights (L, H, T, T).
        token_texts: T texts as `token_text(token, encoding, space=" ")` gives them; they stand in quotes.

    Returns:
        L * H * top lines (fewer in a text of fewer than top + 2 tokens).
    """
    weights = np.asarray(pattern)
    L, H, T, _ = weights.shape
    assert len(token_texts) == T, f"{len(token_texts)} texts for {T} tokens"
    candidates = _candidates(T)
    queries = np.flatnonzero(candidates.any(axis=1))
    lines = []
    for layer in range(L):
        for head in range(H):
            rows = np.where(candidates, weights[layer, head], -1.0)
            best = rows.argmax(axis=1)
            order = queries[np.argsort(-rows[queries, best[queries]], kind="stable")][:top]
            for i in order:
                j = int(best[i])
                read = f"{_quoted(token_texts[j])} {rows[i, j]:.2f} ({i - j} back)"
                if j == i:
                    read = f"itself {rows[i, j]:.2f}"
                lines.append(f"{head_name(layer, head)}  {_quoted(token_texts[i])} reads {read}")
    return lines


def _columns(character: str) -> int:
    """How many columns of a terminal a character takes."""
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def columns_of(text: str) -> int:
    """How many columns of a terminal a text takes."""
    return sum(map(_columns, text))


def _fit(text: str, columns: int) -> str:
    """The text cut or filled with spaces to exactly so many columns of a terminal."""
    taken, kept = 0, ""
    for c in text:
        if taken + _columns(c) > columns:
            break
        taken, kept = taken + _columns(c), kept + c
    return kept + " " * (columns - taken)


def _ruler(first: int, T: int, cell: int) -> list[str]:
    """The number of each column, its digits one below the other; the higher digits only where they change."""
    lines = []
    for place in reversed(range(len(str(T - 1)))):
        digits = ""
        for k in range(first, T):
            shown = place == 0 or (k % 10**place == 0 and k >= 10**place) or (k == first and k >= 10**place)
            digits += (str(k // 10**place % 10) if shown else " ").ljust(cell)
        lines.append(digits.rstrip())
    return lines


def heat_map(
    pattern_one_head: ArrayLike, token_texts: Sequence[str], width: int, encoding: str | None = "ascii"
) -> list[str]:
    """One head as rows of characters: row = query, column = key, darker = more weight.

    Blank is what causality forbids, a dot is a weight near 0. Where the columns do not fit, the last tokens
    are shown and the first line says so; weights on the others are then out of sight.

    Args:
        pattern_one_head: weights (T, T).
        token_texts: T texts as `token_text(token, encoding)` gives them.
        width: columns of the terminal; at least 40 are used.
        encoding: of the output: blocks where it has them, else ASCII.
    """
    weights = np.asarray(pattern_one_head, dtype=np.float32)
    T = len(weights)
    assert weights.shape == (T, T) and len(token_texts) == T, f"{weights.shape}, {len(token_texts)} texts"
    shades = BLOCK_SHADES if can_show(BLOCK_SHADES, encoding) else ASCII_SHADES
    digits = len(str(T - 1))
    margin = digits + 1 + LABEL_WIDTH + 1
    room = max(width, 40) - margin
    cell = 2 if room >= 2 * T else 1
    first = max(0, T - room)
    lines = []
    if first:
        lines.append(f"the last {T - first} of {T} tokens")
    lines += [" " * margin + line for line in _ruler(first, T, cell)]
    cells = [shade * cell if k else shade.ljust(cell) for k, shade in enumerate(shades)]
    levels = np.clip(np.rint(np.nan_to_num(weights) * (len(shades) - 1)), 0, len(shades) - 1).astype(int)
    for i in range(first, T):
        row = "".join(cells[level] for level in levels[i, first : i + 1])
        lines.append(f"{i:>{digits}} {_fit(token_texts[i], LABEL_WIDTH)} {row}")
    lines.append(f"row reads column; weight 0 {shades} 1")
    return lines


def clearest_head(pattern: ArrayLike) -> tuple[int, int]:
    """(layer, head) whose queries, on average, put most weight on one earlier token that is not the first.

    Args:
        pattern: weights (L, H, T, T).
    """
    weights = np.asarray(pattern)
    candidates = _candidates(weights.shape[-1])
    best = np.where(candidates, weights, 0.0).max(axis=-1)[..., candidates.any(axis=1)].mean(axis=-1)
    layer, head = np.unravel_index(best.argmax(), best.shape)
    return int(layer), int(head)


BLOCKS = "▁▂▃▄▅▆▇█"
ASCII_BLOCKS = "_.-=+*#@"
WIDEST = 200
"""Columns of a terminal that are used, at most."""
Cell = str | int | float | None


@dataclass(frozen=True)
class Terminal:
    """What the output is written to."""

    encoding: str | None = "ascii"
    """Of the stream; None counts as ASCII."""
    width: int = 100
    """In columns."""


@dataclass(frozen=True)
class Result:
    """What a command has found, three times: for a person, for `--json`, for `--csv`."""

    lines: list[str]
    data: dict[str, Any]
    records: list[dict[str, Any]]
    ok: bool = True
    """Whether all went well: a check may fail and still be told in full."""


@dataclass(frozen=True)
class Column:
    """A column of a text table."""

    title: str
    digits: int = 2
    """After the point."""
    signed: bool = False
    """Whether a positive number gets its plus."""
    side: Literal["left", "right"] = "right"


def number(value: float | None, digits: int = 2, signed: bool = False) -> str:
    """A number for reading; `-` where there is none. What rounds to zero has no sign."""
    if value is None or not math.isfinite(value):
        return "-"
    shown = f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"
    return shown if float(shown) else shown.lstrip("+-")


def interval(triple: Sequence[float] | None, digits: int = 2) -> str:
    """(value, low, high) as `+0.31 [+0.28, +0.35]`; `-` where there is none."""
    if triple is None:
        return "-"
    value, low, high = (number(part, digits, signed=True) for part in triple)
    return f"{value} [{low}, {high}]"


def _cell(value: Cell, column: Column) -> str:
    if isinstance(value, float) or value is None:
        return number(value, column.digits, column.signed)
    return str(value)


def table(columns: Sequence[Column], rows: Sequence[Sequence[Cell]], width: int = 100, fixed: int = 1) -> list[str]:
    """Rows under their titles. What is wider than the terminal is continued below, in further blocks of columns.

    Args:
        width: columns of the terminal.
        fixed: how many of the first columns every block repeats.
    """
    texts = [[_cell(value, column) for value, column in zip(row, columns, strict=True)] for row in rows]
    titles = [column.title for column in columns]
    widths = [max(map(columns_of, cells)) for cells in zip(titles, *texts, strict=True)]
    blocks: list[list[int]] = [[]]
    room = free = max(width, 20) - sum(widths[:fixed]) - 2 * (fixed - 1)
    for k in range(fixed, len(columns)):
        if widths[k] + 2 > free and blocks[-1]:
            blocks.append([])
            free = room
        blocks[-1].append(k)
        free -= widths[k] + 2
    lines: list[str] = []
    for block in blocks:
        if lines:
            lines.append("")
        shown = [*range(fixed), *block]
        lines += [_line([texts[k] for k in shown], shown, columns, widths) for texts in (titles, *texts)]
    return lines


def _line(cells: Sequence[str], shown: Sequence[int], columns: Sequence[Column], widths: Sequence[int]) -> str:
    filled = []
    for cell, k in zip(cells, shown, strict=True):
        space = " " * (widths[k] - columns_of(cell))
        filled.append(cell + space if columns[k].side == "left" else space + cell)
    return "  ".join(filled).rstrip()


def paragraph(text: str, width: int) -> list[str]:
    """A sentence in lines of at most so many characters; words are kept whole."""
    return textwrap.wrap(text, max(width, 40), break_long_words=False, break_on_hyphens=False)


def sparkline(values: ArrayLike, low: float, high: float, encoding: str | None = "ascii", width: int = 60) -> str:
    """A row of numbers as a row of characters, low to high; blank where a number is missing.

    More numbers than `width` are averaged, neighbours with neighbours.

    Args:
        values: (S,), nan where one is missing.
        low: drawn as the lowest mark; smaller numbers are too.
        high: drawn as the highest.
        encoding: of the output: blocks where it has them, else ASCII.
    """
    shades = BLOCKS if can_show(BLOCKS, encoding) else ASCII_BLOCKS
    numbers = np.asarray(values, dtype=np.float64)
    marks = []
    for part in np.array_split(numbers, min(len(numbers), max(1, width))) if len(numbers) else []:
        seen = part[np.isfinite(part)]
        share = (np.clip(seen, low, high).mean() - low) / (high - low) if len(seen) and high > low else 0.0
        level = int(np.clip(share * len(shades), 0, len(shades) - 1))
        marks.append(shades[level] if len(seen) else " ")
    return "".join(marks)


def plain(value: Any) -> Any:
    """Anything that the commands find, as JSON has it: arrays as lists, numbers finite or null."""
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def to_json(data: Mapping[str, Any]) -> str:
    """Indented JSON of ASCII characters alone: it passes through any terminal and file."""
    return json.dumps(plain(data), indent=1, allow_nan=False)


def to_csv(records: Sequence[Mapping[str, Any]]) -> str:
    """A line of names, then a line for each record; a missing number is left empty, control characters are escaped."""
    if not records:
        return ""
    names = list(dict.fromkeys(name for record in records for name in record))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    for record in records:
        writer.writerow(
            {name: escape_control_chars(v) if isinstance(v, str) else v for name, v in plain(record).items()}
        )
    return text.getvalue().rstrip("\n")
