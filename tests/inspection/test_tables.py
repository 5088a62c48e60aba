"""Tables promise: plain numbers go out unchanged, what is missing is null, and every line fits where it is shown."""

from __future__ import annotations

import csv
import io
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inspection.plots import score_range
from inspection.terminal import (
    ASCII_BLOCKS,
    BLOCKS,
    Column,
    columns_of,
    interval,
    number,
    paragraph,
    sparkline,
    table,
    to_csv,
    to_json,
)

NAN = math.nan


@pytest.mark.parametrize(
    ("value", "digits", "signed", "shown"),
    [
        (0.126, 2, False, "0.13"),
        (0.126, 2, True, "+0.13"),
        (-0.126, 2, True, "-0.13"),
        (-0.001, 2, True, "0.00"),
        (0.001, 2, True, "0.00"),
        (0.0, 3, True, "0.000"),
        (None, 2, False, "-"),
        (NAN, 2, False, "-"),
        (math.inf, 2, True, "-"),
    ],
)
def test_a_number_for_reading(value: float | None, digits: int, signed: bool, shown: str) -> None:
    assert number(value, digits, signed) == shown


def test_an_interval_for_reading() -> None:
    assert interval([0.314, -0.02, 0.5]) == "+0.31 [-0.02, +0.50]"
    assert interval(None) == "-"


def test_a_table_is_aligned() -> None:
    columns = [Column("head", side="left"), Column("score"), Column("change", 1, signed=True)]
    assert table(columns, [("L0H0", 0.5, 1.25), ("L10H10", None, -3.0)]) == [
        "head    score  change",
        "L0H0     0.50    +1.2",
        "L10H10      -    -3.0",
    ]


def test_a_wide_table_goes_on_below_and_repeats_its_first_column() -> None:
    columns = [Column("head", side="left"), *(Column(f"column {k}") for k in range(6))]
    lines = table(columns, [("L0H0", *map(float, range(6)))], width=40)
    assert all(len(line) <= 40 for line in lines)
    assert [line.split()[0] for line in lines if line] == ["head", "L0H0", "head", "L0H0"]
    assert [word for line in lines if line.startswith("L0H0") for word in line.split()[1:]] == [
        f"{k}.00" for k in range(6)
    ]


def test_a_column_that_is_too_wide_for_any_block_is_still_shown() -> None:
    lines = table([Column("head"), Column("x" * 80), Column("y")], [("L0H0", 1.0, 2.0)], width=20)
    assert "x" * 80 in lines[0] and lines[-1].split() == ["L0H0", "2.00"]


def test_wide_characters_take_two_columns() -> None:
    lines = table([Column("token", side="left"), Column("weight")], [("日本", 0.5), ("ab", 0.25)])
    assert {columns_of(line) for line in lines} == {len("token  weight")}


def test_a_sparkline_goes_from_low_to_high() -> None:
    assert sparkline(np.linspace(0, 1, 8), 0.0, 1.0, "utf-8") == BLOCKS
    assert sparkline(np.linspace(0, 1, 8), 0.0, 1.0, "ascii") == ASCII_BLOCKS
    assert sparkline([-5, 9], 0.0, 1.0, "utf-8") == BLOCKS[0] + BLOCKS[-1]


def test_a_sparkline_leaves_a_gap_where_nothing_was_measured() -> None:
    assert sparkline([0, NAN, 1], 0.0, 1.0) == f"{ASCII_BLOCKS[0]} {ASCII_BLOCKS[-1]}"
    assert sparkline([], 0.0, 1.0) == ""


def test_a_long_sparkline_averages_neighbours() -> None:
    assert sparkline([0, 0, 1, 1], 0.0, 1.0, width=2) == ASCII_BLOCKS[0] + ASCII_BLOCKS[-1]
    assert sparkline([0, 1, 0, 1], 0.0, 1.0, width=2) == ASCII_BLOCKS[4] * 2
    assert len(sparkline(np.random.default_rng(0).random(1001), 0.0, 1.0, width=60)) == 60


@settings(deadline=None)
@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=40), st.integers(1, 50))
def test_any_numbers_make_a_sparkline(values: list[float], width: int) -> None:
    line = sparkline(values, 0.0, 1.0, width=width)
    assert len(line) == min(len(values), width) and set(line) <= {*ASCII_BLOCKS, " "}


def test_scores_are_drawn_from_their_least_to_their_largest_value() -> None:
    assert score_range("induction", [0.2]) == (0, 1)
    assert score_range("copying", [0.2]) == (-1, 1)
    assert score_range("distance", [3.0, 17.0, NAN]) == (0, 17)
    assert score_range("antecedent.pronoun", [0.2]) == (0, 1)
    assert score_range("a stranger's", [0.2]) == (0, 1)


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


def test_a_paragraph_keeps_words_whole() -> None:
    lines = paragraph("held-out " * 20, 50)
    assert all(len(line) <= 50 for line in lines) and set(" ".join(lines).split()) == {"held-out"}
