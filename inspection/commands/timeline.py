"""`attend.py timeline RUN`: the scores of the heads over the training steps, as sparklines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from common.errors import escape_control_chars
from inspection.commands.shared import OutputOptions, require_scores
from inspection.findings import ATTENTION_THRESHOLD
from inspection.plots import score_range
from inspection.run_reader import HeadScoreSeries, RunFiles, best_head, find_score, match_name
from inspection.terminal import Cell, Column, Result, Terminal, head_name, sparkline, table

SPARKLINE_WIDTH = 60


@dataclass(frozen=True)
class Timeline(OutputOptions):
    """When in training each head learned what it does."""

    score: str = ""
    """One score, or `all`, of every head; by default text shows the best head of each score. JSON and CSV hold all."""


def run(options: Timeline, terminal: Terminal) -> Result:
    """A line for each head, or for the best head of each score."""
    files = RunFiles.open(options.run)
    series = files.head_scores
    require_scores(series.scores, files)
    names = list(series.scores)
    if options.score not in ("", "all"):
        names = [match_name(options.score, names, "score", str(files.folder))]
    timelines = [
        head_timeline(name, head, series) for name in names for head in np.ndindex(*series.scores[name].shape[1:])
    ]
    shown = timelines
    if not options.score:
        best = {name: best_head(name, series.scores[name][-1]) for name in names}
        shown = [one for one in timelines if (head := best[one["score"]]) and one["head"] == head_name(*head)]
    data: dict[str, Any] = {"run": str(files.folder), "steps": series.steps, "timelines": timelines}
    rows = [
        {"head": one["head"], "score": one["score"], "step": step, "value": value}
        for one in timelines
        for step, value in zip(series.steps, one["values"], strict=True)
    ]
    return Result(_lines(options.score, shown, files, terminal), data, rows)


def head_timeline(name: str, head: tuple[int, ...], series: HeadScoreSeries) -> dict[str, Any]:
    """One score of one head over the steps, and the first step at which half of the attention was where it tests.

    Scores that are not a share of attention have no such step.
    """
    values = series.scores[name][:, head[0], head[1]].astype(float)
    finite = values[np.isfinite(values)]
    largest = float(finite.max()) if len(finite) else np.nan
    reached = [step for step, value in zip(series.steps, values, strict=True) if value >= ATTENTION_THRESHOLD]
    return {
        "head": head_name(*head),
        "score": name,
        "first": float(values[0]),
        "last": float(values[-1]),
        "max": largest,
        "threshold_step": reached[0] if reached and find_score(name).is_share else None,
        "values": values.tolist(),
    }


def _lines(score: str, timelines: list[dict[str, Any]], files: RunFiles, terminal: Terminal) -> list[str]:
    series = files.head_scores
    rows: list[tuple[Cell, ...]] = []
    for one in timelines:
        low, high = score_range(one["score"], series.scores[one["score"]])
        line = sparkline(one["values"], low, high, terminal.encoding, SPARKLINE_WIDTH)
        missing = "never" if find_score(one["score"]).is_share else "-"
        reached = missing if one["threshold_step"] is None else str(one["threshold_step"])
        name = escape_control_chars(one["score"])
        rows.append((name, one["head"], line, one["first"], one["last"], one["max"], reached))
    columns = [Column(title, align="left") for title in ("score", "head", "over the steps")]
    columns += [Column(title) for title in ("first", "last", "max", "threshold at step")]
    steps = series.steps
    lines = [f"{escape_control_chars(files.folder)}, steps {steps[0]} to {steps[-1]}, {len(steps)} evaluations"]
    if score not in ("", "all"):
        lines.append(f"{score}: {find_score(score).title}")
    elif not score:
        lines.append("the best head of each score at the last step; --score NAME or --score all shows every head")
    note = f"threshold: the first step with a score of at least {ATTENTION_THRESHOLD}, for shares of attention"
    return [*lines, "", *table(columns, rows, max(terminal.width, 80), fixed=3), "", note]
