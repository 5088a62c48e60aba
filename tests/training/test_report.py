"""The lines at the end of a run: what is wrong with the model, and what it copies."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from tests.training.helpers import corpus
from training import report
from training.checkpoint import TrainState
from training.config import RunConfig
from training.device import get_dist_context
from training.report import Losses, advice, load_best, longest_run, table

REFERENCES = {"uniform": 7.0, "unigram": 6.0, "trigram": 5.0}
GOOD = Losses(step=60, val=4.5, num_targets=100, train=4.4, epochs=2)
LATER = Losses(step=540, val=10.3, num_targets=100, train=0.1, epochs=18)


@pytest.mark.parametrize(
    ("model", "last", "copies", "words"),
    [
        (GOOD, GOOD, (30, 16), []),
        (GOOD, GOOD._replace(step=90, val=4.51), (9, 0), []),  # within the noise of an evaluation
        (
            GOOD._replace(val=8, train=8),
            None,
            (0, 0),
            ["worse than uniform (every token equally likely): 8.0000 against"],
        ),
        (GOOD._replace(val=float("nan")), None, (0, 0), ["worse than uniform"]),
        (GOOD._replace(val=6.5, train=6.4), None, (0, 0), ["worse than unigram"]),
        (GOOD._replace(val=5.5), None, (0, 0), ["worse than trigram"]),
        (GOOD, LATER, (0, 0), ["overfitting: held-out loss is lowest at step 60 (4.5000), and 10.3000 at step 540"]),
        (GOOD, LATER._replace(train=8.8), (0, 0), ["unstable: held-out loss is lowest at step 60"]),
        (GOOD, LATER._replace(epochs=0.9), (0, 0), ["held-out text unlike the rest: held-out loss is lowest"]),
        (GOOD._replace(train=2.0, epochs=0.9), None, (0, 0), ["held-out text unlike the rest: training loss 2.0000"]),
        (
            GOOD._replace(train=2.0),
            None,
            (40, 9),
            ["overfitting: training loss 2.0000 is far below", "memorised: 40 tokens"],
        ),
    ],
)
def test_a_line_for_each_problem(model: Losses, last: Losses | None, copies: tuple[int, int], words: list[str]) -> None:
    lines = advice(model, last or model, REFERENCES, RunConfig(), copies)
    assert len(lines) == len(words) and all(word in line for word, line in zip(words, lines, strict=True))
    assert all("; try " in line for line in lines)


def test_table_in_bits_per_byte_of_each_split() -> None:
    data = replace(corpus(), train=replace(corpus().train, n_bytes=2 * corpus().train.n_bytes))
    text = table(GOOD, LATER, REFERENCES, data)
    names = [line[2:14].strip() for line in text.splitlines()[1:]]
    assert names == ["last step", "uniform", "unigram", "trigram", "this model", "training"]
    assert "best, at step 60" in text and "step 540" in text
    bits = {line[2:14].strip(): float(line.split()[-1]) for line in text.splitlines()[1:]}
    for name, nats, split in (("this model", GOOD.val, data.val), ("training", GOOD.train, data.train)):
        assert bits[name] == pytest.approx(nats * (len(split) - 1) / split.n_bytes / np.log(2), abs=1e-4)


TOKENS = st.lists(st.sampled_from([0, 1, 0xD800, 0x10FFFF]), max_size=30)


@given(st.lists(TOKENS, max_size=3), TOKENS)
@settings(deadline=None)
def test_longest_run_equals_trying_all(texts: list[list[int]], tokens: list[int]) -> None:
    runs = {tuple(tokens[i:j]) for i in range(len(tokens)) for j in range(i + 1, len(tokens) + 1)}
    found = [j - i for t in texts for i in range(len(t)) for j in range(i + 1, len(t) + 1) if tuple(t[i:j]) in runs]
    assert longest_run(texts, np.array(tokens, np.uint32)) == max(found, default=0)


@pytest.mark.parametrize("tensors_are_lost", [False, True])
def test_report_is_of_the_last_step_if_the_best_is_lost(
    tensors_are_lost: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if tensors_are_lost:
        monkeypatch.setattr(
            report, "read_checkpoint", Mock(return_value=Mock(build_model=Mock(side_effect=UserError(""))))
        )
    state, model = TrainState(step=9, best_loss=1.0, best_step=5, last_eval_step=9), SimpleNamespace(config=None)
    trainer: Any = SimpleNamespace(
        state=state, wrapped_model=model, model=model, config=RunConfig(), ctx=get_dist_context()
    )
    assert not load_best(trainer) and trainer.state is state
    assert "the report is of the last step" in capsys.readouterr().out
