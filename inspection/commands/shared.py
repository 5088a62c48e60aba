"""What the commands of `attend.py` share: options, loading a checkpoint, and a head's score next to its ablation effects."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tyro.conf import Positional

from common.errors import CHECKPOINT, CONFIG, UserError
from inspection.ablation_results import AblationResults
from inspection.attention_file import AttentionFile
from inspection.findings import ATTENTION_THRESHOLD, LABEL_NOTES, ablation_label, measure_for_score
from inspection.head_scores import score_info
from inspection.run_reader import RunFiles
from inspection.terminal import head_name, interval

if TYPE_CHECKING:
    from model.gpt import GPT

EFFECTS = {
    "zero_ablation": "zero",
    "mean_ablation": "mean",
    "control_zero": "control_zero",
    "control_mean": "control_mean",
    "difference_zero": "difference_zero",
    "difference_mean": "difference_mean",
}
"""Keys of JSON and CSV, and the tables of `AblationEffects` that they hold."""


@dataclass(frozen=True)
class RunOptions:
    """Options of a command on a run."""

    run: Positional[str]
    """A run folder, one of its checkpoints, or an attention file."""

    def problems(self) -> list[str]:
        """One line for each invalid value."""
        step, head = getattr(self, "step", 0), getattr(self, "head", "")
        problems = [] if step >= -1 else [f"--step is {step}; it must be a step of the run, or -1 for the newest"]
        if head and not re.fullmatch(r"L\d{1,6}H\d{1,6}", head):
            problems.append(f"--head is {head!r}; it must be a layer and a head, such as L1H2")
        return problems


@dataclass(frozen=True)
class OutputOptions(RunOptions):
    """Options of a command that prints text, JSON or CSV."""

    json: bool = False
    """Print JSON instead of text."""
    csv: bool = False
    """Print CSV instead of text."""

    def problems(self) -> list[str]:
        problems = super().problems()
        return [*problems, "--json and --csv exclude each other"] if self.json and self.csv else problems


@dataclass(frozen=True)
class LoadedModel:
    """The model of a checkpoint, with what an attention file records about it."""

    model: GPT
    step: int
    metadata: Mapping[str, str]
    token_bytes: Callable[[int], bytes]


LoadModel = Callable[[Path, int], LoadedModel | None]
"""(run folder, step) -> the model at that step, or at the newest checkpoint for `NEWEST`; None if it was not kept."""


def parse_head(name: str, n_layers: int, n_heads: int) -> tuple[int, int]:
    """`L1H2` as (layer, head).

    Raises:
        UserError: if the model has no such head (exit code 2).
    """
    layer, head = map(int, re.findall(r"\d+", name))
    if layer >= n_layers or head >= n_heads:
        raise UserError(f"--head is {name}; the model has L0H0 to L{n_layers - 1}H{n_heads - 1}", CONFIG)
    return layer, head


def model_shape(file: AttentionFile) -> tuple[int, int] | None:
    """(layers, heads) of the model of an attention file; None for an empty file."""
    shapes = [text.value_norms.shape[:2] for text in file.texts] + [values.shape for values in file.scores.values()]
    return (shapes[0][0], shapes[0][1]) if shapes else None


def require_scores(scores: Mapping[str, Any], run: RunFiles) -> None:
    """Raise `UserError` (exit code 4) if there are no head scores."""
    if not scores:
        hint = f"look at single tokens with: python attend.py token {run.folder}"
        raise UserError(f"{run.folder} has no head scores; {hint}", CHECKPOINT)


def score_rows(file: AttentionFile, results: AblationResults | None, names: list[str]) -> list[dict[str, Any]]:
    """A row for each score and head, in order: the score, and the effects of ablating the head as [value, low, high]."""
    rows = []
    for name in names:
        measure = measure_for_score(name)
        effects = results.measures.get(measure) if results else None
        if effects and effects.shape != file.scores[name].shape:
            effects = None  # of another model
        for (layer, head), value in np.ndenumerate(file.scores[name].astype(float)):
            row: dict[str, Any] = {"head": head_name(layer, head), "score": name, "value": value}
            row |= {"measure": measure if effects else None, "unit": effects.unit if effects else None}
            tables = effects.tables if effects else {}
            row |= {
                key: tables[field][layer, head].tolist() if field in tables else None for key, field in EFFECTS.items()
            }
            label = ablation_label(effects, layer, head) if effects else None
            high = score_info(name).is_share and value >= ATTENTION_THRESHOLD
            rows.append({**row, "label": label, "note": LABEL_NOTES.get(label or "", "") if high else ""})
    return rows


def flatten_intervals(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with a column for each end of an interval, for CSV."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        names = (key, f"{key}_low", f"{key}_high") if key in EFFECTS else (key,)
        flat |= zip(names, (value or [None] * 3) if key in EFFECTS else [value], strict=True)
    return flat


def effect_texts(row: Mapping[str, Any], *keys: str) -> list[str]:
    """The effects of those keys with their intervals, three decimal places for nats per token."""
    return [interval(row[key], 3 if row["unit"] == "nats/token" else 2) for key in keys]


def note_lines(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each head that attends strongly without a supported effect; its score is marked with `!`."""
    return [f"! {row['head']} {row['score']} {row['value']:.2f}: {row['note']}" for row in rows if row["note"]]


def ablation_notes(run: RunFiles, step: int, file: AttentionFile, results: AblationResults | None) -> list[str]:
    """A warning where ablation effects are missing, or belong to other weights than the scores."""
    if results is None:
        return [f"no ablation effects were measured; measure them with: python attend.py ablate {run.folder}"]
    if results.step != step:
        return [f"ablation effects are of step {results.step}, scores of step {step}"]
    if file.metadata.get("weights_sha256") != results.weights_sha256:
        return [f"ablation effects are of other weights: step {step} was written again after they were measured"]
    return []
