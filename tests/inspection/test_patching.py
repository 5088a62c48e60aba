"""Activation patching: known shares on the handmade model, the limits on random ones, the command."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import CONFIG, UserError
from inspection.activation_cache import blocks_of, inference_mode, run_layers
from inspection.patching import activation_patching, patch_texts, patched
from tests.inspection.handmade import INDUCTION, LEAD, PREVIOUS, handmade
from tests.model.helpers import random_model, random_tokens
from tests.runs import error_line, output, script, user_error

A, B, C, D = 3, 5, 7, 9
CLEAN, CORRUPT = [0, A, B, D, C, A], [0, D, B, A, C, A]
"""After `A B ... A` comes B, after `A C ... A` comes C."""


def test_handmade() -> None:
    """Both heads bring all of it back, the others nothing. With one of two positions patched, A is after both B and C, or
    after none: the logit difference is 0, half of the way from -LEAD to LEAD."""
    result, again = (activation_patching(handmade(), CLEAN, CORRUPT, (B, C)) for _ in range(2))
    assert (result.clean, result.corrupt) == pytest.approx((LEAD, -LEAD), abs=1e-3)
    heads, residual = np.zeros((2, 3)), np.zeros((2, 6))
    heads[PREVIOUS] = heads[INDUCTION] = 1
    residual[0, [1, 3]] = residual[1, [2, 4]] = 0.5
    assert result.heads == pytest.approx(heads, abs=1e-4)
    assert result.residual == pytest.approx(residual, abs=1e-4)
    others = np.ones((2, 3), dtype=bool)
    others[PREVIOUS] = others[INDUCTION] = False
    assert not result.heads_control[others].any() and (result.heads_control[~others] < 0.8).all()
    assert np.array_equal(result.heads_control, again.heads_control)
    assert np.array_equal(result.residual_control, again.residual_control)


@pytest.mark.parametrize("preset", ["glass", "gpt2", "qwen3"])
def test_patching_everything_restores_the_clean_logit_difference(preset: str) -> None:
    model, (clean, corrupt) = random_model(preset), random_tokens(2, 9).tolist()
    result = activation_patching(model, clean, corrupt, (1, 2))
    with inference_mode(model):
        layers = list(run_layers(model, torch.tensor([corrupt])))
        for number, layer in enumerate(run_layers(model, torch.tensor([clean]))):
            for mask, expected in ((True, result.clean), (False, result.corrupt)):
                masks = torch.full((1, 1, 1), mask)
                difference = patched(model, blocks_of(model)[number], layer.resid_pre, masks, layers[number:], (1, 2))
                assert float(difference) == pytest.approx(expected, abs=1e-4)
    last = result.residual[:, -1] - result.residual_control[:, -1]
    assert np.isfinite(result.residual).all() and last.any()


def test_equal_texts_are_refused() -> None:
    with user_error(CONFIG, r"the logit difference is 60\.000 on both texts"):
        activation_patching(handmade(), CLEAN, CLEAN, (B, C))


def encode(text: str) -> list[int]:
    return [0, *(ord(c) - ord("a") + 1 for c in text)]


def test_what_answers_share_is_added_to_the_texts() -> None:
    result = patch_texts(handmade(), encode, "abdc", "dbac", "ab", "ac")
    assert (result.clean_tokens, result.corrupt_tokens) == ([0, 1, 2, 4, 3, 1], [0, 4, 2, 1, 3, 1])
    assert result.answers == (2, 3) and result.clean == pytest.approx(LEAD, abs=1e-3)


def test_answer_that_is_merged_and_text_that_is_too_long() -> None:
    with pytest.raises(UserError, match="the tokenizer merges 'ab' with the text before it"):
        patch_texts(handmade(), lambda text: encode(text.replace("ca", "z")), "abdc", "dbac", "ab", "ac")
    with pytest.raises(UserError, match="the texts have 61 tokens; the model takes 60"):
        patch_texts(handmade(), encode, "a" * 60, "b" * 60, "b", "c")


TEXTS = "--clean=The hen met the f", "--corrupt=The fox met the h", "--right=ox", "--wrong=en"


def test_command(trained: Path, tmp_path: Path) -> None:
    figure = tmp_path / "patch.png"
    printed = output("attend.py", "patch", trained, *TEXTS, f"--out={figure}")
    assert figure.read_bytes().startswith(b"\x89PNG") and str(figure) in printed
    data = json.loads(script("attend.py", "patch", trained, *TEXTS, f"--out={figure}", "--json").stdout)
    T = len(data["clean_tokens"])
    assert len("The hen met the f") + 1 == T  # after end-of-text
    assert np.shape(data["residual"]) == np.shape(data["residual_control"]) == (2, T)
    assert np.shape(data["heads"]) == np.shape(data["heads_control"]) == (2, 2)
    assert f"{data['clean']:+.2f} nats on the clean text" in printed
    cells = re.findall(r"(-?[\d.]+) \((-?[\d.]+)\)", printed)
    shares, controls = np.array(cells, dtype=float)[-4:].T
    assert shares == pytest.approx(np.ravel(data["heads"]), abs=0.006)
    assert controls == pytest.approx(np.ravel(data["heads_control"]), abs=0.006)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("--clean=The hen", "the clean text has 8 tokens, the corrupt one 18"),
        ("--wrong=ox", "'ox' and 'ox' do not differ in a token"),
        ("--wrong=o", "'ox' and 'o' do not differ in a token"),
        ("--right=", "--right is missing"),
        ("--checkpoint=5", "--checkpoint is '5'"),
    ],
)
def test_mistakes(trained: Path, tmp_path: Path, changed: str, message: str) -> None:
    name = changed.partition("=")[0]
    options = [changed if option.startswith(name) else option for option in TEXTS]
    options += [] if changed in options else [changed]
    assert message in error_line(script("attend.py", "patch", trained, *options, f"--out={tmp_path}/a.png"), CONFIG)
    assert not list(tmp_path.iterdir())
