"""`attend.py compare RUN [OTHER]`: what differs between two steps, or two runs, head by head and signed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import CONFIG, UserError, escape_control_chars
from inspection.attention_file import AttentionFile, AttentionRecord
from inspection.commands.shared import Told, as_name, heads_in, heads_of, short
from inspection.run_reader import NEWEST, RunFiles
from inspection.terminal import DISCLAIMER, Column, Result, Terminal, head_name, paragraph, table

OLDEST_OR_NEWEST = -1


@dataclass(frozen=True)
class Compare(Told):
    """Two steps of a run, or two runs; what is shown is the first minus the second."""

    other: str = ""
    """The second run; may also stand as a second word. By default the same run at another step."""
    step: int = NEWEST
    """The step of the first; -1 is the newest."""
    against: int = OLDEST_OR_NEWEST
    """The step of the second; -1 is the newest of another run, the oldest of the same."""
    text: str = ""
    """Compare the patterns of this text alone."""

    def problems(self) -> list[str]:
        found = super().problems()
        if self.against < -1:
            found.append(f"--against is {self.against}; it must be a step of the run, or -1")
        return found


def run(config: Compare, terminal: Terminal) -> Result:
    """Scores and patterns of two dumps, first minus second."""
    first = RunFiles.open(config.run)
    second = RunFiles.open(config.other) if config.other else first
    steps = first.step(config.step), second.step(config.against)
    if not config.other and config.against == OLDEST_OR_NEWEST:
        steps = steps[0], first.steps[0]
    dumps = first.attention_files[steps[0]], second.attention_files[steps[1]]
    sides = [
        f"{escape_control_chars(run.folder)} at step {step}" for run, step in zip((first, second), steps, strict=True)
    ]
    scores, notes = _scores(*dumps, sides)
    patterns, more = _patterns(*dumps, config.text, sides)
    if not scores and not patterns:
        raise UserError(
            f"{sides[0]} and {sides[1]} have no score and no text in common; nothing can be compared", CONFIG
        )
    same = all(one["difference"] == 0 or _both_missing(one) for one in [*scores, *patterns])
    if same:
        notes.insert(0, "there is no difference at all: every number is zero")
    data: dict[str, Any] = {
        "first": {"run": str(first.folder), "step": steps[0]},
        "second": {"run": str(second.folder), "step": steps[1]},
        "identical": same,
        "scores": scores,
        "patterns": patterns,
        "notes": [*notes, *more],
    }
    lines = [f"{sides[0]} minus {sides[1]}", *notes, "", *_table(scores, patterns, terminal)]
    lines += ["", *_explained(patterns, more, terminal.width), DISCLAIMER]
    rows = [{"kind": "score", "name": one["score"], **_without(one, "score")} for one in scores]
    rows += [{"kind": "pattern", "name": one["text"], **_without(one, "text")} for one in patterns]
    return Result(lines, data, rows)


def _without(record: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != key}


def _both_missing(one: dict[str, Any]) -> bool:
    """A score that neither of the two has, such as one over questions that no longer fit the context."""
    return all(math.isnan(one.get(side, 0.0)) for side in ("first", "second"))


def _scores(first: AttentionFile, second: AttentionFile, sides: list[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """Each score that both have, head by head; and which ones only one of them has."""
    shapes = heads_in(first), heads_in(second)
    known = [shape for shape in shapes if shape]
    if len(known) == 2 and known[0] != known[1]:
        each = [f"{side} has {L} layers of {H} heads" for side, (L, H) in zip(sides, known, strict=True)]
        raise UserError(f"{each[0]}, {each[1]}: they cannot be compared head by head", CONFIG)
    both = [name for name in first.scores if name in second.scores]
    alone = sorted({*first.scores, *second.scores} - {*both})
    notes = [f"only one of the two has the scores {', '.join(map(escape_control_chars, alone))}"] if alone else []
    records = []
    for name in both:
        for head in heads_of(first.scores[name]):
            a, b = float(first.scores[name][head]), float(second.scores[name][head])
            records.append({"head": head_name(*head), "score": name, "first": a, "second": b, "difference": a - b})
    return records, notes


def _patterns(
    first: AttentionFile, second: AttentionFile, wanted: str, sides: list[str]
) -> tuple[list[dict[str, Any]], list[str]]:
    """How far the patterns of texts that both read are apart; and which texts were left out, and why."""
    ours, theirs = ({text.name: text for text in dump.texts} for dump in (first, second))
    names = [name for name in ours if name in theirs]
    notes = []
    if wanted:
        as_name(wanted, ours, "text", sides[0])
        names = [as_name(wanted, theirs, "text", sides[1])]
    records = []
    for name in names:
        if ours[name].token_bytes != theirs[name].token_bytes:
            notes.append(f"text {escape_control_chars(name)!r} has other tokens in the two: compared by scores only")
            continue
        apart, moved = apart_and_moved(ours[name], theirs[name])
        records += [
            {"head": head_name(*head), "text": name, "difference": float(apart[head]), "moved": float(moved[head])}
            for head in heads_of(apart)
        ]
    if not names:
        notes.append("the two have no text in common: compared by scores only")
    return records, notes


def apart_and_moved(first: AttentionRecord, second: AttentionRecord) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """How far two patterns of one text are apart, each (L, H).

    Returns:
        The mean of |difference| over all pairs that causality allows, and the share of its weight that a query
        reads elsewhere, half the sum of its |differences|, averaged over the queries.
    """
    T = len(first.tokens)
    apart = np.abs(first.pattern_tril.astype(np.float64) - second.pattern_tril.astype(np.float64))
    return apart.mean(axis=-1), apart.sum(axis=-1) / (2 * T)


def _table(scores: list[dict[str, Any]], patterns: list[dict[str, Any]], terminal: Terminal) -> list[str]:
    """A row for each head: how far its patterns moved, averaged over the texts, and each score's difference."""
    columns = [Column("head", side="left")]
    rows: dict[str, list[Any]] = {one["head"]: [one["head"]] for one in [*patterns, *scores]}
    if patterns:
        columns += [Column("pattern |diff|", 4), Column("moved", 3)]
        for head, row in rows.items():
            mine = [one for one in patterns if one["head"] == head]
            row += [float(np.mean([one[key] for one in mine])) for key in ("difference", "moved")]
    for name in dict.fromkeys(one["score"] for one in scores):
        columns.append(Column(short(name), 2, signed=True))
    for one in scores:
        rows[one["head"]].append(one["difference"])
    return table(columns, list(rows.values()), terminal.width)


def _explained(patterns: list[dict[str, Any]], notes: list[str], width: int) -> list[str]:
    lines = list(notes)
    if patterns:
        names = ", ".join(escape_control_chars(name) for name in dict.fromkeys(one["text"] for one in patterns))
        lines += [
            *paragraph(f"pattern |diff|: mean |difference| of a weight over the texts {names};", width),
            "moved: the share of its weight that a token reads elsewhere, on average",
        ]
    return lines
