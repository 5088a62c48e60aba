"""Plots: the numbers they were given, readable labels for any token, and the same bytes for the same input."""

import json
import re
import shutil
import warnings
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from fontTools.ttLib import TTFont
from matplotlib import font_manager, image

from common.errors import CONFIG, DISK_OR_MEMORY
from inspection.plots import (
    FUTURE,
    draw_figures,
    draw_patterns,
    has_formed,
    phase_change,
    repeats_loss,
    score_range,
    score_timeline,
)
from inspection.run_reader import RunFiles
from tests.inspection.test_terminal import WORDS, random_pattern
from tests.runs import user_error

AWKWARD = ["$x_1$", "_", "🦊", "日本", "\n", "\x1b[31m", "\\frac{", "$", "<&>", " ", "\u202e", "\ud800"]
TOKENS = [word.encode("utf-8", "surrogatepass") for word in AWKWARD]
STEPS = [100, 200, 300, 400]
SCORES = np.random.default_rng(0).random((4, 2, 3)).astype(np.float32)
SVG = "{http://www.w3.org/2000/svg}"


def texts_of(path: Path) -> list[str]:
    """All text in an SVG."""
    return ["".join(element.itertext()).strip() for element in ElementTree.parse(path).iter(f"{SVG}text")]


def draw_phase_change(path: Path, title: str = "phase change") -> None:
    scores = [(name, STEPS, np.linspace(0, 1, 4)) for name in ("induction L1H2", "previous_token L0H0")]
    phase_change(path, ("loss on repeats", STEPS, [3.5, 3.0, 1.0, 0.2]), scores, title)


def test_grid_labels_heads_tokens_and_axes(tmp_path: Path) -> None:
    draw_patterns(tmp_path / "grid.svg", random_pattern(2, 3, 8, 8), WORDS, "all heads")
    texts = texts_of(tmp_path / "grid.svg")
    assert {"all heads", "L0H0", "L1H2", "·Mia", "·She", "key: the token attended to"} <= set(texts)
    assert "row: query, column: key" in " ".join(texts) and "the last" not in " ".join(texts)
    draw_patterns(tmp_path / "layers.svg", random_pattern(9, 1, 70, 70), [b"a"] * 70, "t")
    text = " ".join(texts_of(tmp_path / "layers.svg"))
    assert "the first 8 of 9 layers, 1 of 1 heads" in text and "the last 64 of 70 tokens" in text
    assert "L7H0" in text and "L8H0" not in text
    names = [b"t%d" % k for k in range(120)]
    draw_patterns(tmp_path / "one.svg", random_pattern(1, 1, 120, 120), names, "t", query=101)
    assert "t101" in texts_of(tmp_path / "one.svg") and "t55" not in texts_of(tmp_path / "one.svg")


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_any_token_and_title_can_be_drawn(tmp_path: Path, suffix: str) -> None:
    title = "$x_1$ <&> \x1b[31m \u202e \\frac{🦊"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a missing glyph is a warning
        draw_patterns(tmp_path / f"one{suffix}", random_pattern(1, 1, 12, 12), TOKENS, title, query=3)
        draw_phase_change(tmp_path / f"change{suffix}", title)
    if suffix == ".svg":
        texts = set(texts_of(tmp_path / "one.svg"))
        assert {"$x_1$", "$", "\\n", "<&>", "·", "🦊"} <= texts
        assert any("$x_1$ <&> \\x1b[31m" in text for text in texts_of(tmp_path / "change.svg"))


def test_characters_are_drawn_in_a_font_of_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Where no font has a character, nothing is printed."""
    font = TTFont(font_manager.findfont("DejaVu Sans"))
    for table in font["cmap"].tables:
        table.cmap = {ord("日"): "A"}
    for record in font["name"].names:
        record.string = str(record).replace("DejaVu", "A")
    font.save(tmp_path / "a.ttf")
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [str(tmp_path / "a.ttf")])
    for suffix in ("svg", "png", "pdf"):
        draw_patterns(
            tmp_path / f"one.{suffix}", np.eye(2)[None, None], ["日".encode(), "\U00030000".encode()], "$日_1$"
        )
    assert {"日", "$日_1$"} <= set(texts_of(tmp_path / "one.svg")) and capfd.readouterr() == ("", "")
    assert "A Sans" in (tmp_path / "one.svg").read_text("utf-8")


EXAMPLES = [{"text": "held-out 9", "position": 2}, {"text": "held-out 2", "position": 4}]


@pytest.mark.parametrize(
    ("score", "examples", "title"),
    [
        ("", [], "L.H. at step 6: held-out 1"),
        ("induction", [], "L1H0 at step 6: repeat 1"),
        ("induction", EXAMPLES, "L1H0 at step 6: held-out 2"),
    ],
)
def test_head_is_the_one_of_the_findings_where_it_matters(
    score: str, examples: list[Any], title: str, trained: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained, tmp_path / "run")
    findings = [{"head": [1, 0], "score": score, "is_supported": True}] if score else []
    data = {"headline": "", "findings": findings, "examples": examples}
    (tmp_path / "run" / "attention" / "findings.json").write_text(json.dumps(data))
    (tmp_path / "phase_change.svg").write_text("of an earlier end")
    paths = draw_figures(RunFiles.open(tmp_path / "run"), tmp_path, "svg", 6)
    assert [path.name for path in paths] == ["attention.svg", "head.svg", "timeline.svg"]  # no score formed
    assert not (tmp_path / "phase_change.svg").exists()
    assert f"run: {score or 'previous_token'}" in texts_of(tmp_path / "timeline.svg")
    texts = texts_of(tmp_path / "head.svg")
    assert any(re.fullmatch(title, text) for text in texts)
    assert any("framed" in text for text in texts) == bool(examples)


@pytest.mark.parametrize(
    ("values", "formed"),
    [([0.1, 0.6], True), ([0.1, 0.2], False), ([0.6, 0.9], False), ([np.nan, 0.15, 0.4], True), ([0.3, 0.49], False)],
)
def test_phase_change_needs_a_score_that_formed(values: list[float], formed: bool) -> None:
    assert has_formed(np.array(values, dtype=np.float32)) == formed


def test_masked_cells_are_gray_and_zero_is_not(tmp_path: Path) -> None:
    pattern = np.zeros((1, 1, 6, 6))
    pattern[..., 0] = 1
    draw_patterns(tmp_path / "one.png", pattern, [b"a"] * 6, "t")
    pixels = np.rint(image.imread(tmp_path / "one.png")[..., :3] * 255).astype(int).reshape(-1, 3)

    def count(color: Any) -> float:
        wanted = np.rint(np.array(matplotlib.colors.to_rgb(color)) * 255)
        return float((abs(pixels - wanted).max(axis=1) <= 1).sum())

    cividis = matplotlib.colormaps["cividis"]
    ones = count(cividis(1.0))
    assert count(cividis(0.0)) / ones == pytest.approx(15 / 6, rel=0.1)  # 6 cells of 1, 15 of 0, 15 masked
    assert count(FUTURE) / ones == pytest.approx(15 / 6, rel=0.1)


def test_timeline_labels_the_heads_that_end_highest(tmp_path: Path) -> None:
    score_timeline(tmp_path / "a.svg", STEPS, SCORES, "induction", "run: induction")
    order = sorted((-SCORES[-1, layer, head], layer, head) for layer, head in np.ndindex(2, 3))[:3]
    texts = texts_of(tmp_path / "a.svg")
    named = [text for text in texts if text.startswith("L")]
    assert named == [f"L{layer}H{head} {-value:.2f}" for value, layer, head in order]
    assert "run: induction" in texts and any("gray: the other 3 heads" in text for text in texts)
    score_timeline(tmp_path / "nan.png", STEPS, np.full((4, 1, 2), np.nan, dtype=np.float32), "induction", "missing")


def test_score_range() -> None:
    assert score_range("induction", [0.2]) == (0, 1) and score_range("copying", [0.2]) == (-1, 1)
    assert score_range("distance", [3.0, 17.0, np.nan]) == (0, 17) and score_range("unknown", [0.2]) == (0, 1)


def test_loss_on_repeats_is_of_the_second_copy(trained: Path) -> None:
    run = RunFiles.open(trained)
    (text,) = [text for text in run.read(3).texts if text.name == "repeat 1"]
    n = len(text.tokens) // 2  # after end-of-text
    assert text.tokens[1 : n + 1].tolist() == text.tokens[n + 1 :].tolist()
    _, steps, values = repeats_loss(run) or ("", [], [])
    assert list(steps) == [0, 3, 6] and np.asarray(values)[1] == pytest.approx(text.loss[1 - n :].mean())


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_equal_input_gives_equal_bytes_whatever_the_users_style(tmp_path: Path, suffix: str) -> None:
    def draw(folder: Path) -> dict[str, bytes]:
        folder.mkdir()
        score_timeline(folder / f"timeline.{suffix}", STEPS, SCORES, "induction", "x")
        draw_phase_change(folder / f"change.{suffix}")
        draw_patterns(folder / f"grid.{suffix}", random_pattern(2, 2, 8, 8), WORDS, "t")
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    plain = draw(tmp_path / "plain")
    with matplotlib.rc_context({"text.usetex": True, "font.family": "serif", "axes.grid": True, "font.size": 22}):
        before = dict(matplotlib.rcParams)
        assert draw(tmp_path / "styled") == plain and dict(matplotlib.rcParams) == before
    assert all(word not in data for data in plain.values() for word in (b"Date", b"date>", b"Software"))


@pytest.mark.parametrize(("path", "code"), [("train.py/one.png", DISK_OR_MEMORY), ("one.bmp", CONFIG)])
def test_wrong_suffix_and_folder_are_user_errors(path: str, code: int) -> None:
    with user_error(code, "one"):
        draw_patterns(path, np.ones((1, 1, 1, 1)), [b"a"], "t")
