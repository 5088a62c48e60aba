"""A run by minutes has as many steps as its first half says that there is time for, and stays reproducible."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.files import read_metrics
from tests.runs import script
from training import pace
from training import time_budget as budget
from training.checkpoint import open_checkpoint
from training.config import OptimConfig, RunConfig, TrainConfig, read_toml
from training.optimizer import get_lr_scale
from training.pace import Pace, as_long_as, turn
from training.time_budget import RECIPE, Size


def planned(steps: int) -> RunConfig:
    return RunConfig(train=TrainConfig(steps=steps), optim=OptimConfig(**RECIPE))  # type: ignore[arg-type]


@given(st.integers(2, 3000), st.floats(1e-4, 10), st.floats(-100, 1e4))
def test_no_step_that_is_made_would_have_had_another_rate(steps: int, each: float, left: float) -> None:
    before = planned(steps)
    made = turn(before)
    after = as_long_as(before, made, each, min(left, 3000 * each))
    assert not after.problems() and after.train.steps > made
    for step in range(made):
        assert get_lr_scale(step, steps, before.optim) == get_lr_scale(step, after.train.steps, after.optim)
    assert get_lr_scale(made, after.train.steps, after.optim) == pytest.approx(
        get_lr_scale(made, 1 << 40, before.optim)
    )
    assert get_lr_scale(after.train.steps - 1, after.train.steps, after.optim) < 1


@given(st.integers(100, 10_000), st.floats(0.5, 3))
def test_the_time_that_is_left_is_filled(steps: int, slower: float) -> None:
    """A plan of 0.01 s a step, on a machine that has become slower, or faster."""
    before, each = planned(steps), 0.01 * slower
    made = turn(before)
    left = 0.01 * steps - made * each
    after = as_long_as(before, made, each, left)
    share = (after.train.steps - made) / after.train.steps
    if left / each > made / 3:  # else the rate falls for a fifth of the run, past the end
        assert left - each <= (after.train.steps - made) * each <= left + 1e-6
    assert share >= 0.2 - 1 / made and after.optim.decay_fraction == min(0.5, share)
    assert replace(after, train=before.train, optim=before.optim) == before


def clocked(made: int, end: float, config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of steps that are settled on when `made` steps took one second each."""
    monkeypatch.setattr(time, "perf_counter", lambda: 1000.0 + made)
    found: list[int] = []
    Pace(1000 + end, lambda settled: found.append(settled.train.steps), 1000.0).look(config, made)
    return found


def test_the_clock_is_looked_at_once_where_the_rate_begins_to_fall(monkeypatch: pytest.MonkeyPatch) -> None:
    config = planned(100)
    assert turn(config) == 50
    assert clocked(50, 130, config, monkeypatch) == [130]
    assert clocked(50, 80, config, monkeypatch) == [80]
    assert clocked(50, 51, config, monkeypatch) == [62]  # the rate falls, though it takes too long
    assert clocked(50, 101, config, monkeypatch) == []  # as planned
    assert clocked(49, 130, config, monkeypatch) == clocked(51, 130, config, monkeypatch) == []


@pytest.mark.parametrize(("more", "stop_at_step"), [(60, 0), (200, 115)])
def test_a_run_by_minutes_is_written_down_as_any_other(
    more: int, stop_at_step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its config names no minutes, and the steps that it took: stopped, resumed or begun again, to the same numbers."""
    sizes = (Size(1, 2, 16, 16, 4, 0.25), Size(1, 2, 32, 16, 4, 0.26))
    monkeypatch.setattr(budget, "SIZES", sizes)
    monkeypatch.setattr(budget, "speed", lambda size, *rest: budget.Speed(size.seconds, size.seconds / 12, "", 1e11))
    settle: Callable[..., Any] = as_long_as
    monkeypatch.setattr(pace, "as_long_as", lambda config, step, *rest: settle(config, step, 1, more))
    text = tmp_path / "text.txt"
    text.write_text("The fox met the hen at the well. " * 400)
    options = [f"--data.source={text}", "--data.tokenizer=char", "--log.sample_tokens=0"]
    first, again = tmp_path / "first", tmp_path / "again"
    stopped = script(
        "train.py", *options, "--train.minutes=1", f"--run.dir={first}", f"--run.stop_at_step={stop_at_step}"
    )
    assert stopped.returncode == 0, stopped.stderr
    assert "plan    1 min on cpu" in stopped.stdout
    found = re.findall(r"^plan    (\d+) steps, by the time that (\d+) have taken$", stopped.stdout, re.M)
    (settled, made) = map(int, *found)
    assert settled == made + more == open_checkpoint(first).config.train.steps
    words = read_toml(first / "config.toml")
    assert "--train.minutes=0.0" in words and not any(word.startswith("--train.steps=1000") for word in words)
    resuming = [(f"--run.resume={first}",)] if stop_at_step else []
    for option in (*resuming, (first / "config.toml", f"--run.dir={again}")):
        done = script("train.py", *option)
        assert done.returncode == 0, done.stderr
    one, two = (
        [
            {key: value for key, value in row.items() if key != "tokens_per_second"}
            for row in read_metrics(run / "metrics.jsonl")
        ]
        for run in (first, again)
    )
    assert one == two and one[-1]["final_val_loss"] < 3 and one[-1]["step"] == settled
    saved, repeated = open_checkpoint(first), open_checkpoint(again)
    assert saved.state == repeated.state and saved.config.train == repeated.config.train
    done = script("train.py", f"--run.resume={first}", "--train.minutes=1")
    assert done.returncode == 2 and "give --train.steps instead" in done.stderr
