"""loss.png: its labels never overlap."""

import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.report import plot_loss

LOSSES = st.lists(st.floats(0.01, 12), min_size=6, max_size=6)


@settings(max_examples=20, deadline=None)
@given(losses=LOSSES | LOSSES.map(lambda losses: [losses[0] + loss / 1000 for loss in losses]))
def test_labels_of_the_loss_do_not_overlap(losses: list[float], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("loss") / "loss.svg"
    train, val, *rest = losses
    metrics = [{"step": 1, "loss": 9.0}, {"step": 2, "loss": train}, {"step": 2, "val_loss": val}]
    plot_loss(path, metrics, dict(zip(("uniform", "unigram", "trigram", "floor"), rest, strict=True)), "t")
    names = r"(?:training batch|validation|uniform|unigram|trigram|floor) \d+\.\d{3}"
    labels = re.findall(rf' y="([\d.]+)"[^>]*>({names})<', path.read_text())
    heights = sorted(float(y) for y, _ in labels)
    assert len(labels) == 6 and all(b - a > 9 for a, b in pairwise(heights))  # points of the font
