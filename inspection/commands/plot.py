"""`attend.py plot RUN`: pictures of a run, as PNG or SVG."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from common.errors import DISK_OR_MEMORY, UserError, escape_control_chars
from inspection.attention_file import AttentionFile
from inspection.commands.shared import OfRun, as_name, best_head, short, text_of
from inspection.findings import ATTENTION_THRESHOLD
from inspection.findings import DESCRIPTIONS as TELLING
from inspection.registry import ANTECEDENT
from inspection.run_reader import NEWEST, RunFiles
from inspection.terminal import Result, Terminal, clearest_head, head_name, token_text

PHASE_CHANGE = "phase_change"


@dataclass(frozen=True)
class Plot(OfRun):
    """All heads on a text, one head, the scores over the steps, and the loss beside them."""

    format: Literal["png", "svg"] = "png"
    """Kind of picture."""
    out: str = ""
    """Folder for the files; by default figures/ in the run folder."""
    text: str = ""
    """Name of the text; by default the model's own sample, and for the one head a text that shows what it does."""
    score: str = ""
    """Score of the timeline, or `all`; by default one on which a head passes."""
    step: int = NEWEST
    """The step whose patterns are drawn; -1 is the newest."""


def run(config: Plot, terminal: Terminal) -> Result:
    """Draw what there is, and say what there was not."""
    attention = RunFiles.open(config.run)
    step = attention.step(config.step)
    beside = attention.folder if attention.folder.is_dir() else attention.folder.parent
    folder = Path(config.out) if config.out else beside / "figures"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"cannot make {folder}: {error.strerror}; choose another with --out"
        raise UserError(message, DISK_OR_MEMORY) from error
    drawn = draw(attention, folder, config.format, step, config.text, config.score)
    lines = [f"figure  {escape_control_chars(path)}" for path in drawn]
    if not any(path.stem == PHASE_CHANGE for path in drawn):
        lines.append("no figure of the phase change: it needs two steps with scores, and the losses of the run")
    return Result(lines, {"figures": [str(path) for path in drawn]}, [{"figure": str(path)} for path in drawn])


def draw(attention: RunFiles, folder: Path, kind: str, step: int, text: str = "", score: str = "") -> list[Path]:
    """All heads on a text, the head that stands out, a score over the steps, and the loss beside the heads.

    Args:
        folder: where `attention`, `head`, `timeline` and `phase_change` go, as far as the run holds what they need.
        kind: `png` or `svg`.
        text, score: names; empty for those that tell most.
    """
    from inspection.plots import timeline

    drawn = _patterns(folder, kind, text, attention.attention_files[step], step, attention)
    scores = attention.scores()
    chosen = _chosen(score, scores, attention)
    for name in chosen:
        stem = "timeline" if len(chosen) == 1 else f"timeline-{file_name(name)}"
        drawn.append(folder / f"{stem}.{kind}")
        timeline(drawn[-1], attention.steps, scores, name, f"{attention.folder.name}: {short(name)}")
    change = _phase_change(folder, kind, attention, scores)
    return [*drawn, change] if change else drawn


def _patterns(folder: Path, kind: str, wanted: str, dump: AttentionFile, step: int, attention: RunFiles) -> list[Path]:
    """All heads on one text, and the head that stands out in it."""
    from inspection.plots import head_grid, one_head

    where = f"step {step} of {attention.folder}"
    text = text_of(dump, wanted, where)
    labels = [token_text(token) for token in text.token_bytes]
    paths = [folder / f"{name}.{kind}" for name in ("attention", "head")]
    head_grid(paths[0], text.pattern(), labels, f"step {step}: {text.name}")
    head, query = clearest_head(text.pattern()), None
    score = telling(dump.scores)
    shown = "repeat 1" if not score.startswith(ANTECEDENT) else f"{score.removeprefix(READS)} 1"
    best = best_head(score, dump.scores[score]) if score else None
    if best and not wanted and any(other.name == shown for other in dump.texts):
        text, head = text_of(dump, shown, where), best
        query = len(text.tokens) - 1 if score.startswith(ANTECEDENT) else None
    labels = [token_text(token) for token in text.token_bytes]
    title = f"{head_name(*head)} at step {step}: {text.name}"
    one_head(paths[1], text.pattern(head[0])[0, head[1]], labels, title, query)
    return paths


def _chosen(wanted: str, scores: dict[str, NDArray[np.float32]], attention: RunFiles) -> list[str]:
    """The scores whose timelines are drawn."""
    if wanted == "all" or not scores:
        return list(scores)
    if wanted:
        return [as_name(wanted, scores, "score", str(attention.folder))]
    return [telling({name: values[-1] for name, values in scores.items()})]


def telling(scores: Mapping[str, NDArray[np.float32]]) -> str:
    """The most telling score on which some head passes, else the first there is; empty without scores.

    Args:
        scores: (L, H) by name.
    """
    passed = [name for name in TELLING if name in scores and (scores[name] >= ATTENTION_THRESHOLD).any()]
    return next(iter([*passed, *scores]), "")


def _phase_change(folder: Path, kind: str, attention: RunFiles, scores: dict[str, NDArray[np.float32]]) -> Path | None:
    """The loss beside the induction head and the previous-token head that are best in the end."""
    from inspection.plots import Line, phase_change

    loss = repeats_loss(attention) or validation_loss(attention)
    steps, heads = attention.steps, {}
    if len(steps) < 2 or loss is None:
        return None
    for name in ("induction", "previous_token"):
        best = best_head(name, scores[name][-1]) if name in scores else None
        if best is None:
            return None
        heads[name] = Line(f"{short(name)} score of {head_name(*best)}", steps, scores[name][:, best[0], best[1]])
    path = folder / f"{PHASE_CHANGE}.{kind}"
    title = f"{attention.folder.name}: the loss as the heads form"
    phase_change(path, Line(*loss), heads["induction"], heads["previous_token"], title)
    return path


def repeats_loss(attention: RunFiles) -> tuple[str, list[int], list[float]] | None:
    """Mean nats/token on the second sayings of the repeated random tokens, whose first token nothing foretells."""
    steps, means = [], []
    for step in attention.steps:
        losses = []
        for text in attention.attention_files[step].texts:
            n = (len(text.tokens) - 1) // 2
            if text.name.startswith("repeat ") and n >= 2:
                losses.append(text.loss[n + 1 :].mean())  # loss[k] is of token k + 1
        if losses:
            steps.append(step)
            means.append(float(np.mean(losses)))
    return ("loss on repeats", steps, means) if len(steps) > 1 else None


def validation_loss(attention: RunFiles) -> tuple[str, list[int], list[float]] | None:
    """The validation losses in the run's metrics."""
    found: dict[int, Any] = {line["step"]: line["val_loss"] for line in attention.metrics() if "val_loss" in line}
    known = {step: float(loss) for step, loss in found.items() if isinstance(loss, int | float)}
    return ("validation loss", list(known), list(known.values())) if len(known) > 1 else None


def file_name(name: str) -> str:
    """A score's name as part of a file's name, whatever it holds."""
    return "".join(c if c.isalnum() and c.isascii() else "-" for c in name)
