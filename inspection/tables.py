"""Numbers as text: tables that fit a terminal, sparklines, JSON and CSV. Needs numpy alone.

Last in the flow: what a command of `attend.py` has found goes out through here. JSON and CSV carry the plain numbers,
finite or null; the text is rounded for reading.
"""

from __future__ import annotations

import csv
import io
import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from common.errors import printable
from inspection.registry import score_info
from inspection.terminal import can_show, columns_of

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


def scale(name: str, values: ArrayLike) -> tuple[float, float]:
    """The least and the largest value of a head score, to draw it by; of one without a bound, the largest there is."""
    largest = float(np.nanmax(np.asarray(values, dtype=np.float64), initial=0.0)) or 1.0
    try:
        info = score_info(name)
    except KeyError:
        return 0.0, max(largest, 1.0)
    return info.low, largest if info.high is None else info.high


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
        writer.writerow({name: printable(v) if isinstance(v, str) else v for name, v in plain(record).items()})
    return text.getvalue().rstrip("\n")
