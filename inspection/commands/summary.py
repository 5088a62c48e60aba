"""`attend.py summary RUN`: the sentence, what is there, and the best head for each score with what it does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from common.errors import escape_control_chars
from inspection.attention_file import AttentionFile
from inspection.commands.shared import OfRun, about_evidence, best_head, effects_of, heads_in, marks, record, short
from inspection.run_reader import RunFiles
from inspection.terminal import DISCLAIMER, Column, Result, Terminal, interval, number, paragraph, table


@dataclass(frozen=True)
class Summary(OfRun):
    """What the heads of a run read, and whether it matters."""

    json: bool = False
    """Print the plain numbers as JSON instead."""


def run(config: Summary, terminal: Terminal) -> Result:
    """The summary of a run's newest step."""
    attention = RunFiles.open(config.run)
    step = attention.step()
    dump, evidence, claims = attention.attention_files[step], attention.ablation, attention.findings
    shape = heads_in(dump) or (0, 0)
    best = []
    for name, values in dump.scores.items():
        head = best_head(name, values)
        if head is not None:
            best.append(record(name, head, float(values[head]), effects_of(evidence, name, values.shape)))
    data: dict[str, Any] = {
        "run": str(attention.folder),
        "step": step,
        "steps": attention.steps,
        "headline": claims["headline"] if claims else None,
        "texts": [{"name": text.name, "tokens": len(text.tokens)} for text in dump.texts],
        "layers": shape[0],
        "heads": shape[1],
        "best": best,
        "disclaimer": DISCLAIMER,
    }
    lines = [*paragraph(escape_control_chars(claims["headline"]), terminal.width), DISCLAIMER, ""] if claims else []
    lines += [*_what_is_there(attention, step, dump, terminal.width), ""]
    lines += (
        _best(best, terminal) if best else ["the attention files hold no scores of heads (an older version wrote them)"]
    )
    lines += ["", *about_evidence(attention, step, dump, evidence)]
    return Result([*lines, *([] if claims else [DISCLAIMER])], data, best)


def _what_is_there(attention: RunFiles, step: int, dump: AttentionFile, width: int) -> list[str]:
    L, H = heads_in(dump) or (0, 0)
    steps, tokens = attention.steps, [len(text.tokens) for text in dump.texts]
    names = ", ".join(escape_control_chars(text.name) for text in dump.texts)
    several = f"{len(steps)} steps, {steps[0]} to {steps[-1]}" if len(steps) > 1 else f"step {step}"
    lengths = f"{min(tokens)} to {max(tokens)} tokens" if tokens else "none"
    return [
        f"run    {escape_control_chars(attention.folder)}: {L} layers of {H} heads; {several}, shown is step {step}",
        *paragraph(f"texts  {len(tokens)} of {lengths}: {names}", width),
    ]


def _best(best: list[dict[str, Any]], terminal: Terminal) -> list[str]:
    """The best head for each score, what is lost without it, and what to beware of."""
    columns = [Column("score", side="left"), Column("head", side="left"), Column("value")]
    columns += [Column(title, side="left") for title in ("without it", "its mean instead", "without another")]
    digits = {"nats/token": 3, "nats": 2}
    rows = []
    for one in best:
        ways = [interval(one[way], digits.get(one["unit"], 2)) for way in ("zero", "mean", "control_zero")]
        name = short(one["score"]) + (" (least)" if one["score"] == "entropy" else "")
        rows.append((name, one["head"], number(one["value"]) + ("!" if one["mark"] else " "), *ways))
    lines = table(columns, rows, max(terminal.width, 80), fixed=3)
    lines += marks(best)
    if any(one["zero"] for one in best):
        lines += [
            "",
            "without it: nats lost when the head's output is set to zero, or to its mean; without another: the same",
            "for a random other head of its layer; in brackets 95 % intervals. Scores of repeats stand beside the loss",
            "on repeats, readings beside the right answer's lead, all others beside the loss on held-out texts.",
        ]
    return lines
