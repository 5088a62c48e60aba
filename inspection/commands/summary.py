"""`attend.py summary RUN`: the headline, what the run holds, and the best head for each score with its ablation effects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from inspection.attention_file import AttentionFile
from inspection.commands.shared import RunOptions, ablation_notes, effect_texts, model_shape, note_lines, score_rows
from inspection.run_reader import RunFiles, best_head
from inspection.terminal import DISCLAIMER, Result, Terminal, head_name, number, paragraph, table

EXPLANATION = """\
Effects in nats with 95% intervals; positive: the model gets worse. Zero and mean ablation replace the head's output by 0
or by its mean; the control is zero ablation of a random other head of the layer. Scores on repeats are followed by the
loss on repeats, antecedent scores by the logit difference of right and wrong answer, all others by the loss on held-out
texts."""


@dataclass(frozen=True)
class Summary(RunOptions):
    """What the heads of a run attend to, and whether ablating them matters."""

    json: bool = False
    """Print JSON instead of text."""


def run(options: Summary, terminal: Terminal) -> Result:
    """Summarize the newest step of a run."""
    files = RunFiles.open(options.run)
    step = files.step()
    file, results, findings = files.attention_files[step], files.ablation, files.findings
    best = {name: head_name(*head) for name, values in file.scores.items() if (head := best_head(name, values))}
    rows = [row for row in score_rows(file, results, list(best)) if row["head"] == best[row["score"]]]
    shape = model_shape(file) or (0, 0)
    headline = findings["headline"] if findings else None
    data: dict[str, Any] = {
        "run": str(files.folder),
        "step": step,
        "steps": files.steps,
        "headline": headline,
        "texts": [{"name": text.name, "tokens": len(text.tokens)} for text in file.texts],
        "n_layers": shape[0],
        "n_heads": shape[1],
        "best_heads": rows,
        "disclaimer": DISCLAIMER,
    }
    lines = [*paragraph(headline, terminal.width), ""] if headline else []
    lines += [*_contents(files, step, file, terminal.width), ""]
    lines += _table(rows, terminal) if rows else [f"{files.folder} has no head scores"]
    return Result([*lines, "", *ablation_notes(files, step, file, results), DISCLAIMER], data, rows)


def _contents(files: RunFiles, step: int, file: AttentionFile, width: int) -> list[str]:
    L, H = model_shape(file) or (0, 0)
    steps, lengths = files.steps, [len(text.tokens) for text in file.texts]
    names = ", ".join(text.name for text in file.texts)
    which = f"{len(steps)} attention files, steps {steps[0]} to {steps[-1]}; this is step {step}"
    run = f"run    {files.folder}: {L} layers of {H} heads; "
    tokens = f" of {min(lengths)} to {max(lengths)} tokens: {names}" if lengths else ""
    return [run + (which if len(steps) > 1 else f"step {step}"), *paragraph(f"texts  {len(lengths)}{tokens}", width)]


def _table(rows: list[dict[str, Any]], terminal: Terminal) -> list[str]:
    titles = ("score", "head", "value", "zero ablation", "mean ablation", "control")
    cells = []
    for row in rows:
        name = row["score"] + (" (lowest)" if row["score"] == "entropy" else "")
        effects = effect_texts(row, "zero_ablation", "mean_ablation", "control_zero")
        cells.append((name, row["head"], number(row["value"]) + "!" * bool(row["note"]), *effects))
    lines = [*table(titles, cells, max(terminal.width, 80), fixed=3), *note_lines(rows)]
    if any(row["zero_ablation"] for row in rows):
        lines += ["", *paragraph(EXPLANATION, terminal.width)]
    return lines
