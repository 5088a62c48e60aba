"""What the commands of `attend.py` share: options, results, and a head's score next to its ablation effects."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tyro.conf import Positional

from common.errors import CHECKPOINT, CONFIG, UserError
from inspection.ablation_results import TABLES, AblationResults
from inspection.attention_file import AttentionFile
from inspection.findings import ATTENTION_THRESHOLD, LABEL_NOTES, ablation_label, measure_for_score
from inspection.head_scores import score_info
from inspection.run_reader import RunFiles
from inspection.terminal import DISCLAIMER, head_name, interval

if TYPE_CHECKING:
    from model.gpt import GPT

LEAST = {"step": -1, "against": -1, "position": -1, "seed": 0, "top": 1, "tokens": 1}
"""The least value of an option; -1 is a default, such as the newest step."""


@dataclass(frozen=True)
class RunOptions:
    """Options of a command on a run."""

    run: Positional[str]
    """A run folder, one of its checkpoints, or an attention file."""

    def problems(self) -> list[str]:
        """One line for each invalid value."""
        values = {name: value for name in LEAST if isinstance(value := getattr(self, name, None), int)}
        small = {name: value for name, value in values.items() if value < LEAST[name]}
        problems = [f"--{name} is {value}; it must be at least {LEAST[name]}" for name, value in small.items()]
        if (head := getattr(self, "head", "")) and not re.fullmatch(r"L\d{1,6}H\d{1,6}", head):
            problems.append(f"--head is {head!r}; it must be a layer and a head, such as L1H2")
        return problems


@dataclass(frozen=True)
class OutputOptions(RunOptions):
    """Options of a command that prints text or JSON."""

    json: bool = False
    """Print JSON instead of text."""


@dataclass(frozen=True)
class Result:
    """The outcome of a command, as text and as data."""

    lines: list[str]
    """Text."""
    data: dict[str, Any] = field(default_factory=dict)
    """What `--json` prints."""
    ok: bool = True
    """False if a check failed: the result is printed, then the exit code is 4."""


@dataclass(frozen=True)
class LoadedModel:
    """The model of a checkpoint, with what an attention file records about it."""

    model: GPT
    step: int
    metadata: Mapping[str, str]
    token_bytes: Callable[[int], bytes]


@dataclass(frozen=True)
class Context:
    """What `attend.py` hands to a command."""

    width: int
    """Of the terminal, in columns."""
    load_model: Callable[[Path, int], LoadedModel | None]
    """(run folder, step) -> the model at that step, or at the newest checkpoint for `NEWEST`; None if it is not kept."""


def parse_head(name: str, shape: tuple[int, int]) -> tuple[int, int]:
    """`L1H2` as (layer, head).

    Raises:
        UserError: if a model of that shape (layers, heads) has no such head (exit code 2).
    """
    layer, head = map(int, re.findall(r"\d+", name))
    if layer >= shape[0] or head >= shape[1]:
        raise UserError(f"--head is {name}; the model has L0H0 to {head_name(shape[0] - 1, shape[1] - 1)}", CONFIG)
    return layer, head


def model_shape(file: AttentionFile) -> tuple[int, int]:
    """(layers, heads) of the model of an attention file; (0, 0) for an empty file."""
    shapes = [text.value_norms.shape[:2] for text in file.texts] + [values.shape for values in file.scores.values()]
    return (shapes[0][0], shapes[0][1]) if shapes else (0, 0)


def require_scores(scores: Mapping[str, Any], run: RunFiles) -> None:
    """Raise `UserError` (exit code 4) if there are no head scores."""
    if not scores:
        hint = f"look at single tokens with: python attend.py token {run.folder}"
        raise UserError(f"{run.folder} has no head scores; {hint}", CHECKPOINT)


def score_rows(file: AttentionFile, results: AblationResults | None, names: list[str]) -> list[dict[str, Any]]:
    """A row for each score and head, in order: the score, and the effects of ablating the head as [value, low, high].

    The effects have the names of `ablation_results.TABLES`.
    """
    rows = []
    for name in names:
        measure = measure_for_score(name)
        effects = results.measures.get(measure) if results else None
        if effects and effects.shape != file.scores[name].shape:
            effects = None  # of another model
        for (layer, head), value in np.ndenumerate(file.scores[name].astype(float)):
            tables = effects.tables if effects else {}
            label = ablation_label(effects, layer, head) if effects else None
            high = score_info(name).is_share and value >= ATTENTION_THRESHOLD
            row = {"head": head_name(layer, head), "score": name, "value": value}
            row |= {"measure": measure if effects else None, "unit": effects.unit if effects else None}
            row |= {key: tables[key][layer, head].tolist() if key in tables else None for key in TABLES}
            rows.append({**row, "label": label, "note": LABEL_NOTES.get(label or "", "") if high else ""})
    return rows


def effect_texts(row: Mapping[str, Any], *keys: str) -> list[str]:
    """The effects of those keys with their intervals, three decimal places for nats per token."""
    return [interval(row[key], 3 if row["unit"] == "nats/token" else 2) for key in keys]


def closing_notes(rows: list[dict[str, Any]], run: RunFiles, step: int, file: AttentionFile) -> list[str]:
    """A line for each head of `score_rows` that attends strongly without a supported effect, which `!` marks; a warning
    where ablation effects are missing, or belong to other weights than the scores."""
    lines = [f"! {row['head']} {row['score']} {row['value']:.2f}: {row['note']}" for row in rows if row["note"]]
    results = run.ablation
    if results is None:
        lines.append(f"no ablation effects were measured; measure them with: python attend.py ablate {run.folder}")
    elif results.step != step:
        lines.append(f"ablation effects are of step {results.step}, scores of step {step}")
    elif file.metadata.get("weights_sha256") != results.weights_sha256:
        lines.append(f"ablation effects are of other weights: step {step} was written again after they were measured")
    return [*lines, DISCLAIMER]
