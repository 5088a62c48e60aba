"""`attend.py timeline RUN`: the scores of the heads over the training steps, as sparklines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inspection.commands.shared import Context, OutputOptions, Result, require_scores
from inspection.findings import ATTENTION_THRESHOLD
from inspection.head_scores import score_info
from inspection.plots import score_range
from inspection.run_reader import RunFiles, best_head, match_name
from inspection.terminal import head_name, sparkline, table


@dataclass(frozen=True)
class Timeline(OutputOptions):
    """When in training each head learned what it does."""

    score: str = ""
    """One score, or `all`, of every head; by default text shows the best head of each score. JSON holds all."""


def run(options: Timeline, context: Context) -> Result:
    """A line for each head, or for the best head of each score."""
    files = RunFiles.open(options.run)
    steps, scores = files.head_scores
    require_scores(scores, files)
    names = list(scores)
    if options.score not in ("", "all"):
        names = [match_name(options.score, names, "score", str(files.folder))]
    timelines, shown = [], []
    for name in names:
        low, high = score_range(name, scores[name])
        for head in np.ndindex(scores[name].shape[1:]):
            timeline = _timeline(name, head, steps, scores[name])
            timelines.append(timeline)
            if options.score or head == best_head(name, scores[name][-1]):
                line = sparkline(timeline["values"], low, high)
                reached = timeline["threshold_step"]
                if reached is None:
                    reached = "never" if score_info(name).is_share else "-"
                shown.append((name, timeline["head"], line, *(timeline[k] for k in ("first", "last", "max")), reached))
    lines = [f"{files.folder}, steps {steps[0]} to {steps[-1]}, {len(steps)} evaluations"]
    if not options.score:
        lines.append("the best head of each score at the last step; --score NAME or --score all shows every head")
    elif options.score != "all":
        lines.append(f"{options.score}: {score_info(options.score).title}")
    titles = ("score", "head", "over the steps", "first", "last", "max", "threshold at step")
    lines += ["", *table(titles, shown, max(context.width, 80), fixed=3), ""]
    lines.append(f"threshold: the first step with a score of at least {ATTENTION_THRESHOLD}, for shares of attention")
    return Result(lines, {"run": str(files.folder), "steps": steps, "timelines": timelines})


def _timeline(name: str, head: tuple[int, ...], steps: list[int], scores: NDArray[np.float32]) -> dict[str, Any]:
    """One score of one head over the steps, and the first step at which it reached the threshold."""
    values = scores[:, head[0], head[1]].astype(float)
    reached = values >= ATTENTION_THRESHOLD
    is_reached = score_info(name).is_share and reached.any()
    return {
        "head": head_name(*head),
        "score": name,
        "first": values[0],
        "last": values[-1],
        "max": np.max(values[np.isfinite(values)], initial=-np.inf),
        "threshold_step": steps[int(reached.argmax())] if is_reached else None,
        "values": values.tolist(),
    }
