"""Attention and head scores as figures, PNG, SVG or PDF by the suffix of the path.

`draw_figures` draws all figures of a run; `draw_patterns`, `draw_patching`, `score_timeline` and `phase_change` draw one each
from arrays: they raise `UserError` for another suffix (exit code 2) and if the file cannot be written (6).
Every size is given in inches: a layout that matplotlib finds by itself takes longer than the drawing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from common.figures import ACCENT, GRAY, MUTED, drawable, figure
from inspection.findings import ATTENTION_THRESHOLD
from inspection.head_scores import ANTECEDENT, REPEATS, score_info
from inspection.run_reader import RunFiles, best_head, find_text, match_name
from inspection.terminal import clearest_head, display_width, head_name, token_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from inspection.patching import PatchingResult

MAX_LAYERS = MAX_HEADS = 8  # in a grid: the first ones
MAX_TOKENS = 64  # the last ones
LABEL_LENGTH, LABEL_INCHES = 14, 0.1  # characters of a token's label, and inches between two
GAP_X, GAP_Y = 0.1, 0.3  # inches between two patterns
FUTURE = "#e3e3e3"  # cells that causality excludes: gray, which is not a color of the scale
SERIES_COLORS = ("#00467f", "#c8102e", "#8a6d00")  # they differ in lightness too
CLEAR_RISE = 0.2  # of a score that has at least doubled, for the plot of the phase change
Guard = Callable[[Path], AbstractContextManager[object]]
Series = tuple[str, Sequence[int], ArrayLike]  # A line over the training steps: name, steps, values.


def draw_figures(
    run: RunFiles, folder: Path, suffix: str, step: int, text: str = "", score: str = "", guard: Guard = nullcontext
) -> list[Path]:
    """Draw `attention`, `head`, `timeline` and `phase_change`, as far as the run has the data; return their paths.

    By default the timeline is that of the finding's score, and all heads are shown on the model's sample.
    Each figure is drawn within `guard`: after `report_failure` of one, the others are drawn.
    """
    drawings: dict[str, Callable[[Path], None]] = {
        "attention": lambda path: _draw_grid(path, run, step, text),
        "head": lambda path: _draw_head(path, run, step, text),
        "timeline": lambda path: _draw_timeline(path, run, score),
        "phase_change": lambda path: _draw_phase_change(path, run),
    }
    paths: list[Path] = []
    for stem, draw in drawings.items():
        path = folder / f"{stem}.{suffix}"
        with guard(path):
            draw(path)
            paths += [path] * path.is_file()
    return paths


def _draw_grid(path: Path, run: RunFiles, step: int, name: str) -> None:
    text = find_text(run.read(step), name, f"step {step} of {run.folder}")
    draw_patterns(path, text.pattern(), text.token_bytes, f"step {step}: {text.name}")


def _draw_head(path: Path, run: RunFiles, step: int, name: str) -> None:
    """The head that the findings name, on a text where it matters; else the clearest head on a held-out text."""
    file, finding, query, note = run.read(step), None if name else named_finding(run), None, ""
    if not name:
        places = _places(finding) if finding else []
        places += [(text.name, None, "") for text in file.texts if text.name.startswith("held-out")]
        names = {text.name for text in file.texts}
        name, query, note = next((place for place in places if place[0] in names), ("", None, ""))
    text = find_text(file, name, f"step {step} of {run.folder}")
    layer, head = finding["head"] if finding else clearest_head(text.pattern())
    query = None if query is None else query % len(text.tokens)
    end = len(text.tokens) if query is None else query + 2  # with the token that it predicts, if there is one
    pattern, title = text.pattern(layer)[:, [head], :end, :end], f"{head_name(layer, head)} at step {step}: {text.name}"
    draw_patterns(path, pattern, text.token_bytes[:end], title, note, query)


def _places(finding: dict[str, Any]) -> list[tuple[str, int | None, str]]:
    """Where a finding's head matters, the best place first: a text, a query to frame (-1: the last token), and a note."""
    info = score_info(finding["score"])
    note = "framed: where ablating it raises the loss of the next token most"
    places: list[tuple[str, int | None, str]] = []
    places += [(example["text"], example["position"] - 1, note) for example in finding["examples"]]
    if info.name.startswith(ANTECEDENT):
        places.append((f"{info.name.removeprefix(ANTECEDENT)} 1", -1, info.title))
    if info.texts == REPEATS:
        places.append(("repeat 1", None, info.title))
    return places


def _draw_timeline(path: Path, run: RunFiles, score: str) -> None:
    (steps, scores), finding = run.head_scores, named_finding(run)
    name = match_name(score, scores, "score", str(run.folder)) if score else next(iter(scores), "")
    if finding and not score and finding["score"] in scores:
        name = finding["score"]
    if name and len(steps) > 1:
        score_timeline(path, steps, scores[name], name, f"{run.folder.name}: {name}")


def _draw_phase_change(path: Path, run: RunFiles) -> None:
    """Loss and scores if a score formed; else a figure of an earlier end of the run is removed."""
    (steps, scores), loss, lines = run.head_scores, repeats_loss(run), []
    for name in ("induction", "previous_token"):
        if name in scores and (head := best_head(name, scores[name][-1])):
            lines.append((f"{name} score of {head_name(*head)}", steps, scores[name][:, head[0], head[1]]))
    if loss and len(lines) == 2 and any(has_formed(values) for *_, values in lines):
        phase_change(path, loss, lines, f"{run.folder.name}: loss and head scores")
    else:
        path.unlink(missing_ok=True)


def has_formed(values: NDArray[np.float32]) -> bool:
    """Whether a score rose to `ATTENTION_THRESHOLD`, or doubled and rose by `CLEAR_RISE`, from its first to its last step."""
    first, last = values[np.isfinite(values)][[0, -1]]
    return bool(first < ATTENTION_THRESHOLD <= last or last >= max(2 * first, first + CLEAR_RISE))


def named_finding(run: RunFiles) -> dict[str, Any] | None:
    """The first finding that is supported, else the first, with the `examples` of the run."""
    results = run.findings or {"findings": []}
    findings = sorted(results["findings"], key=lambda finding: not finding["is_supported"])
    return findings[0] | {"examples": results.get("examples", [])} if findings else None


def repeats_loss(run: RunFiles) -> Series | None:
    """Mean loss, in nats/token, on the second copy of repeated random tokens, without the copy's first token."""
    losses: dict[int, float] = {}
    for step in run.steps:
        for text in file.texts if (file := run.read_intact(step)) else ():
            n = (len(text.tokens) - 1) // 2
            if text.name == "repeat 1" and n >= 2:
                losses[step] = float(text.loss[n + 1 :].mean())  # loss[k] is of token k + 1
    return ("loss on repeats", list(losses), list(losses.values())) if len(losses) > 1 else None


def draw_patterns(
    path: Path | str, pattern: ArrayLike, tokens: Sequence[bytes], title: str, note: str = "", query: int | None = None
) -> None:
    """Patterns (L, H, T, T) on T tokens: a row for each layer, a column for each head; a single head is drawn larger.

    At most 8 layers, 8 heads and the last 64 tokens are shown; the lines below the title say what is left out.
    The row `query`, 0 to T - 1, is framed.
    """
    L, H, *_ = np.shape(pattern)
    shown = np.asarray(pattern)[:MAX_LAYERS, :MAX_HEADS, -MAX_TOKENS:, -MAX_TOKENS:]
    rows, columns, T, _ = shown.shape
    notes = ["row: query, column: key; gray: later tokens, masked", note]
    notes += [f"the first {rows} of {L} layers, {columns} of {H} heads"] * ((rows, columns) != (L, H))
    notes += [f"the last {T} of {len(tokens)} tokens"] * (len(tokens) > T)
    row = -1 if query is None else query - (len(tokens) - T)
    side = float(np.clip(0.1 * T, 1.5, min(3.0, 13 / max(rows, columns))))
    if rows * columns == 1:
        side = float(np.clip(0.34 * T, 2.4, 6.0))
    every = math.ceil(T * LABEL_INCHES / side)
    labels = {k: drawable(token_text(tokens[k - T]), LABEL_LENGTH) for k in range(max(row, 0) % every, T, every)}
    lefts, tops = [k * (side + GAP_X) for k in range(columns)], [k * (side + GAP_Y) for k in range(rows)]
    width, height, room = lefts[-1] + side, tops[-1] + side, 0.5 + 0.07 * max(map(display_width, labels.values()))
    margins = room, room, max(1.0, 5.2 - width - room)
    with figure(Path(path), title, "\n".join(notes), (width, height), margins) as axes:
        axes.set(xlim=(0, width), ylim=(height, 0))
        axes.set_axis_off()
        _draw_cells(axes, shown, side, lefts, tops)
        for k, label in labels.items():  # ticks of axes would take most of the time
            place, style = (k + 0.5) * side / T, {"fontsize": 6.5, "color": ACCENT if k == row else "black"}
            for top in tops:
                axes.text(-0.03, top + place, label, ha="right", va="center", **style)
            for left in lefts:
                axes.text(left + place, height + 0.03, label, ha="center", va="top", rotation=90, **style)
        if row >= 0:
            x, y = np.array([[0, row + 1, row + 1, 0, 0], [row, row, row + 1, row + 1, row]]) * side / T
            axes.plot(x, y, color=ACCENT, linewidth=1.6, clip_on=False)
        axes.text(0.1 - room, height / 2, "query: the token that attends", rotation=90, va="center")
        axes.text(width / 2, height + room - 0.1, "key: the token attended to", ha="center")


def _draw_cells(axes: Axes, patterns: NDArray[Any], side: float, lefts: list[float], tops: list[float]) -> None:
    """Patterns (rows, columns, T, T) as squares of `side` inches at these left and upper edges, and the scale of colors."""
    import matplotlib
    from matplotlib.cm import ScalarMappable

    rows, columns, T, _ = patterns.shape
    colors = matplotlib.colormaps["cividis"].with_extremes(bad=FUTURE)
    for row, column in np.ndindex(rows, columns):
        left, top = lefts[column], tops[row]
        cells = np.ma.masked_array(patterns[row, column], mask=~np.tri(T, dtype=bool))
        extent = (left, left + side, top + side, top)
        axes.imshow(colors(cells, bytes=True), extent=extent, interpolation="nearest")
        if rows * columns > 1:
            axes.text(left + side / 2, top - 0.06, head_name(row, column), ha="center", va="bottom")
    width, height = lefts[-1] + side, tops[-1] + side
    scale = axes.inset_axes((1 + 0.2 / width, 1 - 1.5 / height, 0.12 / width, 1.5 / height))
    scale.figure.colorbar(ScalarMappable(cmap=colors), cax=scale, label="attention weight")


def draw_patching(path: Path, patching: PatchingResult, token_bytes: Callable[[int], bytes], title: str) -> None:
    """The share of the logit difference that comes back: by layer and position, and by head, each above its control.

    At most the last 64 tokens are shown.
    """
    pairs = zip(patching.clean_tokens, patching.corrupt_tokens, strict=True)
    words = [[drawable(token_text(token_bytes(t)), LABEL_LENGTH) for t in dict.fromkeys(pair)] for pair in pairs]
    labels, heads = [" / ".join(pair) for pair in words], [f"H{head}" for head in range(patching.heads.shape[1])]
    control = "control: from texts with random tokens where the two differ"
    panels = [
        ("residual stream before each layer (rows), at one position (columns)", patching.residual, labels),
        (control, patching.residual_control, labels),
        ("output of each head (columns) of each layer (rows), at all positions", patching.heads, heads),
        (control, patching.heads_control, heads),
    ]
    cell, L = 0.22, len(patching.heads)
    rooms = [0.5 + 0.07 * max(map(display_width, names)) for *_, names in panels]
    height = sum(rooms) + len(panels) * L * cell
    width, top = max(4.5, cell * min(MAX_TOKENS, max(len(labels), len(heads)))), height - 0.2
    note = "1 (blue): all of it comes back, 0 (white): nothing, below 0 (red): it falls; clipped to -1 to 1"
    with figure(path, title, note, (width, height), (0.5, 0.1, 0.6)) as axes:
        axes.set(xlim=(0, width), ylim=(0, height))
        axes.set_axis_off()
        for (name, shares, names), room in zip(panels, rooms, strict=True):
            shown = shares[:, -MAX_TOKENS:]
            columns = shown.shape[1]
            panel = axes.inset_axes((0, top - L * cell, columns * cell, L * cell), transform=axes.transData)
            panel.imshow(shown, cmap="RdBu", vmin=-1, vmax=1, aspect="auto", interpolation="nearest")
            panel.set_xticks(range(columns), names[-columns:], rotation=90, fontsize=6.5)
            panel.set_yticks(range(L), [f"L{layer}" for layer in range(L)], fontsize=6.5)
            axes.text(0, top + 0.06, name, va="bottom")
            top -= L * cell + room


def score_timeline(path: Path | str, steps: Sequence[int], values: NDArray[np.float32], score: str, title: str) -> None:
    """One score (S, L, H) over S steps, a line for each head; the three that end highest are labeled, the others gray."""
    values = np.asarray(values, dtype=np.float64)
    S, L, H = values.shape
    lines, last = values.reshape(S, L * H), values[-1].ravel()
    best = [int(k) for k in np.argsort(-last) if np.isfinite(last[k])][: len(SERIES_COLORS)]  # nan is last
    others = f"; gray: the other {L * H - len(best)} heads" if len(best) < L * H else ""
    with figure(Path(path), title, score_info(score).title + others) as axes:
        axes.plot(steps, np.delete(lines, best, axis=1), color=GRAY, linewidth=1.0)
        for order, (k, color) in enumerate(zip(best, SERIES_COLORS, strict=False)):
            label = f"{head_name(*divmod(k, H))} {last[k]:.2f}"
            axes.plot(steps, lines[:, k], color=color, linewidth=1.8, label=label, zorder=5 - order)
        _style_axes(axes, steps, score_range(score, values), score)
        if best:
            axes.legend(loc="upper left", bbox_to_anchor=(1, 1), labelcolor="linecolor", handlelength=1)


def phase_change(path: Path | str, loss: Series, scores: Sequence[Series], title: str) -> None:
    """The loss (left axis) with the scores of an induction head and a previous-token head (right axis, 0 to 1).

    As a model learns to continue repeated sequences, its loss falls while its induction head forms; a previous-token
    head forms before or with it (Olsson et al. 2022, "Argument 1"). The loss may have other steps than the scores.
    """
    highest = float(np.nanmax(np.asarray(loss[2], dtype=np.float64), initial=0.0)) or 1.0
    with figure(Path(path), title) as axes:
        right = axes.twinx()
        lines = axes.plot(*loss[1:], color=MUTED, linewidth=1.6, linestyle="--")
        for (_, steps, values), color in zip(scores, SERIES_COLORS, strict=False):
            lines += right.plot(steps, values, color=color, linewidth=1.8)
        steps = [step for _, steps, _ in (loss, *scores) for step in steps]
        _style_axes(axes, steps, (0.0, highest), f"{loss[0]} (nats/token)")
        _style_axes(right, steps, (0.0, 1.0), "score")
        right.spines["right"].set_visible(True)
        names = [name for name, _, _ in (loss, *scores)]
        axes.legend(lines, names, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, handlelength=2)


def score_range(name: str, values: ArrayLike) -> tuple[float, float]:
    """The lowest and highest value to draw a score between; without a bound, up to the largest value."""
    info = score_info(name)
    largest = float(np.nanmax(np.asarray(values, dtype=np.float64), initial=0.0)) or 1.0
    return info.low, largest if info.high is None else info.high


def _style_axes(axes: Axes, steps: Sequence[int], limits: tuple[float, float], name: str) -> None:
    low, high = limits
    room = 0.03 * (high - low)
    axes.set(xlim=(min(steps), max(*steps, min(steps) + 1)), ylim=(low - room, high + room))
    axes.set(xlabel="step", ylabel=drawable(name))
    axes.axhline(0, color=GRAY, linewidth=0.6, zorder=0)
