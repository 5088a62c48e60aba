"""Attention as pictures, PNG or SVG by the ending of the path.

Takes patterns from `capture.py` or from a dump (`dump.py`). matplotlib is loaded when a figure is drawn,
through its object interface: no display, no window, no global figure. The same input gives the same bytes.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from common.errors import CONFIG, DISK_OR_MEMORY, UserError
from inspection.registry import score_info
from inspection.terminal import head_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_LAYERS = MAX_HEADS = 8
"""A grid shows the first layers and heads up to these."""
GRID_TOKENS = 64
"""Tokens of a grid, and of a single head below: the last ones of a longer text."""
HEAD_TOKENS = 96
TOP, GAP, LEAST_WIDTH = 0.98, 0.28, 5.2
"""Inches: above the panels, for the title; between panels; of the whole figure."""
VALUES_UP_TO = 16
"""In texts of so many tokens each cell of a single head says its weight."""
LABEL_LENGTH = 14
FORBIDDEN = "#e3e3e3"
"""What causality forbids is no colour of the scale: grey, where 0 is dark blue."""
INK, ACCENT = "#222222", "#c8102e"
DPI = 110
WORTH_A_NUMBER = 0.01
LABELS = ((7.0, 0.115), (6.0, 0.094))
"""(points, least distance of two labels in inches); the smaller ones where the larger do not fit."""


@cache
def _glyphs() -> frozenset[int]:
    """The characters that DejaVu Sans, the font that comes with matplotlib, can draw."""
    import matplotlib
    from matplotlib.ft2font import FT2Font

    font = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return frozenset(FT2Font(str(font)).get_charmap())


def drawable(text: str, space: str = "·") -> str:
    """`text` with a visible mark for each space, and escapes for what the font lacks or nobody can see."""
    shown = text.replace(" ", space)
    glyphs = _glyphs()
    return "".join(
        c if c.isprintable() and ord(c) in glyphs else c.encode("unicode_escape", "surrogatepass").decode()
        for c in shown
    )


def _label(text: str) -> str:
    shown = drawable(text)
    return shown if len(shown) <= LABEL_LENGTH else shown[: LABEL_LENGTH - 1] + "…"


def _margin(labels: Sequence[str]) -> float:
    """Inches that the longest label needs beside the panels, and the name of the axis beside it."""
    return 0.42 + 0.065 * max(4, *map(len, labels))


def style() -> dict[Any, Any]:
    """Settings that the reader's own matplotlibrc must not change."""
    return {
        "font.family": ["DejaVu Sans"],
        "text.usetex": False,
        "text.color": INK,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.edgecolor": "#888888",
        "axes.linewidth": 0.6,
        "axes.grid": False,
        "figure.facecolor": "white",
        "savefig.bbox": None,
        "svg.fonttype": "none",
        "svg.hashsalt": "attention",
    }


def save(figure: Figure, path: Path) -> None:
    """Write a figure, of the kind that its ending names.

    Raises:
        UserError: if that is another than .png or .svg (exit code 2), or the file cannot be written (6).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    kind = path.suffix.lower()
    if kind not in (".png", ".svg"):
        raise UserError(f"cannot draw {path}: name a figure .png or .svg", CONFIG)
    # A date, or a version of the library, would make equal figures differ.
    unmarked = {"Date": None} if kind == ".svg" else {"Software": None}
    drawn = io.BytesIO()
    figure.savefig(drawn, format=kind[1:], dpi=DPI, metadata=unmarked)
    try:
        path.write_bytes(drawn.getvalue())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}", DISK_OR_MEMORY) from error


def _image(axes: Axes, weights: NDArray[np.float32]) -> Any:
    """One head's lower triangle in colour, the rest grey."""
    import matplotlib

    allowed = np.tril(np.ones(weights.shape, dtype=bool))
    colours = matplotlib.colormaps["cividis"].with_extremes(bad=FORBIDDEN)
    shown = np.ma.masked_array(weights, mask=~allowed)
    return axes.imshow(shown, cmap=colours, vmin=0, vmax=1, interpolation="nearest", aspect="equal")


@dataclass(frozen=True)
class _Ticks:
    """Which tokens of an axis are named, and how large."""

    positions: list[int]
    every: int
    points: float
    distance: float
    """Cells between two labels, at least."""


def _ticks(T: int, inches: float) -> _Ticks:
    """As many labels as have room on an axis of this length: each token's, or every n-th."""
    points, room = next((label for label in LABELS if T * label[1] <= inches), LABELS[-1])
    every = max(1, math.ceil(T * room / inches))
    return _Ticks(list(range(0, T, every)), every, points, T * room / inches)


def _name_tokens(axes: Axes, ticks: _Ticks, labels: Sequence[str], rows: bool, columns: bool) -> None:
    """Token labels on the wanted sides, as plain text: a `$` in a token is a `$`, not the start of math."""
    texts = [labels[k] for k in ticks.positions]
    plain: dict[str, Any] = {"fontsize": ticks.points, "parse_math": False}
    axes.tick_params(length=1.5, width=0.5, pad=1.5)
    for wanted, put, turn in ((rows, axes.set_yticks, 0), (columns, axes.set_xticks, 90)):
        if wanted:
            put(ticks.positions, texts, rotation=turn, **plain)
        else:
            put([])


def _panel(figure: Figure, left: float, bottom: float, side: float) -> Axes:
    """A square, its place and size in inches."""
    width, height = figure.get_size_inches()
    return figure.add_axes((left / width, bottom / height, side / width, side / height))


def _colour_bar(figure: Figure, image: Any, left: float, top: float, length: float) -> None:
    """The scale, hanging down from a point given in inches."""
    width, height = figure.get_size_inches()
    axes = figure.add_axes((left / width, (top - length) / height, 0.12 / width, length / height))
    bar = figure.colorbar(image, cax=axes, ticks=[0, 0.25, 0.5, 0.75, 1])
    axes.tick_params(labelsize=7, length=2)
    bar.set_label("weight", fontsize=8)


def _part(shown: int, whole: int, noun: str, which: str) -> list[str]:
    """What is said of a figure that shows a part; nothing of one that shows all."""
    return [] if shown == whole else [f"the {which} {shown} of {whole} {noun}"]


def _spacing(ticks: _Ticks) -> list[str]:
    return [] if ticks.every == 1 else [f"one token in {ticks.every} is named"]


def heading(figure: Figure, title: str, note: str) -> None:
    """The title, cut to the figure's width, and smaller below it what has to be said of the figure."""
    width, height = figure.get_size_inches()
    plain: dict[str, Any] = {"ha": "left", "va": "top", "parse_math": False}
    shown, room = drawable(title, " "), int(9.5 * width)  # characters that fit
    shown = shown if len(shown) <= room else shown[: room - 1] + "…"
    figure.text(0.15 / width, 1 - 0.12 / height, shown, fontsize=12, weight="bold", **plain)
    figure.text(0.15 / width, 1 - 0.38 / height, note, fontsize=8.5, color="#555555", **plain)


def _titled(figure: Figure, title: str, parts: Sequence[str]) -> None:
    """The title; below it, how to read the figure and what of the model or text is left out."""
    heading(figure, title, "query (row) reads key (column); grey: later tokens, never read\n" + "; ".join(parts))


def _axis_names(figure: Figure, left: float) -> None:
    """What rows and columns are, along the edges of the figure; columns begin `left` inches from its edge."""
    width, height = figure.get_size_inches()
    names: dict[str, Any] = {"fontsize": 8.5, "color": INK}
    figure.text(0.1 / width, 1 - TOP / height, "query: the token that reads", rotation=90, va="top", **names)
    figure.text(left / width, 0.1 / height, "key: the token that is read", va="bottom", **names)


def head_grid(path: Path | str, pattern: ArrayLike, token_texts: Sequence[str], title: str) -> None:
    """All heads side by side: a row for each layer, a column for each head.

    At most 8 layers, 8 heads and the last 64 tokens are shown; the line below the title says what is left
    out.

    Args:
        path: ends in .png or .svg.
        pattern: weights (L, H, T, T).
        token_texts: T texts, escape_control_chars or not.

    Raises:
        UserError: if the ending is another one, or the file cannot be written.
    """
    import matplotlib
    from matplotlib.figure import Figure

    weights = np.asarray(pattern, dtype=np.float32)
    L, H, T, _ = weights.shape
    assert len(token_texts) == T, f"{len(token_texts)} texts for {T} tokens"
    weights = weights[:MAX_LAYERS, :MAX_HEADS, -GRID_TOKENS:, -GRID_TOKENS:]
    rows, columns, shown, _ = weights.shape
    labels = [_label(text) for text in token_texts[-shown:]]
    margin = _margin(labels)
    panel = float(np.clip(shown * LABELS[0][1], 1.5, min(3.0, 13 / max(rows, columns))))
    width = max(margin + columns * (panel + GAP) + 0.65, LEAST_WIDTH)
    height = margin + rows * (panel + GAP) + TOP - GAP
    ticks = _ticks(shown, panel)
    with matplotlib.rc_context(style()):
        figure = Figure(figsize=(width, height))
        for layer in range(rows):
            for head in range(columns):
                bottom = margin + (rows - 1 - layer) * (panel + GAP)
                axes = _panel(figure, margin + head * (panel + GAP), bottom, panel)
                image = _image(axes, weights[layer, head])
                _name_tokens(axes, ticks, labels, head == 0, layer == rows - 1)
                axes.set_title(head_name(layer, head), fontsize=9, pad=3)
        _colour_bar(figure, image, margin + columns * (panel + GAP) - 0.08, height - TOP, min(panel, 2.0))
        _axis_names(figure, margin)
        missing = [*_part(rows, L, "layers", "first"), *_part(columns, H, "heads", "first")]
        _titled(figure, title, [*missing, *_part(shown, T, "tokens", "last"), *_spacing(ticks)])
        save(figure, Path(path))


def _values(axes: Axes, weights: NDArray[np.float32]) -> None:
    """Each weight that is not next to nothing as a number, dark on light and light on dark."""
    for i, j in zip(*np.nonzero(np.tril(weights) >= WORTH_A_NUMBER), strict=True):
        value = f"{weights[i, j]:.2f}".removeprefix("0")
        colour = INK if weights[i, j] > 0.5 else "white"
        axes.text(j, i, value, ha="center", va="center", fontsize=6.5, color=colour)


def _highlight(axes: Axes, row: int, ticks: Sequence[int]) -> None:
    """A frame around what one query reads, and its label in the same colour."""
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((-0.5, row - 0.5), row + 1, 1, fill=False, edgecolor=ACCENT, linewidth=1.6))
    axes.get_yticklabels()[list(ticks).index(row)].set(color=ACCENT, weight="bold")


def one_head(
    path: Path | str, pattern: ArrayLike, token_texts: Sequence[str], title: str, query: int | None = None
) -> None:
    """One head, large: up to 16 tokens with their weights as numbers; at most the last 96 tokens.

    Args:
        path: ends in .png or .svg.
        pattern: weights (T, T).
        token_texts: T texts, escape_control_chars or not.
        query: a row to frame, 0 to T - 1.

    Raises:
        UserError: if the ending is another one, or the file cannot be written.
    """
    import matplotlib
    from matplotlib.figure import Figure

    weights = np.asarray(pattern, dtype=np.float32)
    T = len(weights)
    assert weights.shape == (T, T) and len(token_texts) == T, f"{weights.shape}, {len(token_texts)} texts"
    weights = weights[-HEAD_TOKENS:, -HEAD_TOKENS:]
    shown = len(weights)
    labels = [_label(text) for text in token_texts[-shown:]]
    margin = _margin(labels)
    panel = float(np.clip(shown * 0.34, 2.4, 6.0))
    ticks = _ticks(shown, panel)
    row = -1 if query is None else query - (T - shown)
    if row >= 0:  # the framed row is named, and its neighbours make room for it
        others = [k for k in ticks.positions if abs(k - row) >= ticks.distance]
        ticks = replace(ticks, positions=sorted([*others, row]))
    with matplotlib.rc_context(style()):
        figure = Figure(figsize=(max(margin + panel + GAP + 0.65, LEAST_WIDTH), margin + panel + TOP))
        axes = _panel(figure, margin, margin, panel)
        image = _image(axes, weights)
        _name_tokens(axes, ticks, labels, rows=True, columns=True)
        if shown <= VALUES_UP_TO:
            _values(axes, weights)
        if row >= 0:
            _highlight(axes, row, ticks.positions)
        _colour_bar(figure, image, margin + panel + GAP - 0.08, margin + panel, min(panel, 2.0))
        _axis_names(figure, margin)
        _titled(figure, title, [*_part(shown, T, "tokens", "last"), *_spacing(ticks)])
        save(figure, Path(path))


def score_range(name: str, values: ArrayLike) -> tuple[float, float]:
    """The least and the largest value of a head score, to draw it by; of one without a bound, the largest there is."""
    largest = float(np.nanmax(np.asarray(values, dtype=np.float64), initial=0.0)) or 1.0
    try:
        info = score_info(name)
    except KeyError:
        return 0.0, max(largest, 1.0)
    return info.low, largest if info.high is None else info.high


COLOURS = ("#00467f", "#c8102e", "#8a6d00")
"""Of the named heads, best first: dark blue, red and ochre differ in lightness too."""
GREY, QUIET = "#c9c9c9", "#666666"
SIZE = (7.2, 4.0)
"""Inches."""
LEFT, RIGHT, BOTTOM, UPPER = 0.085, 0.87, 0.13, 0.85
"""Edges of the axes as shares of the figure."""
APART = 0.055
"""Least distance of two names at the lines' ends, as a share of the axis."""


@dataclass(frozen=True)
class Line:
    """Numbers over steps, and what they are called."""

    name: str
    steps: Sequence[int]
    values: Sequence[float] | NDArray[np.floating[Any]]


def timeline(
    path: Path | str, steps: Sequence[int], scores: Mapping[str, NDArray[np.float32]], score: str, title: str
) -> None:
    """One score over the steps, a line for each head; the three that end highest are named, the others grey.

    Args:
        path: ends in .png or .svg.
        steps: (S,) of training, rising.
        scores: (S, L, H) by name; nan where one is missing.
        score: the name of the one to draw.

    Raises:
        UserError: if the ending is another one, or the file cannot be written.
    """
    import matplotlib.style
    from matplotlib.figure import Figure

    table = np.asarray(scores[score], dtype=np.float64)
    S, L, H = table.shape
    assert len(steps) == S, f"{len(steps)} steps for {S} rows"
    lines, limits = table.reshape(S, L * H), score_range(score, table)
    last = np.where(np.isfinite(lines[-1]), lines[-1], -np.inf)
    best = [int(k) for k in np.argsort(-last, kind="stable")[: len(COLOURS)] if np.isfinite(last[k])]
    with matplotlib.style.context(["default", style()]):  # whatever the reader has set
        figure = Figure(figsize=SIZE)
        axes = figure.add_axes((LEFT, BOTTOM, RIGHT - LEFT, UPPER - BOTTOM))
        marks = "o" if S == 1 else None
        for k in range(L * H):
            if k not in best:
                axes.plot(steps, lines[:, k], color=GREY, linewidth=1.0, marker=marks, markersize=4)
        for k, colour in reversed(list(zip(best, COLOURS, strict=False))):
            axes.plot(steps, lines[:, k], color=colour, linewidth=1.8, marker=marks, markersize=5)
        _frame(axes, steps, limits, score.replace("_", " "))
        names = [(float(lines[-1, k]), f"{head_name(*divmod(k, H))} {lines[-1, k]:.2f}") for k in best]
        _name_ends(axes, names, COLOURS, limits)
        grey = f"; grey: the other {L * H - len(best)} heads" if len(best) < L * H else ""
        heading(figure, title, drawable(_meaning(score), " ") + grey)
        save(figure, Path(path))


def _meaning(score: str) -> str:
    """What a score says, in words."""
    try:
        return score_info(score).title
    except KeyError:
        return score


def phase_change(path: Path | str, loss: Line, induction: Line, previous: Line, title: str) -> None:
    """The loss (left axis) with the weight of an induction head and of a previous-token head (right axis, 0 to 1).

    Where a model learns to continue what repeats itself, its loss falls as its induction head forms, and a
    previous-token head has formed before or with it (Olsson et al. 2022, "Argument 1").

    Args:
        path: ends in .png or .svg.
        loss: nats/token; its steps may be others than the scores'.
        induction: the weight of one head over the steps.
        previous: the weight of one head over the steps.

    Raises:
        UserError: if the ending is another one, or the file cannot be written.
    """
    import matplotlib.style
    from matplotlib.figure import Figure

    steps = [*loss.steps, *induction.steps, *previous.steps]
    values = np.asarray(loss.values, dtype=np.float64)
    highest = float(np.nanmax(values)) if np.isfinite(values).any() else 1.0
    with matplotlib.style.context(["default", style()]):  # whatever the reader has set
        figure = Figure(figsize=SIZE)
        axes = figure.add_axes((LEFT, BOTTOM, RIGHT - LEFT, UPPER - BOTTOM))
        _frame(axes, steps, (0.0, highest), f"{loss.name} (nats/token)")
        axes.plot(loss.steps, values, color=QUIET, linewidth=1.6, linestyle="--")
        weights = axes.twinx()
        for line, colour in ((previous, COLOURS[1]), (induction, COLOURS[0])):
            weights.plot(line.steps, line.values, color=colour, linewidth=1.8)
        _frame(weights, steps, (0.0, 1.0), "weight")
        for side in ("top", "left"):
            weights.spines[side].set_visible(False)
        weights.spines["right"].set_visible(True)
        _key(figure, [(loss.name, QUIET, "--"), (induction.name, COLOURS[0], "-"), (previous.name, COLOURS[1], "-")])
        heading(figure, title, "")
        save(figure, Path(path))


def _frame(axes: Axes, steps: Sequence[int], limits: tuple[float, float], name: str) -> None:
    """Axes from the first to the last step and a little more, with a line at zero and no box."""
    low, high = limits
    room = 0.03 * (high - low)
    first, last = min(steps), max(steps)
    axes.set_xlim(first, last if last > first else first + 1)
    axes.set_ylim(low - room, high + room)
    axes.set_xlabel("step", fontsize=9)
    axes.set_ylabel(drawable(name, " "), fontsize=9, parse_math=False)
    axes.tick_params(labelsize=8, length=2.5, width=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.axhline(0, color=GREY, linewidth=0.6, zorder=0)


def _name_ends(
    axes: Axes, names: Sequence[tuple[float, str]], colours: Sequence[str], limits: tuple[float, float]
) -> None:
    """Names beside the ends of their lines, moved apart where they would lie on each other."""
    low, high = limits
    taken: list[float] = []
    for value, _ in names:  # highest first: each goes below the one before it
        share = float(np.clip((value - low) / (high - low), 0, 1)) if high > low else 0.0
        taken.append(min([share, *(place - APART for place in taken[-1:])]))
    lift = max(0.0, -min(taken, default=0.0))
    for place, (_, name), colour in zip(taken, names, colours, strict=False):
        axes.text(
            1.015, (place + lift) * 0.94 + 0.03, name, transform=axes.transAxes, color=colour, fontsize=9, va="center"
        )


def _key(figure: Any, entries: Sequence[tuple[str, str, Literal["-", "--"]]]) -> None:
    """What each line is, in a row under the title."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=colour, linestyle=style, linewidth=1.8) for _, colour, style in entries]
    names = [drawable(name, " ") for name, _, _ in entries]
    key = figure.legend(
        handles,
        names,
        loc="upper left",
        bbox_to_anchor=(0.01, 0.935),
        ncols=3,
        frameon=False,
        fontsize=8.5,
        handlelength=2,
    )
    for text in key.get_texts():
        text.set_parse_math(False)
