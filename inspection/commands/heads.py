"""`attend.py heads RUN`: every head, every score, and beside each score what is lost without the head."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from common.errors import escape_control_chars
from inspection.commands.shared import (
    Told,
    about_evidence,
    as_name,
    effects_of,
    flat,
    heads_of,
    marks,
    record,
    require_scores,
    short,
    title_of,
)
from inspection.run_reader import NEWEST, RunFiles
from inspection.terminal import DISCLAIMER, Column, Result, Terminal, interval, number, table


@dataclass(frozen=True)
class Heads(Told):
    """The scores of all heads at one step."""

    step: int = NEWEST
    """A step of training with an attention file; -1 is the newest."""
    score: str = ""
    """One score, its heads sorted, with all that was measured; by default every score."""


def run(config: Heads, terminal: Terminal) -> Result:
    """All scores, or one in full."""
    attention = RunFiles.open(config.run)
    step = attention.step(config.step)
    dump, evidence = attention.attention_files[step], attention.ablation
    require_scores(dump.scores, attention)
    names = list(dump.scores)
    if config.score:
        names = [as_name(config.score, names, "score", f"step {step} of {attention.folder}")]
    records = [
        record(name, head, float(values[head]), effects_of(evidence, name, values.shape))
        for name in names
        for values in [dump.scores[name]]
        for head in heads_of(values)
    ]
    if config.score:
        records.sort(key=lambda one: -one["value"] if math.isfinite(one["value"]) else math.inf)
        body = _one(records, terminal)
        title = f"{config.score}: {title_of(config.score)}"
    else:
        body = _all(records, names, terminal)
        title = "every score of every head; beside it the nats lost when the head's output is set to zero"
    lines = [f"{escape_control_chars(attention.folder)}, step {step}", title, "", *body, ""]
    lines += [*marks(records), *about_evidence(attention, step, dump, evidence), DISCLAIMER]
    data: dict[str, Any] = {"run": str(attention.folder), "step": step, "heads": records, "disclaimer": DISCLAIMER}
    return Result(lines, data, [flat(one) for one in records])


def _all(records: list[dict[str, Any]], names: list[str], terminal: Terminal) -> list[str]:
    """A row for each head; each score followed by its effect, a `!` at what is high and has none."""
    columns = [Column("head", side="left")]
    for name in names:
        columns += [Column(short(name)), Column("zeroed")]
    rows: dict[str, list[Any]] = {}
    for one in records:
        row = rows.setdefault(one["head"], [one["head"]])
        effect = number(one["zero"][0], 2 if one["unit"] == "nats" else 3, signed=True) if one["zero"] else "-"
        row += [one["value"], effect + ("!" if one["mark"] else " ")]
    return table(columns, list(rows.values()), terminal.width)


def _one(records: list[dict[str, Any]], terminal: Terminal) -> list[str]:
    """A row for each head, the highest score first, with both ways of taking it away and both controls."""
    titles = ("zero", "mean", "zero, another head", "mean, another head", "")
    ways = ("zero", "mean", "control_zero", "control_mean")
    columns = [Column("head", side="left"), Column("value"), *(Column(title, side="left") for title in titles)]
    rows = []
    for one in records:
        digits = 2 if one["unit"] == "nats" else 3
        rows.append((one["head"], one["value"], *(interval(one[way], digits) for way in ways), one["mark"]))
    measured = records[0]["measure"]
    lines = table(columns, rows, terminal.width, fixed=2)
    if measured:
        lines += ["", f"effects: {measured}, in {records[0]['unit']}, with 95 % intervals; positive is what is lost"]
    return lines
