"""What the commands of `attend.py` have in common: their first options, and where the effects of heads come from."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tyro.conf import Positional

from common.errors import CHECKPOINT, CONFIG, UserError, escape_control_chars
from inspection.ablation_results import AblationEffects, AblationResults, Interval
from inspection.attention_file import AttentionFile, AttentionRecord
from inspection.findings import ATTENTION_THRESHOLD, LABEL_NOTES, ablation_label, measure_for_score
from inspection.registry import ANTECEDENT, score_info
from inspection.run_reader import RunFiles
from inspection.terminal import head_name

NO_WEIGHTS = ("entropy", "distance", "copying")
"""Scores that are no share of a head's weight: half of one is no mark."""
EFFECTS = ("zero", "mean", "control_zero", "control_mean", "difference_zero", "difference_mean")


@dataclass(frozen=True)
class OfRun:
    """A command that reads a run."""

    run: Positional[str]
    """A run folder, one of its checkpoints, or one attention file."""

    def problems(self) -> list[str]:
        """What is wrong with these values, a line each."""
        step = getattr(self, "step", 0)
        return [] if step >= -1 else [f"--step is {step}; it must be a step of the run, or -1 for the newest"]


@dataclass(frozen=True)
class Told(OfRun):
    """A command whose outcome is told in words, as JSON, or as CSV."""

    json: bool = False
    """Print the plain numbers as JSON instead."""
    csv: bool = False
    """Print the plain numbers as CSV instead."""

    def problems(self) -> list[str]:
        found = super().problems()
        return [*found, "--json and --csv do not go together"] if self.json and self.csv else found


def as_name(name: str, names: Iterable[str], what: str, where: str) -> str:
    """`name`, if it is one of `names`.

    Raises:
        UserError: if not, with the nearest one and all of them (exit code 2).
    """
    known = list(names)
    if name in known:
        return name
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    listed = f"it has {', '.join(map(escape_control_chars, known))}" if known else f"it has no {what}"
    raise UserError(f"{where} has no {what} {escape_control_chars(name)!r}; {hint}{listed}", CONFIG)


def text_of(dump: AttentionFile, name: str, where: str) -> AttentionRecord:
    """The text of that name; without one the model's own sample, else the first text.

    Raises:
        UserError: if there is none (exit code 2, or 4 for a file without any).
    """
    if not dump.texts:
        raise UserError(f"{where} holds no texts", CHECKPOINT)
    texts = {text.name: text for text in reversed(dump.texts)}
    if not name:
        return texts.get("sample", dump.texts[0])
    return texts[as_name(name, (text.name for text in dump.texts), "text", where)]


def require_scores(scores: dict[str, Any], run: RunFiles) -> None:
    """Raise `UserError` (exit code 4) where the dumps hold none."""
    if not scores:
        raise UserError(
            f"the attention files of {run.folder} hold no scores of heads (an older version wrote them); train anew, "
            "or look at single tokens with: python attend.py token RUN",
            CHECKPOINT,
        )


def heads_of(table: NDArray[Any]) -> list[tuple[int, int]]:
    """(layer, head) of every head, in order, from anything of shape (L, H, ...)."""
    return [(layer, head) for layer in range(table.shape[0]) for head in range(table.shape[1])]


def heads_in(dump: AttentionFile) -> tuple[int, int] | None:
    """(L, H) of the model that a dump is of; None where it holds nothing."""
    shapes = [text.value_norms.shape for text in dump.texts] + [values.shape for values in dump.scores.values()]
    return (shapes[0][0], shapes[0][1]) if shapes else None


def best_head(name: str, table: NDArray[np.float32]) -> tuple[int, int] | None:
    """The head with the highest score, for entropy the lowest (the head that reads most narrowly); None for nan."""
    if not np.isfinite(table).any():
        return None
    index = np.nanargmin(table) if name == "entropy" else np.nanargmax(table)
    layer, head = divmod(int(index), table.shape[1])
    return layer, head


def title_of(name: str) -> str:
    """What a score says, in words."""
    try:
        return score_info(name).title
    except KeyError:
        return name


def effects_of(evidence: AblationResults | None, name: str, shape: tuple[int, ...]) -> AblationEffects | None:
    """The effects that fit a score, if they were measured, and on a model with as many heads."""
    if evidence is None:
        return None
    effects = evidence.measures.get(measure_for_score(name))
    if effects is None or (len(effects.zero), len(effects.zero[0])) != shape:
        return None
    return effects


def _triple(interval: Interval | None) -> list[float] | None:
    return None if interval is None else [interval.value, interval.low, interval.high]


def record(name: str, head: tuple[int, int], value: float, effects: AblationEffects | None) -> dict[str, Any]:
    """One score of one head and what taking it away does, as plain data: an effect is [value, low, high] or None."""
    found: dict[str, Any] = {
        "head": head_name(*head),
        "score": name,
        "value": float(value),
        "measure": measure_for_score(name) if effects else None,
        "unit": effects.unit if effects else None,
    }
    for way in EFFECTS:
        rows = getattr(effects, way) if effects else None
        found[way] = _triple(rows[head[0]][head[1]] if rows else None)
    found["label"] = ablation_label(effects, *head) if effects else None
    found["mark"] = mark(name, value, found["label"])
    return found


def mark(name: str, value: float, outcome: str | None) -> str:
    """What to beware of: a head that reads a lot and whose reading does not seem to matter."""
    return "" if name in NO_WEIGHTS or not value >= ATTENTION_THRESHOLD else LABEL_NOTES.get(outcome or "", "")


def marks(records: list[dict[str, Any]]) -> list[str]:
    """A line for each head that reads a lot to no effect; a `!` stands beside its score."""
    marked = [one for one in records if one["mark"]]
    return [f"! {one['head']} {short(one['score'])} {one['value']:.2f}: {one['mark']}" for one in marked]


def flat(found: dict[str, Any]) -> dict[str, Any]:
    """A record with a column of its own for each end of an interval, as CSV needs it."""
    row: dict[str, Any] = {}
    for key, value in found.items():
        if key in EFFECTS:
            parts = value or (None, None, None)
            row |= {key: parts[0], f"{key}_low": parts[1], f"{key}_high": parts[2]}
        else:
            row[key] = value
    return row


def about_evidence(run: RunFiles, step: int, dump: AttentionFile, evidence: AblationResults | None) -> list[str]:
    """What has to be said of the effects beside scores of a step: none, or those of other weights."""
    if evidence is None:
        return [
            f"what happens without a head was not measured here: there is no {run.folder / 'attention/ablations.json'}"
        ]
    if evidence.step != step:
        return [f"effects were measured at step {evidence.step}, the scores are of step {step}"]
    if dump.metadata.get("weights_sha256") != evidence.weights_sha256:
        return [f"the effects are not of these weights: step {step} was written again after they were measured"]
    return []


def short(name: str) -> str:
    """A score's name as the title of a column."""
    return "reads " + name.removeprefix(ANTECEDENT) if name.startswith(ANTECEDENT) else name.replace("_", " ")
