"""`attend.py timeline RUN`: the scores of the heads over the training steps, as sparklines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from inspection.commands.shared import OutputOptions, require_scores
from inspection.findings import ATTENTION_THRESHOLD
from inspection.head_scores import score_info
from inspection.plots import score_range
from inspection.run_reader import HeadScoreSeries, RunFiles, best_head, match_name
from inspection.terminal import Cell, Result, Terminal, head_name, sparkline, table

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
    heads = [(name, head) for name in names for head in np.ndindex(*series.scores[name].shape[1:])]
    timelines = [_timeline(name, head, series) for name, head in heads]
    best = {name: best_head(name, series.scores[name][-1]) for name in names}
    shown = [t for t, (name, head) in zip(timelines, heads, strict=True) if options.score or head == best[name]]
    steps = series.steps
    lines = [f"{files.folder}, steps {steps[0]} to {steps[-1]}, {len(steps)} evaluations"]
    if not options.score:
        lines.append("the best head of each score at the last step; --score NAME or --score all shows every head")
    elif options.score != "all":
        lines.append(f"{options.score}: {score_info(options.score).title}")
    lines += ["", *_table(shown, series, terminal), ""]
    lines.append(f"threshold: the first step with a score of at least {ATTENTION_THRESHOLD}, for shares of attention")
    rows = [
        {"head": t["head"], "score": t["score"], "step": step, "value": value}
        for t in timelines
        for step, value in zip(steps, t["values"], strict=True)
    ]
    return Result(lines, {"run": str(files.folder), "steps": steps, "timelines": timelines}, rows)


def _timeline(name: str, head: tuple[int, ...], series: HeadScoreSeries) -> dict[str, Any]:
    """One score of one head over the steps, and the first step at which it reached the threshold."""
    values = series.scores[name][:, head[0], head[1]].astype(float)
    reached = values >= ATTENTION_THRESHOLD
    is_reached = score_info(name).is_share and reached.any()
    return {
        "head": head_name(*head),
        "score": name,
        "first": values[0],
        "last": values[-1],
        "max": np.max(values[np.isfinite(values)], initial=-np.inf),
        "threshold_step": series.steps[int(reached.argmax())] if is_reached else None,
        "values": values.tolist(),
    }


def _table(timelines: list[dict[str, Any]], series: HeadScoreSeries, terminal: Terminal) -> list[str]:
    rows: list[tuple[Cell, ...]] = []
    for timeline in timelines:
        name, reached = timeline["score"], timeline["threshold_step"]
        low, high = score_range(name, series.scores[name])
        line = sparkline(timeline["values"], low, high, terminal.encoding, SPARKLINE_WIDTH)
        if reached is None:
            reached = "never" if score_info(name).is_share else "-"
        rows.append((name, timeline["head"], line, *(timeline[key] for key in ("first", "last", "max")), reached))
    titles = ("score", "head", "over the steps", "first", "last", "max", "threshold at step")
    return table(titles, rows, max(terminal.width, 80), fixed=3)
