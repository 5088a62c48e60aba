"""What a check of an attention file says: how far off something is, the bound beside it, and where.

Shared by `verify.py`, which checks what a file says about itself, and `recompute.py`, which needs the model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from inspection.attention_file import AttentionRecord

HALF_STEP = 2.0**-11
"""A number is rounded to f16 by at most this share of itself."""
WEIGHT = {2: HALF_STEP, 4: 1e-6}
"""Bounds on a weight by the bytes of its number: rounding to f16 takes half of the first, the rest is the machine's."""

Measured = Iterator[tuple[str, int | float, int | float]]
"""(name of a text, what was measured there, its bound)."""


@dataclass(frozen=True)
class CheckResult:
    """The outcome of one check over all texts of a file."""

    name: str
    ok: bool
    measured: int | float | str
    """At the worst place, that is where it is furthest from its bound."""
    bound: int | float | str
    where: str = ""
    """The text of that place, or what is wrong."""


@dataclass(frozen=True)
class Span:
    """Queries `first` to `stop` - 1, which read from position `start` on."""

    first: int
    stop: int
    start: int


def worst(name: str, measured: Measured) -> CheckResult:
    """The place that is furthest from its bound; a nan is further than anything."""
    found, furthest = CheckResult(name, True, 0.0, 0.0), -1.0
    for where, value, bound in measured:
        share = math.inf if math.isnan(value) or (value and not bound) else value / (bound or 1.0)
        if share > furthest:
            found, furthest = CheckResult(name, bool(value <= bound), value, bound, where if value else ""), share
    return found


def spans(metadata: Mapping[str, str], T: int) -> list[Span]:
    """Which stretch each query could read, from the metadata's `windows`; without it, the whole text before it.

    Raises:
        ValueError: if `windows` is malformed.
    """
    moves = json.loads(metadata.get("windows", "[[0, 0]]"))
    whole = isinstance(moves, list) and all(
        isinstance(move, list) and len(move) == 2 and all(type(number) is int for number in move) for move in moves
    )
    if not whole or not moves or moves[0] != [0, 0]:
        raise ValueError("its windows are malformed")
    firsts = [first for first, _ in moves] + [T]
    found = [Span(first, stop, start) for (first, start), stop in zip(moves, firsts[1:], strict=True)]
    if any(not 0 <= span.start <= span.first < span.stop for span in found):
        raise ValueError("its windows are malformed")
    return found


def table(findings: Sequence[CheckResult]) -> list[str]:
    """A line for each check."""
    width = max((len(finding.name) for finding in findings), default=0)
    lines = []
    for f in findings:
        figures = f"{_shown(f.measured):>12}  of {_shown(f.bound):<12}"
        lines.append(f"{'ok' if f.ok else 'FAIL':<4}  {f.name:<{width}}  {figures}  {f.where}".rstrip())
    return lines


def _shown(value: int | float | str) -> str:
    """A number in two digits, or the beginning of a hash."""
    return value[:12] if isinstance(value, str) else f"{value:.2g}"


def layers(text: AttentionRecord) -> Iterator[NDArray[np.float32]]:
    """The weights (H, T, T) of one layer after the other: all of them at once would take the memory of many files."""
    for layer in range(len(text.pattern_tril)):
        yield text.pattern(layer)[0]


def most(values: Sequence[float]) -> float:
    """The largest, or nan where there is one."""
    return float(np.max(np.array(values))) if values else 0.0
