"""Attention and head scores as figures, PNG, SVG or PDF by the suffix of the path.

`draw_figures` draws all figures of a run; `head_grid`, `one_head`, `score_timeline` and `phase_change` draw one each from
arrays: they raise `UserError` for another suffix (exit code 2) and if the file cannot be written (6).
Every size is given in inches: a layout that matplotlib finds by itself takes longer than the drawing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
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

MAX_LAYERS = MAX_HEADS = 8  # in a grid: the first ones
GRID_TOKENS, HEAD_TOKENS = 64, 60  # in a grid, and in a plot of one head: the last ones
LABEL_LENGTH, LABEL_INCHES = 14, 0.1  # characters of a token's label, and inches between two
GAP_X, GAP_Y = 0.1, 0.3  # inches between two patterns
FUTURE = "#e3e3e3"  # cells that causality excludes: gray, which is not a color of the scale
SERIES_COLORS = ("#00467f", "#c8102e", "#8a6d00")  # they differ in lightness too
CLEAR_RISE = 0.2  # of a score that has at least doubled, for the plot of the phase change
Guard = Callable[[Path], AbstractContextManager[object]]
Series = tuple[str, Sequence[int], ArrayLike]
"""A line over the training steps: name, steps, values."""


# All figures of a run


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
    """All heads on one text."""
    text = find_text(run.read(step), name, f"step {step} of {run.folder}")
    head_grid(path, text.pattern(), text.token_bytes, f"step {step}: {text.name}")


def _draw_head(path: Path, run: RunFiles, step: int, name: str) -> None:
    """The head that the findings name, on a text where it matters; else the clearest head on a held-out text."""
    file, finding = run.read(step), named_finding(run)
    texts = {text.name: text for text in reversed(file.texts)}
    held_out = name or next((text.name for text in file.texts if text.name.startswith("held-out")), "")
    text, query, note = find_text(file, held_out, f"step {step} of {run.folder}"), None, ""
    layer, head = clearest_head(text.pattern())
    if finding and not name:
        (layer, head), info = finding["head"], score_info(finding["score"])
        note = "framed: where ablating it raises the loss of the next token most"
        places = [(example["text"], example["position"] - 1, note) for example in finding["examples"]]
        places += [(f"{info.name.removeprefix(ANTECEDENT)} 1", -1, info.title)] * info.name.startswith(ANTECEDENT)
        places += [("repeat 1", None, info.title)] * (info.texts == REPEATS) + [(text.name, None, "")]
        name, query, note = next(place for place in places if place[0] in texts)
        text = texts[name]
    query = None if query is None else query % len(text.tokens)
    end = len(text.tokens) if query is None else query + 2  # with the token that it predicts, if there is one
    pattern, title = text.pattern(layer)[0, head, :end, :end], f"{head_name(layer, head)} at step {step}: {text.name}"
    one_head(path, pattern, text.token_bytes[:end], title, query, note)


def _draw_timeline(path: Path, run: RunFiles, score: str) -> None:
    """The score, by default that of the finding."""
    (steps, scores), finding = run.head_scores, named_finding(run)
    name = match_name(score, scores, "score", str(run.folder)) if score else next(iter(scores), "")
    if finding and not score and finding["score"] in scores:
        name = finding["score"]
    if name:
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
        for text in run.read(step).texts:
            n = (len(text.tokens) - 1) // 2
            if text.name == "repeat 1" and n >= 2:
                losses[step] = float(text.loss[n + 1 :].mean())  # loss[k] is of token k + 1
    return ("loss on repeats", list(losses), list(losses.values())) if len(losses) > 1 else None


# Patterns


def head_grid(path: Path | str, pattern: ArrayLike, tokens: Sequence[bytes], title: str) -> None:
    """All heads: a row for each layer, a column for each head.

    At most 8 layers, 8 heads and the last 64 tokens are shown; the line below the title says what is left out.
    `pattern` is (L, H, T, T), `tokens` the bytes of T tokens.
    """
    pattern = np.asarray(pattern)
    L, H, T, _ = pattern.shape
    pattern = pattern[:MAX_LAYERS, :MAX_HEADS, -GRID_TOKENS:, -GRID_TOKENS:]
    rows, columns, shown, _ = pattern.shape
    side = float(np.clip(shown * LABEL_INCHES, 1.5, min(3.0, 13 / max(rows, columns))))
    notes = [f"the first {rows} of {L} layers"] * (rows < L) + [f"the first {columns} of {H} heads"] * (columns < H)
    notes += [f"the last {shown} of {T} tokens"] * (shown < T)
    with _pattern_figure(Path(path), pattern, side, _labels(tokens[-shown:], side), (title, notes)) as axes:
        for row, column in np.ndindex(rows, columns):
            x, y = column * (side + GAP_X) + side / 2, row * (side + GAP_Y) - 0.06
            axes.text(x, y, head_name(row, column), ha="center", va="bottom")


def one_head(
    path: Path | str, pattern: ArrayLike, tokens: Sequence[bytes], title: str, query: int | None = None, note: str = ""
) -> None:
    """One head (T, T), large: at most the last 60 tokens. The row `query`, 0 to T - 1, is framed."""
    T = len(np.asarray(pattern))
    pattern = np.asarray(pattern)[-HEAD_TOKENS:, -HEAD_TOKENS:]
    shown = len(pattern)
    row = -1 if query is None else query - (T - shown)
    side = float(np.clip(shown * 0.34, 2.4, 6.0))
    labels = _labels(tokens[-shown:], side, max(row, 0))
    heading = title, [note] * bool(note) + [f"the last {shown} of {T} tokens"] * (shown < T)
    with _pattern_figure(Path(path), pattern[None, None], side, labels, heading) as axes:
        if row >= 0:
            x, y = np.array([[0, row + 1, row + 1, 0, 0], [row, row, row + 1, row + 1, row]]) * side / shown
            axes.plot(x, y, color=ACCENT, linewidth=1.6, clip_on=False)
            axes.texts[list(labels).index(row)].set(color=ACCENT, weight="bold")


def _labels(tokens: Sequence[bytes], side: float, keep: int = 0) -> dict[int, str]:
    """A label for each position that has one on an axis of `side` inches: all, or every n-th, among them `keep`."""
    every = math.ceil(len(tokens) * LABEL_INCHES / side)
    texts = [token_text(token) for token in tokens]
    drawable("".join(texts))  # one search for fonts instead of one for each token
    return {k: drawable(texts[k], LABEL_LENGTH) for k in range(keep % every, len(tokens), every)}


@contextmanager
def _pattern_figure(
    path: Path, pattern: NDArray[Any], side: float, labels: Mapping[int, str], heading: tuple[str, list[str]]
) -> Iterator[Axes]:
    """A figure of patterns (rows, columns, T, T), each `side` inches wide, on one pair of axes measured in inches."""
    rows, columns, T, _ = pattern.shape
    title, notes = heading
    if len(labels) > 1 and (every := sorted(labels)[1] - sorted(labels)[0]) > 1:
        notes = [*notes, f"one token in {every} is labeled"]
    note = "row: query, column: key; gray: later tokens, masked\n" + "; ".join(notes)
    room = 0.5 + 0.07 * max(map(display_width, labels.values()))
    width, height = columns * (side + GAP_X) - GAP_X, rows * (side + GAP_Y) - GAP_Y
    margins = room, room, max(1.0, 5.2 - width - room)
    with figure(path, title, note, (width, height), margins) as axes:
        import matplotlib

        colors = matplotlib.colormaps["cividis"].with_extremes(bad=FUTURE)
        for row in range(rows):  # ticks of axes would take most of the time
            for k, label in labels.items():
                y = row * (side + GAP_Y) + (k + 0.5) * side / T
                axes.text(-0.03, y, label, ha="right", va="center", fontsize=6.5)
        for column in range(columns):
            for k, label in labels.items():
                x = column * (side + GAP_X) + (k + 0.5) * side / T
                axes.text(x, height + 0.03, label, ha="center", va="top", rotation=90, fontsize=6.5)
        for row, column in np.ndindex(rows, columns):
            x, y = column * (side + GAP_X), row * (side + GAP_Y)
            causal = np.ma.masked_array(pattern[row, column], mask=~np.tri(T, dtype=bool))
            axes.imshow(colors(causal, bytes=True), extent=(x, x + side, y + side, y), interpolation="nearest")
        scale = np.linspace(1, 0, 256)[:, None]
        axes.imshow(scale, cmap=colors, extent=(width + 0.2, width + 0.32, 1.5, 0), clip_on=False)
        for value in (0, 0.25, 0.5, 0.75, 1):
            axes.text(width + 0.36, 1.5 * (1 - value), f"{value:.2f}", va="center", fontsize=7)
        axes.text(width + 0.75, 0.75, "attention weight", rotation=90, va="center")
        axes.text(0.1 - room, height / 2, "query: the token that attends", rotation=90, va="center")
        axes.text(width / 2, height + room - 0.1, "key: the token attended to", ha="center")
        axes.set(xlim=(0, width), ylim=(height, 0))
        axes.set_axis_off()
        yield axes


# Series


def score_timeline(path: Path | str, steps: Sequence[int], values: NDArray[np.float32], score: str, title: str) -> None:
    """One score (S, L, H) over S steps, a line for each head; the three that end highest are labeled, the others gray."""
    values = np.asarray(values, dtype=np.float64)
    S, L, H = values.shape
    lines, last = values.reshape(S, L * H), values[-1].ravel()
    best = [int(k) for k in np.argsort(-last) if np.isfinite(last[k])][: len(SERIES_COLORS)]  # nan is last
    marker: dict[str, Any] = {"marker": "o" if S == 1 else None, "markersize": 5}
    others = f"; gray: the other {L * H - len(best)} heads" if len(best) < L * H else ""
    with figure(Path(path), title, score_info(score).title + others) as axes:
        axes.plot(steps, np.delete(lines, best, axis=1), color=GRAY, linewidth=1.0, **marker)
        for order, (k, color) in enumerate(zip(best, SERIES_COLORS, strict=False)):
            label = f"{head_name(*divmod(k, H))} {last[k]:.2f}"
            axes.plot(steps, lines[:, k], color=color, linewidth=1.8, label=label, zorder=5 - order, **marker)
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
        axes.legend(
            lines,
            [name for name, _, _ in (loss, *scores)],
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncols=3,
            handlelength=2,
        )


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
