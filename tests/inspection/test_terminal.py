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
        (b" She", "no-such-encoding", "_She"),
        (b"\n\t\r\x00\x1b[31m\x7f", "utf-8", r"\n\t\r\x00\x1b[31m\x7f"),
        ("é日".encode(), "latin-1", r"é\u65e5"),
        ("\u202e\u200b\u0301".encode(), "utf-8", r"\u202e\u200b\u0301"),
        (b"", "utf-8", "<end>"),
    ],
)
def test_token_text(raw: bytes, encoding: str | None, expected: str) -> None:
    assert token_text(raw, encoding) == expected


@given(st.binary(max_size=12), st.sampled_from(["utf-8", "ascii", "latin-1", "cp437", "koi8-r"]))
@settings(max_examples=50, deadline=None)
def test_any_token_is_printable_in_any_encoding(raw: bytes, encoding: str) -> None:
    text = token_text(raw, encoding)
    assert text.isprintable() and text.encode(encoding) is not None


def test_strongest_attention_takes_the_maximum_of_each_query() -> None:
    pattern, names = random_pattern(2, 3, 9, 9), list("abcdefghi")
    lines = iter(strongest_attention(pattern, names, top=3))
    for layer, head in np.ndindex(2, 3):
        best = [(max((pattern[layer, head, i, j], j) for j in range(1, i)), i) for i in range(2, 9)]
        for (weight, j), i in sorted(best, reverse=True)[:3]:
            target = f'"{names[i]}" attends to "{names[j]}" {weight:.2f} ({i - j} back)'
            assert next(lines) == f"{head_name(layer, head)}  {target}"


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


@pytest.mark.parametrize(("T", "width"), [(1, 10), (9, 80), (200, 80)])
def test_heat_map_fits_the_terminal(T: int, width: int) -> None:
    lines = heat_map(random_pattern(T, T), [f"·{k}日本語の長い名前" for k in range(T)], Terminal("utf-8", width))
    assert max(map(display_width, lines)) <= max(width, 40)
    shown = sum("█" in line or "·" in line or "░" in line for line in lines) - 1
    assert shown == T or lines[0] == f"the last {shown} of {T} tokens"
    assert any(line.startswith(f"{T - 1} ") for line in lines)


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
