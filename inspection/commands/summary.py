"""`attend.py summary RUN`: the headline, what the run holds, and the best head for each score with its ablation effects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from inspection.commands.shared import (
    Context,
    OutputOptions,
    Result,
    closing_notes,
    effect_texts,
    model_shape,
    score_rows,
)
from inspection.run_reader import RunFiles, best_head
from inspection.terminal import DISCLAIMER, head_name, number, paragraph, table

EXPLANATION = """\
Effects in nats with 95% intervals; positive: the model gets worse. Zero and mean ablation replace the head's output by 0
or by its mean; the control is zero ablation of a random other head of the layer. Scores on repeats are followed by the
loss on repeats, antecedent scores by the logit difference of right and wrong answer, all others by the loss on held-out
texts."""


@dataclass(frozen=True)
class Summary(OutputOptions):
    """What the heads of a run attend to, and whether ablating them matters."""


def run(options: Summary, context: Context) -> Result:
    """Summarize the newest step of a run."""
    files = RunFiles.open(options.run)
    step, steps = files.step(), files.steps
    file, findings = files.read(step), files.findings
    best = {name: head_name(*head) for name, values in file.scores.items() if (head := best_head(name, values))}
    rows = [row for row in score_rows(file, files.ablation, list(best)) if row["head"] == best[row["score"]]]
    L, H = model_shape(file)
    data: dict[str, Any] = {
        "run": str(files.folder),
        "step": step,
        "steps": steps,
        "headline": findings["headline"] if findings else None,
        "texts": [{"name": text.name, "tokens": len(text.tokens)} for text in file.texts],
        "n_layers": L,
        "n_heads": H,
        "best_heads": rows,
        "disclaimer": DISCLAIMER,
    }
    which = f"{len(steps)} attention files, steps {steps[0]} to {steps[-1]}; this is step {step}"
    names = ", ".join(f"{text.name} ({len(text.tokens)})" for text in file.texts)
    lines = [*paragraph(data["headline"], context.width), ""] if findings else []
    lines += [f"run    {files.folder}: {L} layers of {H} heads; {which}"]
    lines += [*paragraph(f"texts  {len(file.texts)}, with their tokens: {names}", context.width), ""]
    lines += _table(rows, context.width) if rows else [f"{files.folder} has no head scores"]
    return Result([*lines, "", *closing_notes(rows, files, step, file)], data)


def _table(rows: list[dict[str, Any]], width: int) -> list[str]:
    titles = ("score", "head", "value", "zero ablation", "mean ablation", "control")
    cells = []
    for row in rows:
        name = row["score"] + (" (lowest)" if row["score"] == "entropy" else "")
        effects = effect_texts(row, "zero", "mean", "control_zero")
        cells.append((name, row["head"], number(row["value"]) + "!" * bool(row["note"]), *effects))
    explanation = ["", *paragraph(EXPLANATION, width)] if any(row["zero"] for row in rows) else []
    return [*table(titles, cells, max(width, 80), fixed=3), *explanation]
