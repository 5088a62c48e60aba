"""What became of the heads during training, as pictures: PNG or SVG by the ending of the path.

Takes the scores that the dumps of a run hold (`folder.py`). Drawn as `figures.py` draws: through matplotlib's object
interface, in a style of its own, and the same input gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from inspection.plots import drawable, heading, save, style
from inspection.registry import score_info
from inspection.tables import scale
from inspection.terminal import head_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#00467f", "#c8102e", "#8a6d00")
"""Of the named heads, best first: dark blue, red and ochre differ in lightness too."""
GREY, QUIET, INK = "#c9c9c9", "#666666", "#222222"
SIZE = (7.2, 4.0)
"""Inches."""
LEFT, RIGHT, BOTTOM, TOP = 0.085, 0.87, 0.13, 0.85
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
    lines, limits = table.reshape(S, L * H), scale(score, table)
    last = np.where(np.isfinite(lines[-1]), lines[-1], -np.inf)
    best = [int(k) for k in np.argsort(-last, kind="stable")[: len(COLOURS)] if np.isfinite(last[k])]
    with matplotlib.style.context(["default", style()]):  # whatever the reader has set
        figure = Figure(figsize=SIZE)
        axes = figure.add_axes((LEFT, BOTTOM, RIGHT - LEFT, TOP - BOTTOM))
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
        axes = figure.add_axes((LEFT, BOTTOM, RIGHT - LEFT, TOP - BOTTOM))
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
