"""`attend.py summary RUN`, `heads RUN` and `timeline RUN`: head scores, next to the effects of ablating the heads."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import CHECKPOINT, UserError, quote_arg
from inspection.ablation_results import TABLES, AblationResults
from inspection.attention_file import AttentionFile
from inspection.commands.shared import Context, OutputOptions, Result
from inspection.findings import ATTENTION_THRESHOLD, LABEL_NOTES, ablation_label, measure_for_score
from inspection.head_scores import score_info
from inspection.plots import score_range
from inspection.run_reader import DEFAULT, Named, RunFiles, match_name
from inspection.terminal import DISCLAIMER, head_name, interval, number, paragraph, sparkline, table

Rows = list[dict[str, Any]]
EXPLANATION = """\
Effects in nats with 95% intervals; positive: the model gets worse. Zero and mean ablation replace the head's output by 0
or by its mean; the control is zero ablation of a random other head of the layer. `previous_token`, `duplicate_token` and
`induction` are measured on random repeats and followed by the loss on them, antecedent scores by the logit difference
of right and wrong answer, all others by the loss on held-out texts. `uniform`: what uniform attention would score.
Antecedent scores are those of the report: from 8 pairs on, of the half of them on which the head was not chosen."""


@dataclass(frozen=True)
class Summary(OutputOptions):
    """What the heads of a run attend to, and whether ablating them matters."""

    def result(self, context: Context) -> Result:
        run = RunFiles.open(self.run)
        step, steps, findings = run.step(), run.steps, run.findings
        file = run.read(step)
        named = run.named_heads(step, file.scores)
        rows = score_rows(file, run.ablation, list(named), named)
        rows = [{**row, "uniform": (findings or {}).get("uniform", {}).get(row["score"])} for row in rows]
        L, H = file.shape
        data: dict[str, Any] = {
            "run": str(run.folder),
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
        lines += [f"run    {run.folder}: {L} layers of {H} heads; {which}"]
        lines += [*paragraph(f"texts  {len(file.texts)}, with their tokens: {names}", context.width), ""]
        lines += _best_heads(rows, context.width) if rows else [f"{run.folder} has no head scores"]
        return Result([*lines, "", *_notes(rows, run, step, file)], data)


def _best_heads(rows: Rows, width: int) -> list[str]:
    titles = ("score", "head", "value", "uniform", "zero ablation", "mean ablation", "control")
    cells = []
    for row in rows:
        name = row["score"] + (" (lowest)" if row["score"] == "entropy" else "")
        effects = _effects(row, "zero", "mean", "control_zero")
        cells.append((name, row["head"], number(row["value"]) + "!" * bool(row["note"]), row["uniform"], *effects))
    explanation = ["", *paragraph(EXPLANATION, width)] if any(row["zero"] for row in rows) else []
    return [*table(titles, cells, max(width, 80), fixed=3), *explanation]


@dataclass(frozen=True)
class Heads(OutputOptions):
    """The scores of all heads at one step, and the effects of ablating them."""

    step: int = DEFAULT  # A training step with an attention file; by default the one whose heads were ablated.
    score: str = ""  # One score: heads sorted, all effects; by default all scores.

    def result(self, context: Context) -> Result:
        run = RunFiles.open(self.run)
        step = run.step(self.step)
        file = run.read(step)
        names = _choose_scores(self.score, file.scores, run, f"step {step} of {run.folder}")
        rows = score_rows(file, run.ablation, names)
        if self.score:
            rows.sort(key=lambda row: -row["value"] if math.isfinite(row["value"]) else math.inf)
            info, body = score_info(self.score), _one_score(rows, context.width)
            title = f"{self.score}: {info.title}" + (f"; measured on {info.texts}" if info.texts else "")
        else:
            title = "every score of every head, each followed by the effect of zero ablation"
            body = _all_scores(rows, context.width)
        lines = [f"{run.folder}, step {step}", title, "", *body, "", *_notes(rows, run, step, file)]
        return Result(lines, {"run": str(run.folder), "step": step, "heads": rows, "disclaimer": DISCLAIMER})


def _all_scores(rows: Rows, width: int) -> list[str]:
    """A row for each head; each score is followed by its effect, with a `!` if it has a note."""
    titles = ["head", *(title for name in dict.fromkeys(row["score"] for row in rows) for title in (name, "ablated"))]
    cells: dict[str, list[Any]] = {}
    for row in rows:
        effect = _effects(row, "zero")[0].split()[0]
        cells.setdefault(row["head"], [row["head"]]).extend([row["value"], effect + ("!" if row["note"] else " ")])
    return table(titles, list(cells.values()), width)


def _one_score(rows: Rows, width: int) -> list[str]:
    """A row for each head, with both ablations and both controls."""
    titles = ("head", "value", "zero ablation", "mean ablation", "control, zero", "control, mean", "label")
    keys = ("zero", "mean", "control_zero", "control_mean")
    cells = [(row["head"], row["value"], *_effects(row, *keys), row["label"] or "-") for row in rows]
    lines = table(titles, cells, width, fixed=2)
    if rows and rows[0]["measure"]:
        lines += ["", f"effects on {rows[0]['measure']} in {rows[0]['unit']}, with 95% intervals; positive is worse"]
    return lines


@dataclass(frozen=True)
class Timeline(OutputOptions):
    """When in training each head learned what it does."""

    score: str = ""  # One score, or `all`, of every head; by default the best head of each score. JSON holds all.

    def result(self, context: Context) -> Result:
        run = RunFiles.open(self.run)
        steps, scores = run.head_scores
        names = _choose_scores(self.score.removesuffix("all"), scores, run, str(run.folder))
        named = run.named_heads(run.reported_step, {name: scores[name][-1] for name in names}).items()
        best = {name: head for name, (head, _) in named}
        timelines, shown = [], []
        for name in names:
            low, high = score_range(name, scores[name])
            never = "never" if score_info(name).is_share else "-"
            for head in np.ndindex(scores[name].shape[1:]):
                each = _timeline(name, head, steps, scores[name])
                timelines.append(each)
                if self.score or head == best.get(name):
                    reached = never if each["threshold_step"] is None else each["threshold_step"]
                    line = sparkline(each["values"], low, high)
                    shown.append((name, each["head"], line, each["first"], each["last"], each["max"], reached))
        lines = [f"{run.folder}, steps {steps[0]} to {steps[-1]}, {len(steps)} evaluations"]
        if not self.score:
            lines.append("the best head of each score at the last step, or the report's; --score all: every head")
        titles = ("score", "head", "over the steps", "first", "last", "max", "threshold at step")
        about = f"threshold: the first step with a score of {ATTENTION_THRESHOLD} or more, for shares of attention"
        lines += ["", *table(titles, shown, max(context.width, 80), fixed=3), "", about]
        return Result(lines, {"run": str(run.folder), "steps": steps, "timelines": timelines})


def _timeline(name: str, head: tuple[int, ...], steps: list[int], scores: NDArray[np.float32]) -> dict[str, Any]:
    """One score of one head over the steps, and the first step at which it reached the threshold."""
    values = scores[:, head[0], head[1]].astype(float)
    reached = values >= ATTENTION_THRESHOLD
    return {
        "head": head_name(*head),
        "score": name,
        "first": values[0],
        "last": values[-1],
        "max": np.max(values[np.isfinite(values)], initial=-np.inf),
        "threshold_step": steps[int(reached.argmax())] if score_info(name).is_share and reached.any() else None,
        "values": values.tolist(),
    }


# Scores and effects


def _choose_scores(name: str, scores: Mapping[str, Any], run: RunFiles, where: str) -> list[str]:
    """The score of that name, or all; raises `UserError` if there are none (exit code 4) or not that one (2)."""
    if not scores:
        hint = f"look at single tokens with: python attend.py token {quote_arg(run.folder)}"
        raise UserError(f"{run.folder} has no head scores; {hint}", CHECKPOINT)
    return [match_name(name, scores, "score", where)] if name else list(scores)


def score_rows(
    file: AttentionFile, results: AblationResults | None, names: list[str], named: Named | None = None
) -> Rows:
    """A row for each score and head, in order: the score, and the effects of ablating the head as [value, low, high].

    The effects have the names of `ablation_results.TABLES`. With `named`, only the head of each score, with that value.
    """
    rows = []
    for name in names:
        measure = measure_for_score(name)
        effects = results.measures.get(measure) if results else None
        if effects and effects.shape != file.scores[name].shape:
            effects = None  # of another model
        for (layer, head), value in np.ndenumerate(file.scores[name].astype(float)):
            if named and named[name][0] != (layer, head):
                continue
            value = named[name][1] if named else value
            tables = effects.tables if effects else {}
            label = ablation_label(effects, layer, head) if effects else None
            high = score_info(name).is_share and value >= ATTENTION_THRESHOLD
            row = {"head": head_name(layer, head), "score": name, "value": value}
            row |= {"measure": measure if effects else None, "unit": effects.unit if effects else None}
            row |= {key: tables[key][layer, head].tolist() if key in tables else None for key in TABLES}
            rows.append({**row, "label": label, "note": LABEL_NOTES.get(label or "", "") if high else ""})
    return rows


def _effects(row: Mapping[str, Any], *keys: str) -> list[str]:
    """The effects of those keys with their intervals, three decimal places for nats per token."""
    return [interval(row[key], 3 if row["unit"] == "nats/token" else 2) for key in keys]


def _notes(rows: Rows, run: RunFiles, step: int, file: AttentionFile) -> list[str]:
    """A line for each head that attends strongly without a supported effect, marked with `!` in the table; a warning
    where ablation effects are missing, or belong to other weights than the scores."""
    lines = [f"! {row['head']} {row['score']} {row['value']:.2f}: {row['note']}" for row in rows if row["note"]]
    results = run.ablation
    if results is None and run.folder.is_dir():
        command = f"python attend.py ablate {quote_arg(run.folder)}"
        lines.append(f"no ablation effects were measured; measure them with: {command}")
    elif results is not None and results.step != step:
        lines.append(f"ablation effects are of step {results.step}, scores of step {step}")
    elif results is not None and file.metadata.get("weights_sha256") != results.weights_sha256:
        lines.append(f"ablation effects are of other weights: step {step} was written again after they were measured")
    return [*lines, DISCLAIMER]
