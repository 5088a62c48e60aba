"""`attend.py timeline RUN`: when in training each head learned what it does, as sparklines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import escape_control_chars
from inspection.commands.shared import Told, as_name, best_head, heads_of, require_scores, short, title_of
from inspection.findings import ATTENTION_THRESHOLD
from inspection.plots import score_range
from inspection.run_reader import RunFiles
from inspection.terminal import Cell, Column, Result, Terminal, head_name, sparkline, table

DRAWN = 60
"""Marks of a sparkline, at most."""


@dataclass(frozen=True)
class Timeline(Told):
    """The scores over the steps of training."""

    score: str = ""
    """One score, or `all`, of every head; by default the words show each score's best head. JSON and CSV hold all."""


def run(config: Timeline, terminal: Terminal) -> Result:
    """A line for each head, or for the best head of each score."""
    attention = RunFiles.open(config.run)
    scores, steps = attention.scores(), attention.steps
    require_scores(scores, attention)
    one = config.score not in ("", "all")
    names = [as_name(config.score, scores, "score", str(attention.folder))] if one else list(scores)
    records = [history(name, head, steps, scores[name]) for name in names for head in heads_of(scores[name][-1])]
    shown = records
    if not config.score:
        best = {name: best_head(name, scores[name][-1]) for name in names}
        shown = [one for one in records if (head := best[one["score"]]) and one["head"] == head_name(*head)]
    data: dict[str, Any] = {"run": str(attention.folder), "steps": steps, "timelines": records}
    flat = [
        {"head": found["head"], "score": found["score"], "step": step, "value": value}
        for found in records
        for step, value in zip(steps, found["values"], strict=True)
    ]
    return Result(_lines(config.score, shown, scores, attention, terminal), data, flat)


def history(name: str, head: tuple[int, int], steps: list[int], values: NDArray[np.float32]) -> dict[str, Any]:
    """What became of a head's score: (S, L, H) over the steps, summed up.

    `half` is what it is to reach: half of a head's weight; for distances half of the head's own farthest.
    """
    line = values[:, head[0], head[1]].astype(float)
    known = line[np.isfinite(line)]
    largest = float(known.max()) if len(known) else np.nan
    half = largest / 2 if name == "distance" else ATTENTION_THRESHOLD
    reached = [step for step, value in zip(steps, line, strict=True) if value >= half]
    return {
        "head": head_name(*head),
        "score": name,
        "first": float(line[0]),
        "last": float(line[-1]),
        "max": largest,
        "half": half,
        "half_step": reached[0] if reached else None,
        "values": line.tolist(),
    }


def _lines(
    score: str,
    records: list[dict[str, Any]],
    scores: dict[str, NDArray[np.float32]],
    attention: RunFiles,
    terminal: Terminal,
) -> list[str]:
    steps = attention.steps
    rows: list[Sequence[Cell]] = []
    for one in records:
        low, high = score_range(one["score"], scores[one["score"]])
        line = sparkline(one["values"], low, high, terminal.encoding, DRAWN)
        reached = "never" if one["half_step"] is None else str(one["half_step"])
        rows.append((short(one["score"]), one["head"], line, one["first"], one["last"], one["max"], reached))
    titles = ("score", "head", "over the steps")
    columns = [Column(title, side="left") for title in titles] + [Column(title) for title in ("first", "last", "max")]
    columns.append(Column("half at step"))
    title = f"step {steps[0]} to {steps[-1]}, {len(steps)} attention files, a mark for each"
    if len(steps) > DRAWN:
        title = f"step {steps[0]} to {steps[-1]}, {len(steps)} attention files, several to a mark"
    head = [f"{escape_control_chars(attention.folder)}, {title}"]
    fixed = 3
    if score not in ("", "all"):
        head.append(f"{score}: {title_of(score)}")
        rows, columns, fixed = [row[1:] for row in rows], columns[1:], 2
    elif not score:
        head.append("the best head of each score at the last step; --score NAME or --score all shows every head")
    last = "half: the first step at which the score reached 0.5; of distance, half of the head's own largest"
    return [*head, "", *table(columns, rows, max(terminal.width, 80), fixed), "", last]
