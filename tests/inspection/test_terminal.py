"""Terminal text: tokens are printable in any encoding, strongest attention and tables show the numbers they were given."""

import json
import math

import numpy as np
import pytest

from inspection.terminal import (
    BLOCKS,
    JOINERS,
    SHADES,
    clearest_head,
    display_width,
    head_name,
    heat_map,
    printable,
    sparkline,
    strongest_attention,
    table,
    to_json,
    token_text,
)

NAN = math.nan
WORDS = [b"", b" Mia", b" the", b" fox", b" met", b" Tom", b".", b" She"]


def random_pattern(*shape: int) -> np.ndarray:
    """Causal, rows sum to 1."""
    scores = np.random.default_rng(0).exponential(size=shape) ** 3 * np.tril(np.ones(shape[-2:]))
    return (scores / scores.sum(axis=-1, keepdims=True)).astype(np.float32)


def test_token_text() -> None:
    assert token_text(b" She") == "·She" and token_text(b"") == "<end>"
    assert token_text(b"\n\t\r\x00\x1b[31m\x7f\xff") == r"\n\t\r\x00\x1b[31m\x7f\xff"
    assert token_text("\\é日\u202e\u200b\u0301".encode()) == r"\\é日\u202e\u200b" + "\N{DOTTED CIRCLE}\u0301"


@pytest.mark.parametrize(
    ("word", "mark", "width"),
    [("नमस्ते", "\u094d", 4), ("re\u0301", "\u0301", 2), ("می\u200cروم", "\u200c", 5), ("👩\u200d👧", "\u200d", 4)],
)
def test_marks_and_joiners_belong_to_the_character_before_them(word: str, mark: str, width: int) -> None:
    assert token_text(word.encode()) == word and display_width(word) == width
    alone = ascii(mark)[1:-1] if mark in JOINERS else f"\N{DOTTED CIRCLE}{mark}"
    assert token_text(f" {mark}".encode()) == f"·{alone}"


def test_shades_and_blocks_become_ascii_where_the_encoding_lacks_them() -> None:
    lines = [f"{SHADES} \x1b ", BLOCKS]
    assert printable(lines, "utf-8") == f"{SHADES} \\x1b\n{BLOCKS}"
    for encoding in ("ascii", "latin-1", "cp437", None):
        shades, blocks = printable(lines, encoding).split("\n")
        assert shades.isascii() and blocks.isascii() and len(set(shades[:5])) == 5 and len(set(blocks)) == 8


def test_strongest_attention_takes_the_maximum_of_each_query() -> None:
    pattern, names = random_pattern(2, 3, 9, 9), "abcdefghi"
    lines = iter(strongest_attention(pattern, [name.encode() for name in names], top=3))
    for layer, head in np.ndindex(2, 3):
        best = [(max((pattern[layer, head, i, j], j) for j in range(1, i)), i) for i in range(2, 9)]
        for (weight, j), i in sorted(best, reverse=True)[:3]:
            target = f'"{names[i]}" attends to "{names[j]}" {weight:.2f} ({i - j} back)'
            assert next(lines) == f"{head_name(layer, head)}  {target}"
    assert strongest_attention(random_pattern(1, 1, 2, 2), [b"a", b"b"]) == []


def test_clearest_head_attends_to_earlier_tokens() -> None:
    pattern = np.zeros((3, 2, 8, 8))
    pattern[0, :, :, 0] = 1
    pattern[1, 0], pattern[1, 1] = np.eye(8), random_pattern(8, 8)
    pattern[2, 1] = np.eye(8, k=-1)  # a previous-token head
    assert clearest_head(pattern) == (2, 1)


def test_heat_map_shows_each_weight() -> None:
    levels = len(SHADES) - 1
    pattern = np.tril(np.arange(64).reshape(8, 8) % (levels + 1)) / levels
    rows = heat_map(pattern, WORDS, 80)[1:9]
    for i, row in enumerate(rows):
        cells = row[15:]
        assert row.startswith(f"{i} {token_text(WORDS[i])} ")
        assert len(cells.rstrip()) == 2 * (i + 1) - (SHADES.index(cells[2 * i]) == 0), "later tokens are blank"
        assert [SHADES.index(cells[2 * j]) / levels for j in range(i + 1)] == pytest.approx(pattern[i, : i + 1])


def test_heat_map_fits_the_terminal() -> None:
    lines = heat_map(random_pattern(200, 200), [f" {k}日本語の長い名前".encode() for k in range(200)], width=80)
    assert max(map(display_width, lines)) <= 80
    assert lines[0] == f"the last {len(lines) - 3} of 200 tokens" and lines[-2].startswith("199 ")


def test_table_aligns_columns() -> None:
    rows = [("L0H0", 0.5, "+1.2!", "a"), ("L10H10", None, "-13.0", "bcd")]
    assert table(["head", "score", "change", "label"], rows) == [
        "head    score  change  label",
        "L0H0     0.50   +1.2!  a",
        "L10H10      -   -13.0  bcd",
    ]
    assert {display_width(line) for line in table(["token", "weight"], [("日本", 0.5), ("ab", 0.25)])} == {13}
    lines = table(["head", *(f"column {k}" for k in range(6))], [("L0H0", *map(float, range(6)))], width=40)
    assert all(len(line) <= 40 for line in lines)  # what does not fit continues below
    assert [line.split()[0] for line in lines if line] == ["head", "L0H0", "head", "L0H0"] and "5.00" in lines[-1]


def test_sparkline() -> None:
    assert sparkline(np.linspace(0, 1, 8), 0.0, 1.0) == BLOCKS
    assert sparkline([-5, NAN, 9], 0.0, 1.0) == f"{BLOCKS[0]} {BLOCKS[-1]}"
    assert sparkline([0, 1, 0, 1], 0.0, 1.0, width=2) == BLOCKS[4] * 2  # averaged


def test_json_has_finite_numbers_or_null() -> None:
    text = to_json({"a": np.float64(0.5), "b": [NAN, math.inf, 1], "d": (True, None, "\x1b[31m")})
    assert json.loads(text) == {"a": 0.5, "b": [None, None, 1], "d": [True, None, "\x1b[31m"]}
    assert text.isascii() and "\x1b" not in text
