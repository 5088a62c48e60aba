"""`attend.py compare RUN [OTHER]`: the difference between two steps, or two runs, head by head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import CONFIG, UserError, escape_control_chars
from inspection.attention_file import AttentionFile, AttentionRecord
from inspection.commands.shared import OutputOptions, model_shape
from inspection.run_reader import NEWEST, RunFiles, match_name
from inspection.terminal import DISCLAIMER, Cell, Column, Result, Terminal, head_name, paragraph, table

DEFAULT = -1


@dataclass(frozen=True)
class Compare(OutputOptions):
    """Differences between two steps of a run, or two runs: the first minus the second."""

    other: str = ""
    """The second run, also accepted as a second word; by default the same run."""
    step: int = NEWEST
    """Step of the first run; -1 is the newest."""
    against: int = DEFAULT
    """Step of the second run; -1 is the newest of another run, the oldest of the same run."""
    text: str = ""
    """Compare the patterns of this text only."""

    def problems(self) -> list[str]:
        problems = super().problems()
        return [*problems, f"--against is {self.against}; it must be a step, or -1"] if self.against < -1 else problems


def run(options: Compare, terminal: Terminal) -> Result:
    """Differences of scores and patterns."""
    first = RunFiles.open(options.run)
    second = RunFiles.open(options.other) if options.other else first
    steps = first.step(options.step), second.step(options.against)
    if not options.other and options.against == DEFAULT:
        steps = steps[0], first.steps[0]
    files = first.attention_files[steps[0]], second.attention_files[steps[1]]
    sides = [f"{escape_control_chars(r.folder)} step {step}" for r, step in zip((first, second), steps, strict=True)]
    scores, notes = _score_differences(*files, sides)
    patterns, text_notes = _pattern_differences(*files, options.text, sides)
    if not scores and not patterns:
        raise UserError(f"{sides[0]} and {sides[1]} have no score and no text in common", CONFIG)
    notes += text_notes
    identical = not any(row[key] for key, rows in (("difference", scores), ("moved", patterns)) for row in rows)
    if identical:
        notes.insert(0, "no difference: all numbers are equal")
    data: dict[str, Any] = {
        "first": {"run": str(first.folder), "step": steps[0]},
        "second": {"run": str(second.folder), "step": steps[1]},
        "identical": identical,
        "scores": scores,
        "patterns": patterns,
        "notes": notes,
    }
    lines = [f"{sides[0]} minus {sides[1]}", *notes, "", *_table(scores, patterns, terminal), ""]
    if patterns:
        names = ", ".join(dict.fromkeys(escape_control_chars(row["text"]) for row in patterns))
        lines += paragraph(f"moved: the share of a token's attention that goes elsewhere, over {names}", terminal.width)
    rows = [{"kind": "score", "name": r["score"], "head": r["head"], "difference": r["difference"]} for r in scores]
    rows += [{"kind": "moved", "name": r["text"], "head": r["head"], "difference": r["moved"]} for r in patterns]
    return Result([*lines, DISCLAIMER], data, rows)


def _score_differences(
    first: AttentionFile, second: AttentionFile, sides: list[str]
) -> tuple[list[dict[str, Any]], list[str]]:
    """A row for each score that both have and each head; a note for the other scores."""
    shapes = model_shape(first), model_shape(second)
    if all(shapes) and shapes[0] != shapes[1]:
        each = [f"{side} has {s[0]} layers of {s[1]} heads" for side, s in zip(sides, shapes, strict=True) if s]
        raise UserError(f"{each[0]}, {each[1]}: they cannot be compared head by head", CONFIG)
    rows = []
    for name in (name for name in first.scores if name in second.scores):
        a, b = first.scores[name].astype(float), second.scores[name].astype(float)
        difference = np.where(np.isnan(a) & np.isnan(b), 0, a - b)
        for head in np.ndindex(*a.shape):
            row = {"head": head_name(*head), "score": name, "first": a[head], "second": b[head]}
            rows.append({**row, "difference": difference[head]})
    unshared = sorted(map(escape_control_chars, first.scores.keys() ^ second.scores.keys()))
    return rows, [f"only one of the two has the scores {', '.join(unshared)}"] if unshared else []


def _pattern_differences(
    first: AttentionFile, second: AttentionFile, text: str, sides: list[str]
) -> tuple[list[dict[str, Any]], list[str]]:
    """A row for each text that both have, with the same tokens, and each head; notes for the other texts."""
    ours, theirs = ({record.name: record for record in file.texts} for file in (first, second))
    names = [name for name in ours if name in theirs]
    if text:
        match_name(text, ours, "text", sides[0])
        names = [match_name(text, theirs, "text", sides[1])]
    rows, notes = [], [] if names else ["the two have no text in common; only scores are compared"]
    for name in names:
        if ours[name].token_bytes != theirs[name].token_bytes:
            notes.append(f"text {escape_control_chars(name)!r} has different tokens; its patterns are not compared")
            continue
        moved = moved_attention(ours[name], theirs[name])
        rows += [{"head": head_name(*h), "text": name, "moved": float(moved[h])} for h in np.ndindex(*moved.shape)]
    return rows, notes


def moved_attention(first: AttentionRecord, second: AttentionRecord) -> NDArray[np.float64]:
    """The share of its attention that a query moves to other keys, averaged over the queries, (L, H).

    Half the sum of absolute differences: 0 for equal patterns, 1 for patterns without a common key.
    """
    difference = np.abs(first.pattern_tril.astype(np.float64) - second.pattern_tril.astype(np.float64))
    return difference.sum(axis=-1) / (2 * len(first.tokens))


def _table(scores: list[dict[str, Any]], patterns: list[dict[str, Any]], terminal: Terminal) -> list[str]:
    """A row for each head: moved attention, averaged over the texts, then the difference of each score."""
    moved: dict[str, list[float]] = {}
    for row in patterns:
        moved.setdefault(row["head"], []).append(row["moved"])
    cells: dict[str, list[Cell]] = {head: [head, float(np.mean(values))] for head, values in moved.items()}
    for row in scores:
        cells.setdefault(row["head"], [row["head"]]).append(row["difference"])
    columns = [Column("head", align="left"), *([Column("moved", 3)] if patterns else [])]
    columns += [Column(escape_control_chars(name), signed=True) for name in dict.fromkeys(r["score"] for r in scores)]
    return table(columns, list(cells.values()), terminal.width)
