"""`attend.py heads RUN`: every score of every head, next to the effect of ablating the head."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from inspection.commands.shared import (
    Context,
    OutputOptions,
    Result,
    closing_notes,
    effect_texts,
    require_scores,
    score_rows,
)
from inspection.head_scores import score_info
from inspection.run_reader import NEWEST, RunFiles, match_name
from inspection.terminal import DISCLAIMER, table


@dataclass(frozen=True)
class Heads(OutputOptions):
    """The scores of all heads at one step, and the effects of ablating them."""

    step: int = NEWEST
    """A training step with an attention file; -1 is the newest."""
    score: str = ""
    """One score: heads sorted, all effects; by default all scores."""


def run(options: Heads, context: Context) -> Result:
    """All scores, or one in full."""
    files = RunFiles.open(options.run)
    step, score = files.step(options.step), options.score
    file = files.read(step)
    require_scores(file.scores, files)
    names = [match_name(score, file.scores, "score", f"step {step} of {files.folder}")] if score else list(file.scores)
    rows = score_rows(file, files.ablation, names)
    if score:
        rows.sort(key=lambda row: -row["value"] if math.isfinite(row["value"]) else math.inf)
        title, body = f"{score}: {score_info(score).title}", _one_score(rows, context.width)
    else:
        title = "every score of every head, each followed by the effect of zero ablation"
        body = _all_scores(rows, context.width)
    lines = [f"{files.folder}, step {step}", title, "", *body, "", *closing_notes(rows, files, step, file)]
    return Result(lines, {"run": str(files.folder), "step": step, "heads": rows, "disclaimer": DISCLAIMER})


def _all_scores(rows: list[dict[str, Any]], width: int) -> list[str]:
    """A row for each head; each score is followed by its effect, with a `!` if it has a note."""
    titles = ["head", *(title for name in dict.fromkeys(row["score"] for row in rows) for title in (name, "ablated"))]
    cells: dict[str, list[Any]] = {}
    for row in rows:
        effect = effect_texts(row, "zero")[0].split()[0]
        cells.setdefault(row["head"], [row["head"]]).extend([row["value"], effect + ("!" if row["note"] else " ")])
    return table(titles, list(cells.values()), width)


def _one_score(rows: list[dict[str, Any]], width: int) -> list[str]:
    """A row for each head, highest score first, with both ablations and both controls."""
    titles = ("head", "value", "zero ablation", "mean ablation", "control, zero", "control, mean", "label")
    keys = ("zero", "mean", "control_zero", "control_mean")
    cells = [(row["head"], row["value"], *effect_texts(row, *keys), row["label"] or "-") for row in rows]
    lines = table(titles, cells, width, fixed=2)
    if rows and rows[0]["measure"]:
        lines += ["", f"effects on {rows[0]['measure']} in {rows[0]['unit']}, with 95% intervals; positive is worse"]
    return lines
