"""Words and figures promise: what a head reads is said truly, in any terminal, for any token."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import warnings
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import image

from common.errors import CONFIG, DISK_OR_MEMORY, UserError
from inspection.plots import FORBIDDEN, drawable, head_grid, one_head
from inspection.terminal import (
    ASCII_SHADES,
    BLOCK_SHADES,
    clearest_head,
    head_name,
    heat_map,
    strongest,
    token_text,
)

ROOT = Path(__file__).parents[2]
WORDS = ["<|endoftext|>", " Mia", " the", " fox", " met", " Tom", ".", " She"]
AWKWARD = ["$x_1$", "_", "🦊", "日本", "\n", "\x1b[31m", "\\frac{", "$", "<&>", " ", "\u202e", "\ud800"]


def causal(*shape: int) -> np.ndarray:
    """Random weights: rows sum to 1, the future is 0."""
    scores = np.random.default_rng(0).exponential(size=shape) ** 3 * np.tril(np.ones(shape[-2:]))
    return (scores / scores.sum(axis=-1, keepdims=True)).astype(np.float32)


# words.py


def test_a_head_is_named_by_layer_and_number() -> None:
    assert head_name(0, 1) == "L0H1"


@pytest.mark.parametrize(
    ("raw", "encoding", "shown"),
    [
        (b" She", "utf-8", "·She"),
        (b" She", "ascii", "_She"),
        (b" She", None, "_She"),
        (b" She", "no-such-encoding", "_She"),
        (b"\n\t\r\x00\x1b[31m\x7f", "utf-8", r"\n\t\r\x00\x1b[31m\x7f"),
        (b"\xc3", "utf-8", r"\xc3"),
        ("é日".encode(), "utf-8", "é日"),
        ("é日".encode(), "latin-1", r"é\u65e5"),
        ("é🦊".encode(), "ascii", r"\xe9\U0001f98a"),
        ("\u202e\u200b\u0301".encode(), "utf-8", r"\u202e\u200b\u0301"),
        (b"a\\n", "utf-8", r"a\\n"),
        (b"", "utf-8", "<end>"),
    ],
)
def test_tokens_are_printable(raw: bytes, encoding: str | None, shown: str) -> None:
    assert token_text(raw, encoding) == shown


def test_spaces_can_stay_spaces() -> None:
    assert token_text(b" a b", space=" ") == " a b"


@given(st.binary(max_size=12), st.sampled_from(["utf-8", "ascii", "latin-1", "cp437", "koi8-r"]))
@settings(max_examples=200, deadline=None)
def test_no_token_can_drive_a_terminal(raw: bytes, encoding: str) -> None:
    shown = token_text(raw, encoding)
    assert shown.isprintable() and shown.encode(encoding) is not None


def test_the_strongest_readings_in_words() -> None:
    pattern = np.zeros((1, 2, 8, 8))
    pattern[:, :, :, 0] = 1  # everybody rests on the first token
    pattern[0, 1, 7, 1], pattern[0, 1, 5, 4], pattern[0, 1, 4, 3], pattern[0, 1, 7, 5] = 0.62, 0.5, 0.4, 0.3
    pattern[0, 1, 6, 6] = 0.99  # reading oneself is no reading
    lines = strongest(pattern, WORDS)
    assert [line for line in lines if line.startswith("L0H1")] == [
        'L0H1  " She" reads " Mia" 0.62 (6 back)',
        'L0H1  " Tom" reads " met" 0.50 (1 back)',
        'L0H1  " met" reads " fox" 0.40 (1 back)',
    ]
    assert len(strongest(pattern, WORDS, top=1)) == 2


def test_strongest_takes_the_largest_of_each_query() -> None:
    pattern, names = causal(2, 3, 9, 9), list("abcdefghi")
    lines = iter(strongest(pattern, names, top=3))
    for layer in range(2):
        for head in range(3):
            best = [(max((pattern[layer, head, i, j], j) for j in range(1, i)), i) for i in range(2, 9)]
            for (weight, j), i in sorted(best, reverse=True)[:3]:
                read = f'"{names[i]}" reads "{names[j]}" {weight:.2f} ({i - j} back)'
                assert next(lines) == f"{head_name(layer, head)}  {read}"


def test_very_short_texts_have_readings_too() -> None:
    assert strongest(np.ones((1, 1, 1, 1)), ["a"]) == ['L0H0  "a" reads itself 1.00']
    two = np.array([[[[1, 0], [0.75, 0.25]]]])
    assert strongest(two, ["a", "b"])[1] == 'L0H0  "b" reads "a" 0.75 (1 back)'


def test_the_clearest_head_reads_elsewhere_than_the_first_token_or_itself() -> None:
    pattern = np.zeros((3, 2, 8, 8))
    pattern[0, :, :, 0] = 1  # these rest on the first token
    pattern[1, 0], pattern[1, 1] = np.eye(8), causal(8, 8)
    pattern[2, 1] = np.eye(8, k=-1)  # reads the previous token
    assert clearest_head(pattern) == (2, 1)


def test_quotes_within_a_token_are_escaped() -> None:
    assert '"\\"" reads' in "\n".join(strongest(causal(1, 1, 4, 4), ["a", '"', '"', '"']))


@pytest.mark.parametrize(("encoding", "shades"), [("ascii", ASCII_SHADES), ("utf-8", BLOCK_SHADES)])
def test_the_map_shows_each_weight(encoding: str, shades: str) -> None:
    levels = len(shades) - 1
    pattern = np.tril(np.arange(64).reshape(8, 8) % (levels + 1)) / levels
    rows = heat_map(pattern, WORDS, 80, encoding)[1:9]
    for i, row in enumerate(rows):
        cells = row[15:]
        assert row.startswith(f"{i} ") and WORDS[i][:12] in row
        assert len(cells.rstrip()) == 2 * (i + 1) - (shades.index(cells[2 * i]) == 0), "the future is blank"
        assert [shades.index(cells[2 * j]) / levels for j in range(i + 1)] == pytest.approx(pattern[i, : i + 1])


@pytest.mark.parametrize("T", [1, 9, 64, 200])
@pytest.mark.parametrize("width", [10, 80, 200])
def test_the_map_fits_the_terminal(T: int, width: int) -> None:
    lines = heat_map(causal(T, T), [f"·{k}日本語の長い名前" for k in range(T)], width, "utf-8")
    wide = [len(line) + sum(c >= "\u3000" for c in line) for line in lines]  # these characters take two columns
    assert max(wide) <= max(width, 40)
    shown = sum("█" in line or "·" in line or "░" in line for line in lines) - 1
    if shown < T:
        assert lines[0].startswith(f"the last {shown} of {T} tokens")
    assert any(line.startswith(f"{T - 1} ") for line in lines), "the last token is there"


def test_columns_are_numbered() -> None:
    tens, units = heat_map(causal(25, 25), ["a"] * 25, 120)[:2]
    assert units[16:].replace(" ", "") == "0123456789012345678901234"
    assert [(k - 16) // 2 for k, c in enumerate(tens) if c != " "] == [10, 20] and tens.replace(" ", "") == "12"


PRINTER = """
import sys
import numpy as np
from inspection.terminal import heat_map, strongest, token_text
raw = [b"\\xc3\\xa9\\xe6\\x97\\xa5", b" a", b"\\x1b[31m", b"\\xff"]
texts = [token_text(token, sys.stdout.encoding) for token in raw]
weights = np.tril(np.ones((4, 4))) / np.arange(1, 5)[:, None]
print("\\n".join(strongest(weights[None, None], texts) + heat_map(weights, texts, 80, sys.stdout.encoding)))
assert "torch" not in sys.modules
"""


def test_a_terminal_without_unicode_shows_all() -> None:
    environment = {
        **os.environ,
        "LC_ALL": "C",
        "PYTHONIOENCODING": "",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
    }
    result = subprocess.run([sys.executable, "-c", PRINTER], cwd=ROOT, env=environment, capture_output=True, check=True)
    assert result.stdout.isascii() and b"_a" in result.stdout and b"\x1b" not in result.stdout


# figures.py


def texts_of(path: Path) -> list[str]:
    """All text in an SVG."""
    root = ElementTree.parse(path).getroot()
    return ["".join(element.itertext()) for element in root.iter("{http://www.w3.org/2000/svg}text")]


def test_the_grid_names_heads_tokens_and_axes(tmp_path: Path) -> None:
    head_grid(tmp_path / "grid.svg", causal(2, 3, 8, 8), WORDS, "what they read")
    texts = texts_of(tmp_path / "grid.svg")
    for text in ("what they read", "L0H0", "L1H2", "·Mia", "·She", "key: the token that is read"):
        assert text in texts
    assert any("query (row) reads key (column)" in text for text in texts)
    assert not any("the last" in text or "the first" in text for text in texts)


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    head_grid(tmp_path / "layers.svg", causal(9, 1, 70, 70), ["a"] * 70, "t")
    said = " ".join(texts_of(tmp_path / "layers.svg"))
    assert "the first 8 of 9 layers; the last 64 of 70 tokens; one token in" in said
    assert "L7H0" in said and "L8H0" not in said
    head_grid(tmp_path / "heads.svg", causal(1, 10, 3, 3), ["a"] * 3, "t")
    said = " ".join(texts_of(tmp_path / "heads.svg"))
    assert "the first 8 of 10 heads" in said and "token in" not in said
    assert "L0H7" in said and "L0H8" not in said
    one_head(tmp_path / "one.svg", causal(120, 120), [f"t{k}" for k in range(120)], "t", query=100)
    texts = texts_of(tmp_path / "one.svg")
    assert "the last 96 of 120 tokens" in " ".join(texts) and "t100" in texts and "t23" not in texts


def test_a_single_head_says_its_weights(tmp_path: Path) -> None:
    one_head(tmp_path / "one.svg", [[1, 0, 0], [0.25, 0.75, 0], [0, 0.004, 0.996]], ["a", "b", "c"], "t", query=2)
    texts = texts_of(tmp_path / "one.svg")
    assert ".25" in texts and ".75" in texts and ".00" not in texts
    framed = tmp_path / "plain.svg"
    one_head(framed, [[1, 0, 0], [0.25, 0.75, 0], [0, 0.004, 0.996]], ["a", "b", "c"], "t")
    assert "#c8102e" in (tmp_path / "one.svg").read_text() and "#c8102e" not in framed.read_text()


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_no_token_breaks_a_figure(tmp_path: Path, suffix: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a missing glyph is a warning
        one_head(tmp_path / f"one{suffix}", causal(12, 12), AWKWARD, "$a_b$ \x1b🦊", query=3)
        head_grid(tmp_path / f"grid{suffix}", causal(1, 2, 12, 12), AWKWARD, "\n".join(AWKWARD))
    if suffix == ".svg":
        assert {"$x_1$", "$", "\\U0001f98a", "\\n", "<&>", "·"} <= set(texts_of(tmp_path / "one.svg"))


def test_drawable_escapes_what_the_font_lacks() -> None:
    assert drawable(" é\n🦊") == "·é\\n\\U0001f98a"


def test_the_future_is_grey_and_zero_is_not(tmp_path: Path) -> None:
    """A head that reads the first token alone: yellow, dark blue, and grey where nobody may look."""
    pattern = np.zeros((6, 6))
    pattern[:, 0] = 1
    one_head(tmp_path / "one.png", pattern, list("abcdef"), "t")
    pixels = np.rint(image.imread(tmp_path / "one.png")[..., :3] * 255).astype(int).reshape(-1, 3)

    def share(colour: str | tuple[float, ...]) -> float:
        wanted = np.rint(np.array(matplotlib.colors.to_rgb(colour)) * 255)
        return float((abs(pixels - wanted).max(axis=1) <= 1).sum())

    cividis = matplotlib.colormaps["cividis"]
    read, unread, forbidden = share(cividis(1.0)), share(cividis(0.0)), share(FORBIDDEN)
    assert unread / read == pytest.approx(15 / 6, rel=0.1)  # 6 cells read, 15 not read, 15 that may not be
    assert forbidden / read == pytest.approx(15 / 6, rel=0.1)


def test_a_grid_is_quick_small_and_always_the_same(tmp_path: Path) -> None:
    pattern, names = causal(4, 4, 64, 64), [f" word{k}" for k in range(64)]
    head_grid(tmp_path / "warm-up.png", pattern, names, "t")
    begin = time.process_time()
    head_grid(tmp_path / "again.png", pattern, names, "t")
    assert time.process_time() - begin < 1.5
    first = (tmp_path / "warm-up.png").read_bytes()
    assert first == (tmp_path / "again.png").read_bytes() and first.startswith(b"\x89PNG")
    assert len(first) < 400_000
    assert b"matplotlib" not in first, "the library's version would change the bytes"
    for name in "ab":
        one_head(tmp_path / f"{name}.svg", pattern[0, 0], names, "t")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_one_token_and_one_head_are_enough(tmp_path: Path) -> None:
    head_grid(tmp_path / "grid.png", np.ones((1, 1, 1, 1)), ["a"], "t")
    one_head(tmp_path / "one.png", np.ones((1, 1)), ["a"], "t", query=0)


def test_settings_of_the_reader_neither_matter_nor_change(tmp_path: Path) -> None:
    head_grid(tmp_path / "plain.png", causal(1, 1, 4, 4), list("abcd"), "t")
    with matplotlib.rc_context({"text.usetex": True, "font.family": "serif", "axes.grid": True}):
        before = dict(matplotlib.rcParams)
        head_grid(tmp_path / "own.png", causal(1, 1, 4, 4), list("abcd"), "t")
        assert dict(matplotlib.rcParams) == before
    assert (tmp_path / "own.png").read_bytes() == (tmp_path / "plain.png").read_bytes()


def test_a_place_or_a_kind_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    for name, code in (("missing/one.png", DISK_OR_MEMORY), ("one.bmp", CONFIG), ("one", CONFIG)):
        with pytest.raises(UserError, match="one") as caught:
            one_head(tmp_path / name, np.ones((1, 1)), ["a"], "t")
        assert caught.value.exit_code == code


LAZY = """
import sys
from inspection import plots as figures
assert "matplotlib" not in sys.modules and "torch" not in sys.modules
figures.one_head(sys.argv[1], [[1.0]], ["a"], "t")
assert "matplotlib.pyplot" not in sys.modules
"""


def test_matplotlib_is_loaded_late_and_without_a_display(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "MPLBACKEND")}
    command = [sys.executable, "-c", LAZY, str(tmp_path / "one.png")]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
