"""The numbers of a page: from the attention files, metrics and ablations of a run to tables that `page_builder.py` embeds.

Everything that the page says about a head is decided here or in `findings.py`; its JavaScript only shows it.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import CHECKPOINT, UserError, escape_control_chars
from inspection.ablation_results import AblationResults
from inspection.attention_file import AttentionFile
from inspection.findings import ATTENTION_THRESHOLD, LABEL_NOTES, LABELS, ablation_label, measure_for_score
from inspection.head_scores import ANTECEDENT, HELD_OUT, REPEATS, HeadScore, score_info
from inspection.terminal import json_values

MAX_ATTENTION = HeadScore(
    "max_attention",
    "attention to the most attended token",
    "mean over i ≥ 1 of the largest A[i, j]",
    source="computed from the patterns, because these files contain no scores",
    texts="the texts shown",
)
EFFECTS = {
    "repeats": "increase of the loss on repeated sequences",
    "corpus": "increase of the loss on held-out text",
}
"""What an ablation effect is, by measure; for all other measures it is the decrease of the logit difference."""
TIMELINE_POINTS = 200
numbers = partial(json_values, digits=7)  # as many as the page needs
NO_FINDINGS: Mapping[str, Any] = {"headline": "What each attention head attends to, token by token.", "findings": []}


@dataclass(frozen=True)
class PageRun:
    """One run: its name, its attention files by step, and optionally its evaluations from metrics.jsonl.

    The evaluations, each with `step` and `head_scores`, give the timeline more steps than there are files.
    """

    label: str
    files: Sequence[AttentionFile]
    evaluations: Sequence[Mapping[str, Any]] = field(default=())
    folder: Path | None = None  # of the run, whose weights the page holds too

    @property
    def shape(self) -> tuple[int, int]:
        return self.files[-1].shape

    @property
    def steps(self) -> list[int]:
        """The training step of each file; its index if the file does not say."""
        steps = [file.metadata.get("step", "") for file in self.files]
        return [int(step) if re.fullmatch("[0-9]{1,15}", step) else index for index, step in enumerate(steps)]

    @property
    def timeline(self) -> list[dict[str, Any]]:
        """Step and scores of at most `TIMELINE_POINTS` evaluations, including the last."""
        lines = [line for line in self.evaluations if isinstance(line.get("head_scores"), dict)]
        every = math.ceil(len(lines) / TIMELINE_POINTS) or 1
        return [{"step": line["step"], "scores": numbers(line["head_scores"])} for line in lines[::-every][::-1]]


def file_scores(file: AttentionFile) -> Mapping[str, NDArray[np.floating[Any]]]:
    """The head scores (L, H) of a file by name; if it has none, the mean attention to the most attended token."""
    if file.scores:
        return file.scores
    every = np.concatenate([text.pattern()[:, :, 1:].max(axis=-1) for text in file.texts], axis=-1, dtype=np.float64)
    return {MAX_ATTENTION.name: every.mean(axis=-1) if every.size else np.full(every.shape[:2], np.nan)}


def describe_scores(runs: Sequence[PageRun], ablations: AblationResults | None) -> dict[str, Any]:
    """What each score means, its limits, and what ablating each head does to the measure that fits it."""
    largest: dict[str, float] = {}
    for run in runs:
        for scores in (*map(file_scores, run.files), *(point["scores"] for point in run.timeline)):
            for name, table in scores.items():
                largest[name] = float(np.nanmax(np.asarray(table, np.float64), initial=largest.get(name, 0)))
    described = {}
    for name in largest:
        info = MAX_ATTENTION if name == MAX_ATTENTION.name else score_info(name)
        high = largest[name] if info.high is None else info.high
        about = (info.formula, f"measured on {info.texts}" if info.texts else "", info.source)
        described[name] = {
            "title": escape_control_chars(info.title) + (", on repeats" if info.texts == REPEATS else ""),
            "description": "; ".join(part for part in about if part),
            "low": info.low,
            "high": numbers(high) if high > info.low else info.low + 1,
            "ablation": _ablation(ablations, info, runs[0]) if ablations else None,
        }
    return described


def _ablation(ablations: AblationResults, info: HeadScore, run: PageRun) -> dict[str, Any] | None:
    """The effects of ablating each head, and a label that says whether they support the score of the head.

    Of each head and method: the 95% intervals of the effect, of the control and of the difference. The kind of a label
    is `supported`, `caution` (much attention without support) or empty.
    """
    measure = measure_for_score(info.name)
    effects = ablations.measures.get(measure)
    if effects is None:
        return None
    step = run.steps.index(ablations.step) if ablations.step in run.steps else -1
    scores = file_scores(run.files[step]).get(info.name) if info.is_share else None

    def label(layer: int, head: int) -> dict[str, str]:
        name = ablation_label(effects, layer, head)
        if scores is not None and scores[layer, head] >= ATTENTION_THRESHOLD and name in LABEL_NOTES:
            return {"text": f"∅ {LABEL_NOTES[name]}", "kind": "caution"}
        support = name if name in ("supported", "disputed") else "not supported"
        return {"text": f"{support}: {LABELS[name]}", "kind": "supported" if name == "supported" else ""}

    def intervals(method: str) -> Any:
        names = (method, f"control_{method}", f"difference_{method}")
        not_measured = np.full((*effects.shape, 3), np.nan)
        return numbers(np.stack([effects.tables.get(name, not_measured) for name in names], axis=2))

    effect = EFFECTS.get(measure, "decrease of the logit difference")
    layers, heads = effects.shape
    return {
        "caption": f"Ablation: {effect}, {effects.unit}; {effects.count} items, 95% intervals, step {ablations.step}",
        "unit": effects.unit,
        "largest": numbers(effects.tables["mean"][..., 0].max()),
        "zero": intervals("zero"),
        "mean": intervals("mean"),
        "labels": [[label(layer, head) for head in range(heads)] for layer in range(layers)],
    }


def finding_tables(
    findings: Mapping[str, Any] | None, run: PageRun, scores: Mapping[str, Any], texts: Sequence[str]
) -> dict[str, Any]:
    """The headline, the findings about heads and scores that the run has, and the head and score that the page shows first.
    Raises UserError (exit code 4) if the findings are malformed."""
    try:
        findings = findings or NO_FINDINGS
        example = next(iter(findings.get("examples", [])), None)
        entries = [_finding(entry, texts, example) for entry in findings["findings"]]
        headline = str(findings["headline"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"the findings are malformed ({error!r}); delete findings.json", CHECKPOINT) from error
    layers, heads = run.shape
    entries = [e for e in entries if 0 <= e["head"][0] < layers and 0 <= e["head"][1] < heads and e["score"] in scores]
    last = file_scores(run.files[-1])
    supported = [entry for entry in entries if entry["supported"]]
    if first := (supported or entries)[:1]:
        (layer, head), score = first[0]["head"], first[0]["score"]
    else:
        score = next(iter(last))
        layer, head = divmod(int(np.argmax(np.nan_to_num(last[score], nan=-np.inf))), heads)
    return {"headline": headline, "findings": entries, "start": {"layer": layer, "head": head, "score": score}}


def own_text(findings: Sequence[Mapping[str, Any]], names: Sequence[str], file: AttentionFile) -> str:
    """The text with which the field for the user's own text starts: the text of the first finding, or the last of the file."""
    texts = {text.name: text for text in file.texts}
    places = [(names[entry["text"]], entry["query"]) for entry in findings if entry["text"] is not None]
    name, query = next((place for place in places if place[0] in texts), (file.texts[-1].name, None))
    end = None if query is None or query < 0 else query + 1
    return b"".join(texts[name].token_bytes[:end]).decode("utf-8", "replace")


def _finding(entry: Mapping[str, Any], texts: Sequence[str], example: Mapping[str, Any] | None) -> dict[str, Any]:
    """A finding, with the text on which the page shows it, and the query: null is the last token, -1 any."""
    score, (layer, head) = str(entry["score"]), entry["head"]
    text: str = "repeat 1"
    query: int | None = -1
    if score.startswith(ANTECEDENT):
        text, query = f"{score.removeprefix(ANTECEDENT)} 1", None
    elif example and score_info(score).texts == HELD_OUT:
        text, query = str(example["text"]), int(example["position"]) - 1  # it predicts the token at `position`
    return {
        "head": [int(layer), int(head)],
        "score": score,
        "title": score.removeprefix(ANTECEDENT).removeprefix("text.").replace("_", " "),
        "attention": numbers(float(entry["value"])),
        "supported": bool(entry["is_supported"]),
        "summary": str(entry["summary"]),
        "text": texts.index(text) if text in texts else None,
        "query": query,
    }
