"""Attention and head scores as figures, PNG or SVG by the suffix of the path.

`draw_figures` draws all figures of a run; `head_grid`, `one_head`, `score_timeline` and `phase_change` draw one each from
arrays. They raise `UserError` for another suffix (exit code 2) and if the file cannot be written (6). matplotlib is
imported when a figure is drawn, and used without pyplot: no display, no global state. The same input gives the same bytes.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from common.errors import CONFIG, UserError
from common.files import write_atomic
from inspection.findings import ATTENTION_THRESHOLD, FINDING_SCORES
from inspection.head_scores import ANTECEDENT, score_info
from inspection.run_reader import RunFiles, best_head, find_text, match_name
from inspection.terminal import clearest_head, head_name, token_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_LAYERS = MAX_HEADS = 8
"""A grid shows at most the first 8 layers and heads."""
GRID_TOKENS, HEAD_TOKENS = 64, 96
"""Tokens in a grid and in a plot of one head, at most: the last ones of a longer text."""
ANNOTATED_TOKENS, MIN_ANNOTATED = 16, 0.01
"""Up to so many tokens, a plot of one head shows each value of at least 0.01 as a number."""
LABEL_LENGTH, LABEL_INCHES = 14, 0.1
"""Characters of a token's label, at most, and inches from one label to the next, at least."""
FUTURE = "#e3e3e3"
"""Cells that causality excludes: gray, which is not a color of the scale."""
INK, ACCENT, GRAY, MUTED = "#222222", "#c8102e", "#c9c9c9", "#666666"
SERIES_COLORS = ("#00467f", "#c8102e", "#8a6d00")
"""Colors of the labeled lines, highest first; they differ in lightness too."""
SERIES_SIZE = (7.2, 4.0)
"""Inches."""
STYLE: dict[Any, Any] = {
    "font.family": ["DejaVu Sans"],
    "text.parse_math": False,  # a `$` in a token is a `$`
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.labelsize": 9,
    "axes.edgecolor": "#888888",
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "savefig.dpi": 110,
    "svg.fonttype": "none",
    "svg.hashsalt": "attention",
}


@dataclass(frozen=True)
class Series:
    """A line over the training steps."""

    name: str
    steps: Sequence[int]
    values: Sequence[float] | NDArray[np.floating[Any]]


# All figures of a run


def draw_figures(run: RunFiles, folder: Path, suffix: str, step: int, text: str = "", score: str = "") -> list[Path]:
    """Draw `attention`, `head`, `timeline` and `phase_change`, as far as the run has the data; return their paths.

    Args:
        suffix: `png` or `svg`.
        step: of the patterns.
        text: a name; by default the sample for the grid, and for one head a text on which its score is measured.
        score: of the timeline, or `all`; by default the most informative one.

    Raises:
        UserError: for an unknown text or score (2), a damaged file (4) or a file that cannot be written (6).
    """
    paths = [folder / f"attention.{suffix}", folder / f"head.{suffix}"]
    _draw_patterns(paths, run, step, text)
    scores = run.head_scores.scores
    names = [match_name(score, scores, "score", str(run.folder))] if score not in ("", "all") else list(scores)
    if names and not score:
        names = [most_informative({name: values[-1] for name, values in scores.items()})]
    for name in names:
        stem = "timeline" if len(names) == 1 else "timeline-" + re.sub("[^A-Za-z0-9]", "-", name)
        paths.append(folder / f"{stem}.{suffix}")
        score_timeline(paths[-1], run.head_scores.steps, scores[name], name, f"{run.folder.name}: {name}")
    series = _phase_change_series(run)
    if series:
        paths.append(folder / f"phase_change.{suffix}")
        phase_change(paths[-1], *series, f"{run.folder.name}: loss and head scores")
    return paths


def _draw_patterns(paths: Sequence[Path], run: RunFiles, step: int, name: str) -> None:
    """All heads on one text, and one head on a text that shows what it does."""
    file, where = run.attention_files[step], f"step {step} of {run.folder}"
    text = find_text(file, name, where)
    pattern = text.pattern()
    head_grid(paths[0], pattern, [token_text(t) for t in text.token_bytes], f"step {step}: {text.name}")
    head, query = clearest_head(pattern), None
    score = most_informative(file.scores)
    kind = score.removeprefix(ANTECEDENT)
    example = "repeat 1" if kind == score else f"{kind} 1"
    best = best_head(score, file.scores[score]) if score else None
    if best and not name and any(other.name == example for other in file.texts):
        text, head = find_text(file, example, where), best
        query = None if kind == score else len(text.tokens) - 1
    layer_pattern = text.pattern(head[0])[0, head[1]]
    title = f"{head_name(*head)} at step {step}: {text.name}"
    one_head(paths[1], layer_pattern, [token_text(t) for t in text.token_bytes], title, query)


def most_informative(scores: Mapping[str, NDArray[np.float32]]) -> str:
    """The first score of `FINDING_SCORES` on which some head reaches the threshold, else any; empty without scores.

    Args:
        scores: (L, H) by name.
    """
    reached = [name for name in FINDING_SCORES if name in scores and (scores[name] >= ATTENTION_THRESHOLD).any()]
    return next(iter([*reached, *scores]), "")


def _phase_change_series(run: RunFiles) -> tuple[Series, Series, Series] | None:
    """The loss, and the scores of the best induction head and previous-token head; None without the data."""
    loss = repeats_loss(run)
    steps, scores = run.head_scores.steps, run.head_scores.scores
    heads = []
    for name in ("induction", "previous_token"):
        best = best_head(name, scores[name][-1]) if name in scores else None
        if best:
            heads.append(Series(f"{name} score of {head_name(*best)}", steps, scores[name][:, best[0], best[1]]))
    if loss is None or len(heads) < 2 or len(steps) < 2:
        return None
    return loss, heads[0], heads[1]


def repeats_loss(run: RunFiles) -> Series | None:
    """Mean loss, in nats/token, on the second copy of repeated random tokens, without the copy's first token."""
    losses: dict[int, float] = {}
    for step, file in run.attention_files.items():
        for text in file.texts:
            n = (len(text.tokens) - 1) // 2
            if text.name == "repeat 1" and n >= 2:
                losses[step] = float(text.loss[n + 1 :].mean())  # loss[k] is of token k + 1
    return Series("loss on repeats", list(losses), list(losses.values())) if len(losses) > 1 else None


# Patterns


def head_grid(path: Path | str, pattern: ArrayLike, token_texts: Sequence[str], title: str) -> None:
    """All heads: a row for each layer, a column for each head.

    At most 8 layers, 8 heads and the last 64 tokens are shown; the line below the title says what is left out.

    Args:
        path: ends in .png or .svg.
        pattern: (L, H, T, T).
        token_texts: T texts.
    """
    pattern = np.asarray(pattern)
    L, H, T, _ = pattern.shape
    assert len(token_texts) == T, f"{len(token_texts)} texts for {T} tokens"
    pattern = pattern[:MAX_LAYERS, :MAX_HEADS, -GRID_TOKENS:, -GRID_TOKENS:]
    rows, columns, shown, _ = pattern.shape
    side = float(np.clip(shown * LABEL_INCHES, 1.5, min(3.0, 13 / max(rows, columns))))
    ticks = _ticks(token_texts[-shown:], side)
    notes = _part(rows, L, "first", "layers") + _part(columns, H, "first", "heads") + _part(shown, T, "last", "tokens")
    with _pattern_figure(Path(path), pattern, side, ticks, (title, notes)) as panels:
        for layer, head in np.ndindex(rows, columns):
            panels[layer, head].set_title(head_name(layer, head), fontsize=9, pad=3)


def one_head(
    path: Path | str, pattern: ArrayLike, token_texts: Sequence[str], title: str, query: int | None = None
) -> None:
    """One head, large: at most the last 96 tokens; up to 16 tokens with their values as numbers.

    Args:
        path: ends in .png or .svg.
        pattern: (T, T).
        token_texts: T texts.
        query: a row to frame, 0 to T - 1.
    """
    pattern = np.asarray(pattern)
    T = len(pattern)
    assert pattern.shape == (T, T) and len(token_texts) == T, f"{pattern.shape}, {len(token_texts)} texts"
    pattern = pattern[-HEAD_TOKENS:, -HEAD_TOKENS:]
    shown = len(pattern)
    row = -1 if query is None else query - (T - shown)
    side = float(np.clip(shown * 0.34, 2.4, 6.0))
    ticks = _ticks(token_texts[-shown:], side, max(row, 0))
    notes = _part(shown, T, "last", "tokens")
    with _pattern_figure(Path(path), pattern[None, None], side, ticks, (title, notes)) as panels:
        axes = panels[0, 0]
        for i, j in np.argwhere(np.tril(pattern) >= MIN_ANNOTATED) if shown <= ANNOTATED_TOKENS else ():
            value, color = f"{pattern[i, j]:.2f}".removeprefix("0"), INK if pattern[i, j] > 0.5 else "white"
            axes.text(j, i, value, ha="center", va="center", fontsize=6.5, color=color)
        if row >= 0:
            edges = np.array([-0.5, row + 0.5, row + 0.5, -0.5, -0.5]), row + np.array([-0.5, -0.5, 0.5, 0.5, -0.5])
            axes.plot(*edges, color=ACCENT, linewidth=1.6, clip_on=False)
            axes.get_yticklabels()[list(ticks).index(row)].set(color=ACCENT, weight="bold")


def _ticks(token_texts: Sequence[str], side: float, keep: int = 0) -> dict[int, str]:
    """A label for each position that has one on an axis of `side` inches: all, or every n-th, among them `keep`."""
    every = math.ceil(len(token_texts) * LABEL_INCHES / side)
    return {k: _shorten(drawable(token_texts[k]), LABEL_LENGTH) for k in range(keep % every, len(token_texts), every)}


def _part(shown: int, total: int, which: str, noun: str) -> list[str]:
    return [] if shown == total else [f"the {which} {shown} of {total} {noun}"]


@contextmanager
def _pattern_figure(
    path: Path, pattern: NDArray[Any], side: float, ticks: Mapping[int, str], heading: tuple[str, list[str]]
) -> Iterator[Any]:
    """A figure of patterns (rows, columns, T, T), each `side` inches wide; yields an array of its axes (rows, columns)."""
    import matplotlib

    colors = matplotlib.colormaps["cividis"].with_extremes(bad=FUTURE)
    rows, columns, T, _ = pattern.shape
    title, notes = heading
    if len(ticks) > 1 and (every := sorted(ticks)[1] - sorted(ticks)[0]) > 1:
        notes = [*notes, f"one token in {every} is labeled"]
    note = "row: query, column: key; gray: later tokens, masked\n" + "; ".join(notes)
    label_room = 0.07 * max(map(len, ticks.values()))
    width, height = columns * (side + 0.1) + label_room + 1.2, rows * (side + 0.3) + label_room + 1.0
    with _figure(path, (max(width, 5.2), height), title, note, "compressed") as figure:
        panels: Any = figure.subplots(rows, columns, squeeze=False)
        for row, column in np.ndindex(rows, columns):
            axes = panels[row, column]
            causal = np.ma.masked_array(pattern[row, column], mask=~np.tri(T, dtype=bool))
            image = axes.imshow(causal, cmap=colors, vmin=0, vmax=1, interpolation="nearest")
            below, left = ticks if row == rows - 1 else {}, ticks if column == 0 else {}  # ticks take most of the time
            axes.set_xticks(list(below), below.values(), rotation=90, fontsize=6.5)
            axes.set_yticks(list(left), left.values(), fontsize=6.5)
            axes.tick_params(length=1.5, width=0.5, pad=1.5)
        size = {"shrink": min(1.0, 2 / (rows * side)), "aspect": 16, "anchor": (0, 1), "pad": 0.02}
        bar = figure.colorbar(image, ax=panels, ticks=[0, 0.25, 0.5, 0.75, 1], label="attention weight", **size)
        bar.ax.tick_params(labelsize=7, length=2)
        figure.supylabel("query: the token that attends", fontsize=8.5)
        figure.supxlabel("key: the token attended to", fontsize=8.5)
        yield panels


# Series


def score_timeline(path: Path | str, steps: Sequence[int], values: NDArray[np.float32], score: str, title: str) -> None:
    """One score over the steps, a line for each head; the three heads that end highest are labeled, the others gray.

    Args:
        path: ends in .png or .svg.
        steps: (S,), increasing.
        values: (S, L, H); nan where missing.
        score: its name.
    """
    values = np.asarray(values, dtype=np.float64)
    S, L, H = values.shape
    assert len(steps) == S, f"{len(steps)} steps for {S} rows"
    lines, last = values.reshape(S, L * H), values[-1].ravel()
    best = [int(k) for k in np.argsort(-last) if np.isfinite(last[k])][: len(SERIES_COLORS)]  # nan is last
    marker: dict[str, Any] = {"marker": "o" if S == 1 else None, "markersize": 5}
    others = f"; gray: the other {L * H - len(best)} heads" if len(best) < L * H else ""
    with _figure(Path(path), SERIES_SIZE, title, score_info(score).title + others) as figure:
        axes = figure.subplots()
        axes.plot(steps, np.delete(lines, best, axis=1), color=GRAY, linewidth=1.0, **marker)
        for order, (k, color) in enumerate(zip(best, SERIES_COLORS, strict=False)):
            label = f"{head_name(*divmod(k, H))} {last[k]:.2f}"
            axes.plot(steps, lines[:, k], color=color, linewidth=1.8, label=label, zorder=5 - order, **marker)
        _style_axes(axes, steps, score_range(score, values), score)
        if best:
            axes.legend(loc="upper left", bbox_to_anchor=(1, 1), labelcolor="linecolor", handlelength=1)


def phase_change(path: Path | str, loss: Series, induction: Series, previous_token: Series, title: str) -> None:
    """The loss (left axis) with the scores of an induction head and a previous-token head (right axis, 0 to 1).

    As a model learns to continue repeated sequences, its loss falls while its induction head forms; a previous-token
    head forms before or with it (Olsson et al. 2022, "Argument 1").

    Args:
        path: ends in .png or .svg.
        loss: in nats/token; its steps may differ from those of the scores.
    """
    steps = [*loss.steps, *induction.steps, *previous_token.steps]
    highest = float(np.nanmax(np.asarray(loss.values, dtype=np.float64), initial=0.0)) or 1.0
    with _figure(Path(path), SERIES_SIZE, title) as figure:
        axes = figure.subplots()
        right = axes.twinx()
        lines = axes.plot(loss.steps, loss.values, color=MUTED, linewidth=1.6, linestyle="--")
        for series, color in zip((induction, previous_token), SERIES_COLORS, strict=False):
            lines += right.plot(series.steps, series.values, color=color, linewidth=1.8)
        _style_axes(axes, steps, (0.0, highest), f"{loss.name} (nats/token)")
        _style_axes(right, steps, (0.0, 1.0), "score")
        right.spines["right"].set_visible(True)
        names = [drawable(series.name, " ") for series in (loss, induction, previous_token)]
        axes.legend(lines, names, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, handlelength=2)


def score_range(name: str, values: ArrayLike) -> tuple[float, float]:
    """The lowest and highest value to draw a score between; without a bound, up to the largest value."""
    info = score_info(name)
    largest = float(np.nanmax(np.asarray(values, dtype=np.float64), initial=0.0)) or 1.0
    return info.low, largest if info.high is None else info.high


def _style_axes(axes: Axes, steps: Sequence[int], limits: tuple[float, float], name: str) -> None:
    low, high = limits
    room = 0.03 * (high - low)
    axes.set_xlim(min(steps), max(*steps, min(steps) + 1))
    axes.set_ylim(low - room, high + room)
    axes.set_xlabel("step")
    axes.set_ylabel(drawable(name, " "))
    axes.spines["right"].set_visible(False)
    axes.axhline(0, color=GRAY, linewidth=0.6, zorder=0)


# Every figure


@contextmanager
def _figure(
    path: Path,
    size: tuple[float, float],
    title: str,
    note: str = "",
    layout: Literal["constrained", "compressed"] = "constrained",
) -> Iterator[Figure]:
    """A figure of so many inches with a heading, in our own style whatever matplotlibrc says; written after the body.

    Args:
        title: cut to the width.
        note: smaller, below the title.

    Raises:
        UserError: for a suffix other than .png and .svg (exit code 2), or if the file cannot be written (6).
    """
    suffix = path.suffix.lower()
    if suffix not in (".png", ".svg"):
        raise UserError(f"cannot draw {path}: the name must end in .png or .svg", CONFIG)
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width, height = size
    lines = [drawable(line, " ") for line in note.split("\n") if line]
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(figsize=size)
        FigureCanvasAgg(figure)
        figure.set_layout_engine(layout, rect=(0.01, 0.01, 0.98, 0.98 - (0.38 + 0.16 * len(lines)) / height))
        corner: dict[str, Any] = {"x": 0.15 / width, "va": "top", "in_layout": False}
        title = _shorten(drawable(title, " "), int(9.5 * width))
        figure.text(y=1 - 0.12 / height, s=title, fontsize=12, weight="bold", **corner)
        figure.text(y=1 - 0.38 / height, s="\n".join(lines), fontsize=8.5, color="#555555", **corner)
        yield figure
        data = io.BytesIO()
        # Without a date and the library's version, equal figures have equal bytes.
        metadata = {"Date": None} if suffix == ".svg" else {"Software": None}
        figure.savefig(data, format=suffix[1:], metadata=metadata)
    write_atomic(path, [data.getvalue()])


@cache
def _glyphs() -> frozenset[int]:
    """The characters of DejaVu Sans, which comes with matplotlib."""
    import matplotlib
    from matplotlib.ft2font import FT2Font

    font = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return frozenset(FT2Font(str(font)).get_charmap())


def drawable(text: str, space: str = "·") -> str:
    """`text` with a visible mark for each space; characters that the font lacks or that are invisible are escaped."""
    return "".join(
        c if c.isprintable() and ord(c) in _glyphs() else c.encode("unicode_escape", "surrogatepass").decode()
        for c in text.replace(" ", space)
    )


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
