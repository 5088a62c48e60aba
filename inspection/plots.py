"""Attention and head scores as figures, PNG or SVG by the suffix of the path.

`draw_figures` draws all figures of a run; `head_grid`, `one_head`, `score_timeline` and `phase_change` draw one each from
arrays. They raise `UserError` for another suffix (exit code 2) and if the file cannot be written (6). matplotlib is
imported when a figure is drawn, and used without pyplot: no display, no global state. The same input gives the same bytes.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from common.errors import CONFIG, UserError
from common.files import write_atomic
from inspection.findings import ATTENTION_THRESHOLD, FINDING_SCORES
from inspection.head_scores import ANTECEDENT
from inspection.run_reader import RunFiles, best_head, find_score, find_text, match_name
from inspection.terminal import clearest_head, head_name, token_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_LAYERS = MAX_HEADS = 8
"""A grid shows at most the first 8 layers and heads."""
GRID_TOKENS = 64
"""Tokens in a grid, at most: the last ones of a longer text."""
HEAD_TOKENS = 96
"""Tokens in a plot of one head, at most."""
ANNOTATED_TOKENS = 16
"""Up to so many tokens, each cell of a plot of one head shows its value."""
MIN_ANNOTATED = 0.01
LABEL_LENGTH = 14
TOP, GAP, MIN_WIDTH = 0.98, 0.28, 5.2
"""Inches: above the panels, for the title; between panels; of the whole figure."""
LABEL_SIZES = ((7.0, 0.115), (6.0, 0.094))
"""(points, inches between two labels); the smaller size where the larger does not fit."""
FUTURE = "#e3e3e3"
"""Cells that causality excludes: gray, which is not a color of the scale."""
INK, ACCENT, GRAY, MUTED = "#222222", "#c8102e", "#c9c9c9", "#666666"
SERIES_COLORS = ("#00467f", "#c8102e", "#8a6d00")
"""Colors of the labeled lines, highest first; they differ in lightness too."""
SERIES_SIZE, AXES_BOX = (7.2, 4.0), (0.085, 0.13, 0.785, 0.72)
"""Inches; left, bottom, width and height of the axes as fractions of the figure."""
DPI = 110


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
        stem = "timeline" if len(names) == 1 else f"timeline-{_file_name(name)}"
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


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() and c.isascii() else "-" for c in name)


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
    labels = [_label(text) for text in token_texts[-shown:]]
    margin = _margin(labels)
    side = float(np.clip(shown * LABEL_SIZES[0][1], 1.5, min(3.0, 13 / max(rows, columns))))
    pitch = side + GAP
    ticks = _ticks(shown, side)
    size = max(margin + columns * pitch + 0.65, MIN_WIDTH), margin + rows * pitch + TOP - GAP
    with _figure(Path(path), size) as figure:
        for layer, head in np.ndindex(rows, columns):
            axes = _panel(figure, margin + head * pitch, margin + (rows - 1 - layer) * pitch, side)
            image = _draw_pattern(axes, pattern[layer, head])
            _label_tokens(axes, ticks, labels, rows=head == 0, columns=layer == rows - 1)
            axes.set_title(head_name(layer, head), fontsize=9, pad=3)
        _color_bar(figure, image, margin + columns * pitch - 0.08, size[1] - TOP, min(side, 2.0))
        left_out = [*_part(rows, L, "layers", "first"), *_part(columns, H, "heads", "first")]
        _pattern_text(figure, margin, title, [*left_out, *_part(shown, T, "tokens", "last"), *ticks.note])


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
    labels = [_label(text) for text in token_texts[-shown:]]
    margin = _margin(labels)
    side = float(np.clip(shown * 0.34, 2.4, 6.0))
    row = -1 if query is None else query - (T - shown)
    ticks = _ticks(shown, side, keep=row)
    with _figure(Path(path), (max(margin + side + GAP + 0.65, MIN_WIDTH), margin + side + TOP)) as figure:
        axes = _panel(figure, margin, margin, side)
        image = _draw_pattern(axes, pattern)
        _label_tokens(axes, ticks, labels, rows=True, columns=True)
        if shown <= ANNOTATED_TOKENS:
            _annotate(axes, pattern)
        if row >= 0:
            _frame_row(axes, row, ticks)
        _color_bar(figure, image, margin + side + GAP - 0.08, margin + side, min(side, 2.0))
        _pattern_text(figure, margin, title, [*_part(shown, T, "tokens", "last"), *ticks.note])


@dataclass(frozen=True)
class _Ticks:
    positions: list[int]
    every: int
    points: float

    @property
    def note(self) -> list[str]:
        return [] if self.every == 1 else [f"one token in {self.every} is labeled"]


def _ticks(T: int, inches: float, keep: int = -1) -> _Ticks:
    """As many token labels as fit on an axis: all, or every n-th. `keep` is labeled in any case, if it is not negative."""
    points, room = next((size for size in LABEL_SIZES if T * size[1] <= inches), LABEL_SIZES[-1])
    every = max(1, math.ceil(T * room / inches))
    positions = list(range(0, T, every))
    if keep >= 0:  # its neighbors make room
        positions = sorted([*(k for k in positions if abs(k - keep) >= T * room / inches), keep])
    return _Ticks(positions, every, points)


def _draw_pattern(axes: Axes, pattern: NDArray[np.floating[Any]]) -> Any:
    import matplotlib

    colors = matplotlib.colormaps["cividis"].with_extremes(bad=FUTURE)
    causal = np.tril(np.ones(pattern.shape, dtype=bool))
    masked = np.ma.masked_array(pattern, mask=~causal)
    return axes.imshow(masked, cmap=colors, vmin=0, vmax=1, interpolation="nearest", aspect="equal")


def _label_tokens(axes: Axes, ticks: _Ticks, labels: Sequence[str], rows: bool, columns: bool) -> None:
    texts = [labels[k] for k in ticks.positions]
    font: dict[str, Any] = {"fontsize": ticks.points, "parse_math": False}  # a `$` in a token is a `$`
    axes.tick_params(length=1.5, width=0.5, pad=1.5)
    for wanted, set_ticks, rotation in ((rows, axes.set_yticks, 0), (columns, axes.set_xticks, 90)):
        if wanted:
            set_ticks(ticks.positions, texts, rotation=rotation, **font)
        else:
            set_ticks([])


def _annotate(axes: Axes, pattern: NDArray[np.floating[Any]]) -> None:
    """Each value of at least `MIN_ANNOTATED` as a number, dark on light and light on dark."""
    for i, j in zip(*np.nonzero(np.tril(pattern) >= MIN_ANNOTATED), strict=True):
        value = f"{pattern[i, j]:.2f}".removeprefix("0")
        color = INK if pattern[i, j] > 0.5 else "white"
        axes.text(j, i, value, ha="center", va="center", fontsize=6.5, color=color)


def _frame_row(axes: Axes, row: int, ticks: _Ticks) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((-0.5, row - 0.5), row + 1, 1, fill=False, edgecolor=ACCENT, linewidth=1.6))
    axes.get_yticklabels()[ticks.positions.index(row)].set(color=ACCENT, weight="bold")


def _panel(figure: Figure, left: float, bottom: float, side: float) -> Axes:
    """Square axes; position and side in inches."""
    width, height = figure.get_size_inches()
    return figure.add_axes((left / width, bottom / height, side / width, side / height))


def _color_bar(figure: Figure, image: Any, left: float, top: float, length: float) -> None:
    """The color scale, below a point given in inches."""
    width, height = figure.get_size_inches()
    axes = figure.add_axes((left / width, (top - length) / height, 0.12 / width, length / height))
    bar = figure.colorbar(image, cax=axes, ticks=[0, 0.25, 0.5, 0.75, 1])
    axes.tick_params(labelsize=7, length=2)
    bar.set_label("attention weight", fontsize=8)


def _part(shown: int, total: int, noun: str, which: str) -> list[str]:
    return [] if shown == total else [f"the {which} {shown} of {total} {noun}"]


def _pattern_text(figure: Figure, left: float, title: str, notes: Sequence[str]) -> None:
    """Title, what rows and columns are, and what is left out. Columns begin `left` inches from the edge."""
    width, height = figure.get_size_inches()
    font: dict[str, Any] = {"fontsize": 8.5, "color": INK}
    figure.text(0.1 / width, 1 - TOP / height, "query: the token that attends", rotation=90, va="top", **font)
    figure.text(left / width, 0.1 / height, "key: the token attended to", va="bottom", **font)
    _heading(figure, title, "row: query, column: key; gray: later tokens, masked\n" + "; ".join(notes))


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
    lines, limits = values.reshape(S, L * H), score_range(score, values)
    last = np.where(np.isfinite(lines[-1]), lines[-1], -np.inf)
    best = [int(k) for k in np.argsort(-last, kind="stable")[: len(SERIES_COLORS)] if np.isfinite(last[k])]
    marker = "o" if S == 1 else None
    with _figure(Path(path), SERIES_SIZE) as figure:
        axes = figure.add_axes(AXES_BOX)
        for k in set(range(L * H)) - set(best):
            axes.plot(steps, lines[:, k], color=GRAY, linewidth=1.0, marker=marker, markersize=4)
        for k, color in reversed(list(zip(best, SERIES_COLORS, strict=False))):
            axes.plot(steps, lines[:, k], color=color, linewidth=1.8, marker=marker, markersize=5)
        _style_axes(axes, steps, limits, score)
        ends = [(float(lines[-1, k]), f"{head_name(*divmod(k, H))} {lines[-1, k]:.2f}") for k in best]
        _label_ends(axes, ends, limits)
        others = f"; gray: the other {L * H - len(best)} heads" if len(best) < L * H else ""
        _heading(figure, title, find_score(score).title + others)


def phase_change(path: Path | str, loss: Series, induction: Series, previous_token: Series, title: str) -> None:
    """The loss (left axis) with the scores of an induction head and a previous-token head (right axis, 0 to 1).

    As a model learns to continue repeated sequences, its loss falls while its induction head forms; a previous-token
    head forms before or with it (Olsson et al. 2022, "Argument 1").

    Args:
        path: ends in .png or .svg.
        loss: in nats/token; its steps may differ from those of the scores.
    """
    steps = [*loss.steps, *induction.steps, *previous_token.steps]
    losses = np.asarray(loss.values, dtype=np.float64)
    highest = float(np.nanmax(losses)) if np.isfinite(losses).any() else 1.0
    with _figure(Path(path), SERIES_SIZE) as figure:
        axes = figure.add_axes(AXES_BOX)
        _style_axes(axes, steps, (0.0, highest), f"{loss.name} (nats/token)")
        lines = axes.plot(loss.steps, losses, color=MUTED, linewidth=1.6, linestyle="--")
        right = axes.twinx()
        for series, color in ((induction, SERIES_COLORS[0]), (previous_token, SERIES_COLORS[1])):
            lines += right.plot(series.steps, series.values, color=color, linewidth=1.8)
        _style_axes(right, steps, (0.0, 1.0), "score")
        for side, visible in (("top", False), ("left", False), ("right", True)):
            right.spines[side].set_visible(visible)
        names = [drawable(series.name, " ") for series in (loss, induction, previous_token)]
        place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (0.01, 0.935), "ncols": 3}
        legend = figure.legend(lines, names, frameon=False, fontsize=8.5, handlelength=2, **place)
        for text in legend.get_texts():
            text.set_parse_math(False)
        _heading(figure, title, "")


def score_range(name: str, values: ArrayLike) -> tuple[float, float]:
    """The lowest and highest value to draw a score between; without a bound, up to the largest value."""
    info = find_score(name)
    largest = float(np.nanmax(np.asarray(values, dtype=np.float64), initial=0.0)) or 1.0
    return info.low, largest if info.high is None else info.high


def _style_axes(axes: Axes, steps: Sequence[int], limits: tuple[float, float], name: str) -> None:
    low, high = limits
    room = 0.03 * (high - low)
    axes.set_xlim(min(steps), max(*steps, min(steps) + 1))
    axes.set_ylim(low - room, high + room)
    axes.set_xlabel("step", fontsize=9)
    axes.set_ylabel(drawable(name, " "), fontsize=9, parse_math=False)
    axes.tick_params(labelsize=8, length=2.5, width=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.axhline(0, color=GRAY, linewidth=0.6, zorder=0)


def _label_ends(axes: Axes, ends: Sequence[tuple[float, str]], limits: tuple[float, float]) -> None:
    """Labels next to the ends of the lines, moved apart where they would overlap."""
    low, high = limits
    heights: list[float] = []
    for value, _ in ends:  # highest first: each goes below the previous one
        height = float(np.clip((value - low) / (high - low), 0, 1)) if high > low else 0.0
        heights.append(min(height, heights[-1] - 0.055) if heights else height)
    lift = max(0.0, -min(heights, default=0.0))
    for height, (_, name), color in zip(heights, ends, SERIES_COLORS, strict=False):
        y = (height + lift) * 0.94 + 0.03
        axes.text(1.015, y, name, transform=axes.transAxes, color=color, fontsize=9, va="center")


# Every figure


@contextmanager
def _figure(path: Path, size: tuple[float, float]) -> Iterator[Figure]:
    """A figure of so many inches, in our own style whatever the user's matplotlibrc says; written after the body.

    Raises:
        UserError: for a suffix other than .png and .svg (exit code 2), or if the file cannot be written (6).
    """
    suffix = path.suffix.lower()
    if suffix not in (".png", ".svg"):
        raise UserError(f"cannot draw {path}: the name must end in .png or .svg", CONFIG)
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.style.context(["default", _style()]):
        figure = Figure(figsize=size)
        FigureCanvasAgg(figure)
        yield figure
        data = io.BytesIO()
        # Without a date and the library's version, equal figures have equal bytes.
        metadata = {"Date": None} if suffix == ".svg" else {"Software": None}
        figure.savefig(data, format=suffix[1:], dpi=DPI, metadata=metadata)
    write_atomic(path, [data.getvalue()])


def _style() -> dict[Any, Any]:
    return {
        "font.family": ["DejaVu Sans"],
        "text.color": INK,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.edgecolor": "#888888",
        "axes.linewidth": 0.6,
        "svg.fonttype": "none",
        "svg.hashsalt": "attention",
    }


def _heading(figure: Figure, title: str, note: str) -> None:
    """The title, cut to the figure's width, with a smaller note below."""
    width, height = figure.get_size_inches()
    font: dict[str, Any] = {"ha": "left", "va": "top", "parse_math": False}
    title, room = drawable(title, " "), int(9.5 * width)
    title = title if len(title) <= room else title[: room - 1] + "…"
    figure.text(0.15 / width, 1 - 0.12 / height, title, fontsize=12, weight="bold", **font)
    lines = "\n".join(drawable(line, " ") for line in note.split("\n"))
    figure.text(0.15 / width, 1 - 0.38 / height, lines, fontsize=8.5, color="#555555", **font)


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


def _label(text: str) -> str:
    label = drawable(text)
    return label if len(label) <= LABEL_LENGTH else label[: LABEL_LENGTH - 1] + "…"


def _margin(labels: Sequence[str]) -> float:
    """Inches for the longest label and the name of the axis."""
    return 0.42 + 0.065 * max(4, *map(len, labels))
