"""Charts promise: the numbers that they were given, named heads, and the same bytes for the same input."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib import image

from common.errors import CONFIG, DISK_OR_MEMORY, UserError
from inspection.plots import Line, phase_change, timeline

STEPS = [100, 200, 300, 400]
SVG = "{http://www.w3.org/2000/svg}"


def scores(seed: int = 0) -> dict[str, np.ndarray]:
    """Four steps, two layers of three heads; L1H2 ends highest."""
    table = np.random.default_rng(seed).random((4, 2, 3)).astype(np.float32) * 0.5
    table[-1, 1, 2] = 0.97
    return {"induction": table, "distance": table * 40}


def change(path: Path, title: str = "the phase change") -> None:
    loss = Line("loss on repeats", STEPS, [3.5, 3.0, 1.0, 0.2])
    heads = [Line(name, STEPS, np.linspace(0, 1, 4)) for name in ("induction head L1H2", "previous-token head L0H0")]
    phase_change(path, loss, *heads, title)


def words(path: Path) -> list[str]:
    """The texts of an SVG."""
    return ["".join(text.itertext()).strip() for text in ElementTree.parse(path).iter(f"{SVG}text")]


def test_the_heads_that_end_highest_are_named(tmp_path: Path) -> None:
    table = scores()
    timeline(tmp_path / "a.svg", STEPS, table, "induction", "mine: induction")
    last = table["induction"][-1]
    order = sorted((-last[layer, head], layer, head) for layer in range(2) for head in range(3))[:3]
    named = [word for word in words(tmp_path / "a.svg") if word.startswith("L")]
    assert named == [f"L{layer}H{head} {-value:.2f}" for value, layer, head in order]
    assert named[0] == "L1H2 0.97"
    assert "mine: induction" in words(tmp_path / "a.svg")
    assert any("grey: the other 3 heads" in word for word in words(tmp_path / "a.svg"))


def test_names_do_not_lie_on_each_other(tmp_path: Path) -> None:
    table = {"induction": np.zeros((4, 2, 3), dtype=np.float32)}
    timeline(tmp_path / "a.svg", STEPS, table, "induction", "all alike")
    tree = ElementTree.parse(tmp_path / "a.svg")
    heights = []
    for group in tree.iter(f"{SVG}text"):
        if "".join(group.itertext()).strip().startswith("L"):
            heights.append(float(group.get("y") or group.get("transform").split("(")[1].split(")")[0].split()[1]))
    assert len(heights) == 3 and min(np.diff(sorted(heights))) > 8  # points


def test_the_phase_change_names_its_three_lines(tmp_path: Path) -> None:
    change(tmp_path / "a.svg")
    found = words(tmp_path / "a.svg")
    assert {"loss on repeats", "induction head L1H2", "previous-token head L0H0", "weight", "step"} <= set(found)
    assert "loss on repeats (nats/token)" in found


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_the_same_input_gives_the_same_bytes(tmp_path: Path, kind: str) -> None:
    with matplotlib.rc_context({"font.size": 22, "axes.facecolor": "red"}):  # the reader's own settings change nothing
        timeline(tmp_path / f"b.{kind}", STEPS, scores(), "induction", "x")
        change(tmp_path / f"d.{kind}")
    timeline(tmp_path / f"a.{kind}", STEPS, scores(), "induction", "x")
    change(tmp_path / f"c.{kind}")
    timeline(tmp_path / f"e.{kind}", STEPS, scores(1), "induction", "x")
    assert (tmp_path / f"e.{kind}").read_bytes() != (tmp_path / f"a.{kind}").read_bytes()
    for one, other in (("a", "b"), ("c", "d")):
        drawn = (tmp_path / f"{one}.{kind}").read_bytes()
        assert drawn == (tmp_path / f"{other}.{kind}").read_bytes()
        assert b"Date" not in drawn and b"date>" not in drawn and b"Software" not in drawn


def test_one_step_and_missing_numbers_are_drawn(tmp_path: Path) -> None:
    table = np.full((4, 1, 2), np.nan, dtype=np.float32)
    timeline(tmp_path / "nan.png", STEPS, {"induction": table}, "induction", "nothing measured")
    table[1:, 0, 0] = 0.5
    timeline(tmp_path / "some.png", STEPS, {"induction": table}, "induction", "some")
    timeline(tmp_path / "one.png", [800], {"copying": np.array([[[-0.5, 0.9]]], dtype=np.float32)}, "copying", "one")
    pictures = [image.imread(tmp_path / f"{name}.png") for name in ("nan", "some", "one")]
    assert all(picture.std() > 0.01 for picture in pictures)


def test_titles_are_plain_text(tmp_path: Path) -> None:
    title = "$x_1$ <&> \x1b[31m \u202e \\frac{"
    change(tmp_path / "a.svg", title)
    assert any("$x_1$ <&> \\x1b[31m" in word for word in words(tmp_path / "a.svg"))


def test_other_endings_and_places_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"\.png or \.svg") as refused:
        timeline(tmp_path / "a.pdf", STEPS, scores(), "induction", "x")
    assert refused.value.exit_code == CONFIG
    with pytest.raises(UserError, match="cannot write") as refused:
        change(tmp_path / "nowhere" / "a.png")
    assert refused.value.exit_code == DISK_OR_MEMORY
