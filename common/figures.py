"""Figures as PNG, SVG or PDF, in our own style whatever matplotlibrc says.

matplotlib is imported when a figure is drawn, and used without pyplot: no display, no global state. Characters that DejaVu
Sans lacks are drawn in fonts of the system. On one machine, the same figures have the same bytes.
"""

import io
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from common.errors import CONFIG, UserError, escape_control_chars
from common.files import write_atomic

ACCENT, GRAY, MUTED = "#c8102e", "#c9c9c9", "#666666"
FONT = "DejaVu Sans"  # comes with matplotlib
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "text.parse_math": False,  # a `$` in a token is a `$`
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "savefig.dpi": 110,
    "svg.fonttype": "none",
    "svg.hashsalt": "glassgpt",
}
# Without date and version, equal figures have equal bytes.
LEFT_OUT = {".png": ["Software"], ".svg": ["Date"], ".pdf": ["CreationDate", "Creator", "Producer"]}
_families: dict[str, str] = {}
"""The font family that has a character, or the empty string; of the characters that were looked up."""


@contextmanager
def figure(
    path: Path,
    title: str,
    note: str = "",
    size: Sequence[float] = (5.3, 2.9),
    margins: Sequence[float] = (0.7, 0.5, 1.2),
) -> Iterator[Any]:
    """matplotlib's Axes, of `size` inches, below a heading; the file is written after the body.

    The margins are left, below and right of the axes; the note is smaller than the title and below it. `UserError` for
    another suffix (exit code 2) and if the file cannot be written (6).
    """
    suffix = path.suffix.lower()
    if suffix not in LEFT_OUT:
        raise UserError(f"cannot draw {path}: the name must end in .png, .svg or .pdf", CONFIG)
    import matplotlib.style
    from matplotlib.figure import Figure

    left, bottom, right = margins
    lines = [drawable(line) for line in note.split("\n") if line]
    width, height = left + size[0] + right, bottom + size[1] + 0.75 + 0.16 * len(lines)
    title = drawable(title, int(9.5 * width))
    fonts = {"font.family": [FONT, *sorted({*_families.values()} - {FONT, ""})]}
    with matplotlib.style.context(["default", STYLE, fonts]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a bold font may lack a glyph
        figure = Figure(figsize=(width, height))
        axes = figure.add_axes((left / width, bottom / height, size[0] / width, size[1] / height))
        figure.text(0.15 / width, 1 - 0.12 / height, title, fontsize=12, weight="bold", va="top")
        figure.text(0.15 / width, 1 - 0.38 / height, "\n".join(lines), fontsize=8.5, color="#555555", va="top")
        yield axes
        data = io.BytesIO()
        figure.savefig(data, format=suffix[1:], metadata=dict.fromkeys(LEFT_OUT[suffix]))
    write_atomic(path, [data.getvalue()])


@contextmanager
def report_failure(path: Path) -> Iterator[None]:
    """Turn any exception of the body, which draws `path`, into one line on stderr: a figure does not end a training."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        print(escape_control_chars(f"cannot draw {path.name}: {reason}"), file=sys.stderr)


def drawable(text: str, length: int = 200) -> str:
    """At most `length` characters of `text`; those that no font has or that are invisible are escaped."""
    if new := {c for c in text if not c.isascii() and c.isprintable()} - _families.keys():
        _find_families(new)
    missing = {ord(c): c.encode("unicode_escape").decode() for c in set(text) if _families.get(c) == ""}
    text = escape_control_chars(text.translate(missing))
    return text if len(text) <= length else text[: length - 1] + "…"


def _find_families(characters: set[str]) -> None:
    """Look characters up in one font after another, until all are found."""
    from matplotlib.ft2font import FT2Font

    for family, file in _fonts():
        with suppress(OSError, RuntimeError):  # removed since it was listed, or damaged
            font = FT2Font(file)
            _families.update({c: family for c in characters - _families.keys() if font.get_char_index(ord(c))})
        if characters <= _families.keys():
            return
    _families.update(dict.fromkeys(characters - _families.keys(), ""))


def _fonts() -> Iterator[tuple[str, str]]:
    """Family and file of `FONT`, then of the fonts of the system, plain sans-serif ones first."""
    from matplotlib.font_manager import findSystemFonts, fontManager

    yield FONT, fontManager.findfont(FONT)
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # else it tells of families without the exact weight
    for path in sorted({*findSystemFonts()} - {entry.fname for entry in fontManager.ttflist}):
        with suppress(Exception):  # a font of bitmaps, or damaged; the others were installed since matplotlib looked
            fontManager.addfont(path)
    fonts = [entry for entry in fontManager.ttflist if "LastResort" not in entry.fname]  # it has boxes only
    fonts.sort(key=lambda e: (e.style != "normal", e.weight != 400, "Sans" not in e.name, e.name, e.fname))
    yield from ((entry.name, entry.fname) for entry in fonts)
