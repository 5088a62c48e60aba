"""Terminal text: tokens are printable in any encoding, strongest attention and tables show the numbers they were given."""

from __future__ import annotations

import csv
import io
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inspection.terminal import (
    ASCII_BLOCKS,
    ASCII_SHADES,
    BLOCK_SHADES,
    BLOCKS,
    Terminal,
    clearest_head,
    display_width,
    head_name,
    heat_map,
    interval,
    number,
    paragraph,
    sparkline,
    strongest_attention,
    table,
    to_csv,
    to_json,
    token_text,
)

NAN = math.nan
WORDS = ["<|endoftext|>", " Mia", " the", " fox", " met", " Tom", ".", " She"]


def random_pattern(*shape: int) -> np.ndarray:
    """Causal, rows sum to 1."""
    scores = np.random.default_rng(0).exponential(size=shape) ** 3 * np.tril(np.ones(shape[-2:]))
    return (scores / scores.sum(axis=-1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize(
    ("raw", "encoding", "expected"),
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
def test_token_text(raw: bytes, encoding: str | None, expected: str) -> None:
    assert token_text(raw, encoding) == expected


@given(st.binary(max_size=12), st.sampled_from(["utf-8", "ascii", "latin-1", "cp437", "koi8-r"]))
@settings(max_examples=200, deadline=None)
def test_any_token_is_printable_in_any_encoding(raw: bytes, encoding: str) -> None:
    text = token_text(raw, encoding)
    assert text.isprintable() and text.encode(encoding) is not None


def test_strongest_attention_skips_first_token_and_itself() -> None:
    pattern = np.zeros((1, 2, 8, 8))
    pattern[:, :, :, 0] = 1
    pattern[0, 1, 7, 1], pattern[0, 1, 5, 4], pattern[0, 1, 4, 3], pattern[0, 1, 7, 5] = 0.62, 0.5, 0.4, 0.3
    pattern[0, 1, 6, 6] = 0.99
    lines = strongest_attention(pattern, WORDS)
    assert [line for line in lines if line.startswith("L0H1")] == [
        'L0H1  " She" attends to " Mia" 0.62 (6 back)',
        'L0H1  " Tom" attends to " met" 0.50 (1 back)',
        'L0H1  " met" attends to " fox" 0.40 (1 back)',
    ]
    assert len(strongest_attention(pattern, WORDS, top=1)) == 2


def test_strongest_attention_takes_the_maximum_of_each_query() -> None:
    pattern, names = random_pattern(2, 3, 9, 9), list("abcdefghi")
    lines = iter(strongest_attention(pattern, names, top=3))
    for layer, head in np.ndindex(2, 3):
        best = [(max((pattern[layer, head, i, j], j) for j in range(1, i)), i) for i in range(2, 9)]
        for (weight, j), i in sorted(best, reverse=True)[:3]:
            target = f'"{names[i]}" attends to "{names[j]}" {weight:.2f} ({i - j} back)'
            assert next(lines) == f"{head_name(layer, head)}  {target}"


def test_strongest_attention_of_short_texts_and_quotes() -> None:
    assert strongest_attention(np.ones((1, 1, 1, 1)), ["a"]) == ['L0H0  "a" attends to itself 1.00']
    two = np.array([[[[1, 0], [0.75, 0.25]]]])
    assert strongest_attention(two, ["a", "b"])[1] == 'L0H0  "b" attends to "a" 0.75 (1 back)'
    assert '"\\"" attends to' in "\n".join(strongest_attention(random_pattern(1, 1, 4, 4), ["a", '"', '"', '"']))


def test_clearest_head_attends_to_earlier_tokens() -> None:
    pattern = np.zeros((3, 2, 8, 8))
    pattern[0, :, :, 0] = 1
    pattern[1, 0], pattern[1, 1] = np.eye(8), random_pattern(8, 8)
    pattern[2, 1] = np.eye(8, k=-1)  # a previous-token head
    assert clearest_head(pattern) == (2, 1)


@pytest.mark.parametrize(("encoding", "shades"), [("ascii", ASCII_SHADES), ("utf-8", BLOCK_SHADES)])
def test_heat_map_shows_each_weight(encoding: str, shades: str) -> None:
    levels = len(shades) - 1
    pattern = np.tril(np.arange(64).reshape(8, 8) % (levels + 1)) / levels
    rows = heat_map(pattern, WORDS, Terminal(encoding, 80))[1:9]
    for i, row in enumerate(rows):
        cells = row[15:]
        assert row.startswith(f"{i} ") and WORDS[i][:12] in row
        assert len(cells.rstrip()) == 2 * (i + 1) - (shades.index(cells[2 * i]) == 0), "later tokens are blank"
        assert [shades.index(cells[2 * j]) / levels for j in range(i + 1)] == pytest.approx(pattern[i, : i + 1])


@pytest.mark.parametrize("T", [1, 9, 64, 200])
@pytest.mark.parametrize("width", [10, 80, 200])
def test_heat_map_fits_the_terminal(T: int, width: int) -> None:
    lines = heat_map(random_pattern(T, T), [f"·{k}日本語の長い名前" for k in range(T)], Terminal("utf-8", width))
    assert max(map(display_width, lines)) <= max(width, 40)
    shown = sum("█" in line or "·" in line or "░" in line for line in lines) - 1
    assert shown == T or lines[0] == f"the last {shown} of {T} tokens"
    assert any(line.startswith(f"{T - 1} ") for line in lines)


def test_heat_map_columns_are_numbered() -> None:
    numbers = heat_map(random_pattern(25, 25), ["a"] * 25, Terminal(width=120))[0]
    assert [(numbers.index(k) - 16) / 2 for k in ("0", "10", "20")] == [0, 10, 20] and numbers.split() == [
        "0",
        "10",
        "20",
    ]
    cut = heat_map(random_pattern(64, 64), ["a"] * 64, Terminal(width=40))[1]
    assert cut.split() == ["40", "50", "60"] and cut.index("40") == 16  # column 40 is the first


@pytest.mark.parametrize(
    ("value", "digits", "signed", "expected"),
    [
        (0.126, 2, False, "0.13"),
        (0.126, 2, True, "+0.13"),
        (-0.126, 2, True, "-0.13"),
        (-0.001, 2, True, "0.00"),
        (0.0, 3, True, "0.000"),
        (None, 2, False, "-"),
        (NAN, 2, False, "-"),
        (math.inf, 2, True, "-"),
    ],
)
def test_number(value: float | None, digits: int, signed: bool, expected: str) -> None:
    assert number(value, digits, signed) == expected


def test_interval() -> None:
    assert interval([0.314, -0.02, 0.5]) == "+0.31 [-0.02, +0.50]"
    assert interval(None) == "-"


def test_table_aligns_columns() -> None:
    rows = [("L0H0", 0.5, "+1.2!", "a"), ("L10H10", None, "-13.0", "bcd")]
    assert table(["head", "score", "change", "label"], rows) == [
        "head    score  change  label",
        "L0H0     0.50   +1.2!  a",
        "L10H10      -   -13.0  bcd",
    ]
    wide = table(["token", "weight"], [("日本", 0.5), ("ab", 0.25)])
    assert {display_width(line) for line in wide} == {len("token  weight")}


def test_wide_table_continues_below() -> None:
    lines = table(["head", *(f"column {k}" for k in range(6))], [("L0H0", *map(float, range(6)))], width=40)
    assert all(len(line) <= 40 for line in lines)
    assert [line.split()[0] for line in lines if line] == ["head", "L0H0", "head", "L0H0"]
    values = [word for line in lines if line.startswith("L0H0") for word in line.split()[1:]]
    assert values == [f"{k}.00" for k in range(6)]
    lines = table(["head", "x" * 80, "y"], [("L0H0", 1.0, 2.0)], width=20)
    assert "x" * 80 in lines[0] and lines[-1].split() == ["L0H0", "2.00"]


def test_sparkline() -> None:
    assert sparkline(np.linspace(0, 1, 8), 0.0, 1.0, "utf-8") == BLOCKS
    assert sparkline(np.linspace(0, 1, 8), 0.0, 1.0, "ascii") == ASCII_BLOCKS
    assert sparkline([-5, 9], 0.0, 1.0, "utf-8") == BLOCKS[0] + BLOCKS[-1]
    assert sparkline([0, NAN, 1], 0.0, 1.0) == f"{ASCII_BLOCKS[0]} {ASCII_BLOCKS[-1]}"
    assert sparkline([0, 1, 0, 1], 0.0, 1.0, width=2) == ASCII_BLOCKS[4] * 2  # averaged


@settings(deadline=None)
@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=40), st.integers(1, 50))
def test_any_numbers_make_a_sparkline(values: list[float], width: int) -> None:
    line = sparkline(values, 0.0, 1.0, width=width)
    assert len(line) == min(len(values), width) and set(line) <= {*ASCII_BLOCKS, " "}


def test_json_has_finite_numbers_or_null() -> None:
    data = {"a": np.float32(0.5), "b": [NAN, math.inf, 1], "c": np.array([[1.0, NAN]]), "d": (True, None, "\x1b[31m")}
    text = to_json(data)
    assert json.loads(text) == {"a": 0.5, "b": [None, None, 1], "c": [[1.0, None]], "d": [True, None, "\x1b[31m"]}
    assert text.isascii() and "\x1b" not in text


def test_csv_has_a_column_for_each_key() -> None:
    text = to_csv([{"head": "L0H0", "value": NAN}, {"head": 'a,"b"\n\x1b', "value": 1.5, "more": 2}])
    rows = list(csv.reader(io.StringIO(text)))
    assert rows == [["head", "value", "more"], ["L0H0", "", ""], ['a,"b"\\n\\x1b', "1.5", "2"]]
    assert to_csv([]) == ""


def test_paragraph_keeps_words_whole() -> None:
    lines = paragraph("held-out " * 20, 50)
    assert all(len(line) <= 50 for line in lines) and set(" ".join(lines).split()) == {"held-out"}
