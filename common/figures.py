"""Figures as PNG, SVG or PDF, in our own style whatever matplotlibrc says.

matplotlib is imported when a figure is drawn, and used without pyplot: no display, no global state. Characters that DejaVu
Sans lacks are drawn in fonts of the system. On one machine, the same figures have the same bytes.
"""

import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from common.errors import CONFIG, UserError, escape_control_chars, warn
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
    from matplotlib.text import Text

    left, bottom, right = margins
    lines = [drawable(line) for line in note.split("\n") if line]
    width, height = left + size[0] + right, bottom + size[1] + 0.75 + 0.16 * len(lines)
    title = drawable(title, int(9.5 * width))
    with matplotlib.style.context(["default", STYLE]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a character that no font has is drawn as a box
        figure = Figure(figsize=(width, height))
        axes = figure.add_axes((left / width, bottom / height, size[0] / width, size[1] / height))
        figure.text(0.15 / width, 1 - 0.12 / height, title, fontsize=12, weight="bold", va="top")
        figure.text(0.15 / width, 1 - 0.38 / height, "\n".join(lines), fontsize=8.5, color="#555555", va="top")
        yield axes
        texts = [text for text in figure.findobj(Text) if not text.get_text().isascii()]
        families = _find_families({c for text in texts for c in text.get_text() if not c.isspace()})
        for text in texts:
            text.set_fontfamily(families)
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
        warn(f"cannot draw {path.name}: {reason}")


def drawable(text: str, length: int = 200) -> str:
    """At most `length` characters of `text`; those that are invisible are escaped."""
    text = escape_control_chars(text)
    return text if len(text) <= length else text[: length - 1] + "…"


def _find_families(characters: set[str]) -> list[str]:
    """`FONT`, then the families of system fonts with characters that no earlier one has, plain sans-serif ones first."""
    from matplotlib.font_manager import findfont, findSystemFonts, fontManager
    from matplotlib.ft2font import FT2Font

    families, missing = [FONT], characters - {*map(chr, FT2Font(findfont(FONT)).get_charmap())}
    files = sorted(findSystemFonts(), key=lambda f: ("Sans" not in f, "Regular" not in f, f)) if missing else []
    for file in files:
        with suppress(Exception):  # a font of bitmaps, or damaged
            if missing and (found := missing & {*map(chr, FT2Font(file).get_charmap())}):
                fontManager.addfont(file)  # it may have been installed after matplotlib looked for fonts
                families.append(fontManager.ttflist[-1].name)
                missing -= found
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # else it tells of families without the exact weight
    return families
