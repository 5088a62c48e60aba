"""`attend.py compare RUN [OTHER]`: the difference between two steps, or two runs, head by head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from common.errors import CONFIG, UserError
from inspection.attention_file import AttentionFile
from inspection.commands.shared import Context, OutputOptions, Result, model_shape
from inspection.run_reader import NEWEST, RunFiles, match_name
from inspection.terminal import DISCLAIMER, head_name, number, paragraph, table

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Compare(OutputOptions):
    """Differences between two steps of a run, or two runs: the first minus the second."""

    other: str = ""
    """The second run, also accepted as a second word; by default the same run."""
    step: int = NEWEST
    """Step of the first run; -1 is the newest."""
    against: int = NEWEST
    """Step of the second run; -1 is the newest of another run, the oldest of the same run."""
    text: str = ""
    """Compare the patterns of this text only."""


def run(options: Compare, context: Context) -> Result:
    """Differences of scores and patterns."""
    first = RunFiles.open(options.run)
    second = RunFiles.open(options.other) if options.other else first
    steps = first.step(options.step), second.step(options.against)
    if not options.other and options.against == NEWEST:
        steps = steps[0], first.steps[0]
    files = first.read(steps[0]), second.read(steps[1])
    sides = f"{first.folder} step {steps[0]}", f"{second.folder} step {steps[1]}"
    scores, notes = _score_differences(*files, sides)
    patterns, text_notes = _pattern_differences(*files, options.text, sides)
    rows = scores + patterns
    if not rows:
        raise UserError(f"{sides[0]} and {sides[1]} have no score and no text in common", CONFIG)
    identical = not any(row["difference"] for row in rows)
    notes = ["no difference: all numbers are equal"] * identical + notes + text_notes
    data: dict[str, Any] = {
        "first": {"run": str(first.folder), "step": steps[0]},
        "second": {"run": str(second.folder), "step": steps[1]},
        "identical": identical,
        "differences": rows,
        "notes": notes,
    }
    lines = [f"{sides[0]} minus {sides[1]}", *notes, "", *_table(scores, patterns, context.width), ""]
    if patterns:
        names = ", ".join(dict.fromkeys(row["name"] for row in patterns))
        lines += paragraph(f"moved: the share of a token's attention that goes elsewhere, over {names}", context.width)
    return Result([*lines, DISCLAIMER], data)


def _score_differences(first: AttentionFile, second: AttentionFile, sides: tuple[str, str]) -> tuple[Rows, list[str]]:
    """A row for each score that both have and each head; a note for the other scores."""
    a, b = model_shape(first), model_shape(second)
    if all(a) and all(b) and a != b:
        shapes = f"{sides[0]} has {a[0]} layers of {a[1]} heads, {sides[1]} has {b[0]} layers of {b[1]} heads"
        raise UserError(f"{shapes}: they cannot be compared head by head", CONFIG)
    rows: Rows = []
    for name in (name for name in first.scores if name in second.scores):
        for head, x in np.ndenumerate(first.scores[name].astype(float)):
            y = float(second.scores[name][head])
            difference = 0.0 if np.isnan(x) and np.isnan(y) else x - y
            rows.append({"kind": "score", "name": name, "head": head_name(*head), "difference": difference})
    unshared = sorted(first.scores.keys() ^ second.scores.keys())
    return rows, [f"only one of the two has the scores {', '.join(unshared)}"] if unshared else []


def _pattern_differences(
    first: AttentionFile, second: AttentionFile, text: str, sides: tuple[str, str]
) -> tuple[Rows, list[str]]:
    """A row for each text that both have, with the same tokens, and each head; notes for the other texts.

    The difference is the share of its attention that a query moves to other keys, averaged over the queries: half the
    sum of absolute differences, 0 for equal patterns and 1 for patterns without a common key.
    """
    a, b = ({record.name: record for record in file.texts} for file in (first, second))
    names = [name for name in a if name in b]
    if text:
        names = [match_name(text, records, "text", side) for records, side in zip((a, b), sides, strict=True)][:1]
    rows: Rows = []
    notes = [] if names else ["the two have no text in common; only scores are compared"]
    for name in names:
        if a[name].token_bytes != b[name].token_bytes:
            notes.append(f"text {name!r} has different tokens; its patterns are not compared")
            continue
        moved = np.abs(a[name].pattern_tril.astype(float) - b[name].pattern_tril.astype(float)).sum(axis=-1)
        for head, value in np.ndenumerate(moved / (2 * len(a[name].tokens))):
            rows.append({"kind": "moved", "name": name, "head": head_name(*head), "difference": value})
    return rows, notes


def _table(scores: Rows, patterns: Rows, width: int) -> list[str]:
    """A row for each head: moved attention, averaged over the texts, then the difference of each score."""
    cells = []
    for head in dict.fromkeys(row["head"] for row in scores or patterns):
        moved = [row["difference"] for row in patterns if row["head"] == head]
        differences = [number(row["difference"], signed=True) for row in scores if row["head"] == head]
        cells.append([head, *([number(float(np.mean(moved)), 3)] if moved else []), *differences])
    names = dict.fromkeys(row["name"] for row in scores)
    return table(["head", *(["moved"] if patterns else []), *names], cells, width)
