"""`attend.py heads RUN`: every score of every head, next to the effect of ablating the head."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from inspection.commands.shared import (
    OutputOptions,
    ablation_notes,
    effect_texts,
    flatten_intervals,
    note_lines,
    require_scores,
    score_rows,
)
from inspection.head_scores import score_info
from inspection.run_reader import NEWEST, RunFiles, match_name
from inspection.terminal import DISCLAIMER, Result, Terminal, table


@dataclass(frozen=True)
class Heads(OutputOptions):
    """The scores of all heads at one step, and the effects of ablating them."""

    step: int = NEWEST
    """A training step with an attention file; -1 is the newest."""
    score: str = ""
    """One score: heads sorted, all effects; by default all scores."""


def run(options: Heads, terminal: Terminal) -> Result:
    """All scores, or one in full."""
    files = RunFiles.open(options.run)
    step = files.step(options.step)
    file, results = files.attention_files[step], files.ablation
    require_scores(file.scores, files)
    names = list(file.scores)
    if options.score:
        names = [match_name(options.score, names, "score", f"step {step} of {files.folder}")]
    rows = score_rows(file, results, names)
    if options.score:
        rows.sort(key=lambda row: -row["value"] if math.isfinite(row["value"]) else math.inf)
        title, body = f"{options.score}: {score_info(options.score).title}", _one_score(rows, terminal)
    else:
        title = "every score of every head, each followed by the effect of zero ablation"
        body = _all_scores(rows, terminal)
    lines = [f"{files.folder}, step {step}", title, "", *body, ""]
    lines += [*note_lines(rows), *ablation_notes(files, step, file, results), DISCLAIMER]
    data: dict[str, Any] = {"run": str(files.folder), "step": step, "heads": rows, "disclaimer": DISCLAIMER}
    return Result(lines, data, [flatten_intervals(row) for row in rows])


def _all_scores(rows: list[dict[str, Any]], terminal: Terminal) -> list[str]:
    """A row for each head; each score is followed by its effect, with a `!` if it has a note."""
    titles = ["head", *(title for name in dict.fromkeys(row["score"] for row in rows) for title in (name, "ablated"))]
    cells: dict[str, list[Any]] = {}
    for row in rows:
        effect = effect_texts(row, "zero_ablation")[0].split()[0]
        cells.setdefault(row["head"], [row["head"]]).extend([row["value"], effect + ("!" if row["note"] else " ")])
    return table(titles, list(cells.values()), terminal.width)


def _one_score(rows: list[dict[str, Any]], terminal: Terminal) -> list[str]:
    """A row for each head, highest score first, with both ablations and both controls."""
    titles = ("head", "value", "zero ablation", "mean ablation", "control, zero", "control, mean", "label")
    keys = ("zero_ablation", "mean_ablation", "control_zero", "control_mean")
    cells = [(row["head"], row["value"], *effect_texts(row, *keys), row["label"] or "-") for row in rows]
    lines = table(titles, cells, terminal.width, fixed=2)
    if rows and rows[0]["measure"]:
        lines += ["", f"effects on {rows[0]['measure']} in {rows[0]['unit']}, with 95% intervals; positive is worse"]
    return lines
