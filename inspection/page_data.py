"""The numbers of a page: from the attention files, metrics and ablations of a run to tables that `page_builder.py` embeds.

Everything that the page says about a head is decided here or in `findings.py`; its JavaScript only shows it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from common.errors import CHECKPOINT, UserError, escape_control_chars
from inspection.ablation_results import AblationEffects, AblationResults
from inspection.attention_file import AttentionFile
from inspection.findings import ATTENTION_THRESHOLD, LABEL_NOTES, LABELS, ablation_label, measure_for_score
from inspection.head_scores import ANTECEDENT, HeadScore, score_info

MAX_ATTENTION = HeadScore(
    "max_attention",
    "attention to the most attended token",
    "mean over i ≥ 1 of the largest A[i, j]",
    low=0.0,
    high=1.0,
    source="computed from the patterns, because these files contain no scores",
    texts="the texts shown",
)
EFFECTS = {
    "repeats": "increase of the loss on repeated sequences",
    "corpus": "increase of the loss on held-out text",
}
"""What an ablation effect is, by measure; for all other measures it is the decrease of the logit difference."""
TIMELINE_POINTS = 200
NO_FINDINGS: Mapping[str, Any] = {"headline": "What each attention head attends to, token by token.", "findings": []}

Scores = Mapping[str, NDArray[np.floating[Any]]]
"""By name, a score of each head (L, H)."""


@dataclass(frozen=True)
class PageRun:
    """One run: its name, its attention files by step, and optionally its evaluations from metrics.jsonl.

    The evaluations, each with `step` and `head_scores`, give the timeline more steps than there are files.
    """

    label: str
    files: Sequence[AttentionFile]
    evaluations: Sequence[Mapping[str, Any]] = field(default=())

    @property
    def shape(self) -> tuple[int, int]:
        """Layers and heads."""
        layers, heads, _ = self.files[-1].texts[0].value_norms.shape
        return layers, heads

    def step(self, index: int) -> int:
        """The training step of a file; its index if the file does not say."""
        text = self.files[index].metadata.get("step") or ""
        return int(text) if re.fullmatch("[0-9]{1,15}", text) else index

    @property
    def timeline(self) -> list[dict[str, Any]]:
        """Step and scores of at most `TIMELINE_POINTS` evaluations, including the last."""
        lines = [line for line in self.evaluations if isinstance(line.get("head_scores"), dict)]
        every = math.ceil(len(lines) / TIMELINE_POINTS) or 1
        return [{"step": line["step"], "scores": score_tables(line["head_scores"])} for line in lines[::-every][::-1]]

    def scores_at(self, step: int) -> Scores:
        """The head scores at a step, or at the last step if there is no file of that step."""
        indices = [index for index in range(len(self.files)) if self.step(index) == step]
        return file_scores(self.files[indices[0] if indices else -1])


def file_scores(file: AttentionFile) -> Scores:
    """The head scores of a file; if it has none, as that of a prompt, the mean attention to the most attended token."""
    if file.scores:
        return file.scores
    every = np.concatenate([text.pattern()[:, :, 1:].max(axis=-1) for text in file.texts], axis=-1, dtype=np.float64)
    return {MAX_ATTENTION.name: every.mean(axis=-1) if every.size else np.full(every.shape[:2], np.nan)}


def number(value: float, digits: int = 6) -> float | None:
    """A number for JSON, rounded to significant digits; None if it is not finite."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


def score_tables(scores: Mapping[str, ArrayLike]) -> dict[str, list[list[float | None]]]:
    """Head scores as JSON; None where a score was not measured."""
    arrays = {name: np.asarray(table, dtype=np.float64) for name, table in scores.items()}
    return {name: [[number(value, 7) for value in row] for row in table] for name, table in arrays.items()}


def describe_scores(runs: Sequence[PageRun], ablations: AblationResults | None) -> dict[str, Any]:
    """What each score means, its limits, and of each head whether ablation supports it."""
    tables: dict[str, list[NDArray[np.floating[Any]]]] = {}
    for run in runs:
        for scores in (*map(file_scores, run.files), *(point["scores"] for point in run.timeline)):
            for name, table in scores.items():
                tables.setdefault(name, []).append(np.asarray(table, dtype=np.float64))
    described = {}
    for name, values in tables.items():
        info, measure = MAX_ATTENTION if name == MAX_ATTENTION.name else score_info(name), measure_for_score(name)
        high = info.high if info.high is not None else max(float(np.nanmax(table, initial=0)) for table in values)
        effects = ablations.measures.get(measure) if ablations else None
        attention = runs[0].scores_at(ablations.step).get(name) if ablations and info.is_share else None
        about = (info.formula, f"measured on {info.texts}" if info.texts else "", info.source)
        described[name] = {
            "title": escape_control_chars(info.title),
            "description": "; ".join(part for part in about if part),
            "low": info.low,
            "high": number(high) if high > info.low else info.low + 1,
            "measure": measure,
            "labels": _labels(effects, attention) if effects else None,
        }
    return described


def _labels(effects: AblationEffects, scores: NDArray[np.floating[Any]] | None) -> list[list[dict[str, str]]]:
    """Of each head: whether ablation supports it, as text, and its kind: `supported`, `caution` or empty.

    `caution` marks high attention without support; `scores` is None if the score is not an attention weight.
    """

    def label(layer: int, head: int) -> dict[str, str]:
        name = ablation_label(effects, layer, head)
        if scores is not None and scores[layer, head] >= ATTENTION_THRESHOLD and name in LABEL_NOTES:
            return {"text": f"∅ {LABEL_NOTES[name]}", "kind": "caution"}
        support = name if name in ("supported", "disputed") else "not supported"
        return {"text": f"{support}: {LABELS[name]}", "kind": "supported" if name == "supported" else ""}

    layers, heads = effects.shape
    return [[label(layer, head) for head in range(heads)] for layer in range(layers)]


def ablation_tables(results: AblationResults | None) -> dict[str, Any]:
    """By measure: a caption, and the intervals of each head: [effect, control, difference] of both ablations."""

    def all_heads(effects: AblationEffects, method: str) -> list[Any]:
        tables = [effects.tables.get(name) for name in (method, f"control_{method}", f"difference_{method}")]
        layers, heads = effects.shape

        def intervals(layer: int, head: int) -> list[Any]:
            return [None if table is None else list(map(number, table[layer, head])) for table in tables]

        return [[intervals(layer, head) for head in range(heads)] for layer in range(layers)]

    if results is None:
        return {}
    by_measure = {}
    for name, effects in results.measures.items():
        effect = EFFECTS.get(name, "decrease of the logit difference")
        by_measure[name] = {
            "caption": f"Ablation: {effect}, {effects.unit}; {effects.count} items, 95% intervals, step {results.step}",
            "unit": effects.unit,
            "largest": number(effects.tables["mean"][..., 0].max()),
            "zero": all_heads(effects, "zero"),
            "mean": all_heads(effects, "mean"),
        }
    return by_measure


def finding_tables(
    findings: Mapping[str, Any] | None, run: PageRun, scores: Mapping[str, Any], texts: Sequence[str]
) -> dict[str, Any]:
    """The headline, the findings about heads that the run has, and the head and score that the page shows first.

    Raises:
        UserError: if the findings are malformed (exit code 4).
    """
    findings = findings or NO_FINDINGS
    try:
        entries = [_finding(entry, scores, texts) for entry in findings["findings"]]
        headline = str(findings["headline"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"the findings are malformed ({error!r}); delete findings.json", CHECKPOINT) from error
    layers, heads = run.shape
    entries = [e for e in entries if 0 <= e["head"][0] < layers and 0 <= e["head"][1] < heads]
    last = file_scores(run.files[-1])
    first = next((entry for entry in entries if entry["supported"]), entries[0] if entries else None)
    score = first["score"] if first and first["score"] in last else next(iter(last))
    best = np.unravel_index(np.argmax(np.nan_to_num(last[score], nan=-np.inf)), run.shape)
    layer, head = first["head"] if first else (int(best[0]), int(best[1]))
    return {"headline": headline, "findings": entries, "start": {"layer": layer, "head": head, "score": score}}


def _finding(entry: Mapping[str, Any], scores: Mapping[str, Any], texts: Sequence[str]) -> dict[str, Any]:
    """A finding, with the text on which the page shows it."""
    score, (layer, head) = str(entry["score"]), entry["head"]
    text = f"{score.removeprefix(ANTECEDENT)} 1" if score.startswith(ANTECEDENT) else "repeat 1"
    return {
        "head": [int(layer), int(head)],
        "score": score if score in scores else next(iter(scores)),
        "title": score.removeprefix(ANTECEDENT).replace("_", " "),
        "attention": number(float(entry["value"])),
        "supported": bool(entry["is_supported"]),
        "summary": str(entry["summary"]),
        "text": texts.index(text) if text in texts else None,
        "at_end": score.startswith(ANTECEDENT),  # the query of a contrast pair is its last token
    }
