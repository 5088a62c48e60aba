"""`train.minutes`: what is chosen, how the time is filled, and that the saved config reproduces the run."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.errors import UserError
from common.files import read_metrics
from tests.runs import script
from training import time_budget as budget
from training.checkpoint import open_checkpoint
from training.config import OptimConfig, RunConfig, TrainConfig, parse_train, read_toml
from training.device import DistContext
from training.flops import step_flops
from training.optimizer import get_lr_scale
from training.time_budget import (
    MIN_STEPS,
    RECIPE,
    SIZES,
    Deadline,
    adjust_steps,
    decay_start,
    effective_tokens,
    expected_loss,
    search,
    with_size,
)

CPU = DistContext(torch.device("cpu"), torch.float32)
LOSSES = (  # (steps, nats/token on the validation split of Tiny Shakespeare) of the first sizes
    ((1_071, 1.7248), (3_214, 1.6389), (8_571, 1.582)),
    ((517, 1.7203), (1_552, 1.5665), (4_138, 1.4943)),
    ((182, 1.8082), (545, 1.6071), (1_455, 1.5095)),
    ((79, 2.0356), (237, 1.7127), (632, 1.5566)),
    ((50, 2.2177), (95, 1.9064), (253, 1.6407)),
)


def corpus(n_train: int = 1_003_854, n_val: int = 111_540) -> Any:
    """As large as Tiny Shakespeare."""
    return SimpleNamespace(train=range(n_train), val=range(n_val), tokenizer=SimpleNamespace(vocab_size=65))


def minutes(count: float) -> RunConfig:
    return RunConfig(train=TrainConfig(minutes=count))


def fake_speed(monkeypatch: pytest.MonkeyPatch, flops: float = 1e11) -> list[RunConfig]:
    """Make every size reach so many FLOP/s; the sizes that get measured."""
    measured = []

    def measure(config: RunConfig, vocab_size: int, *rest: object) -> float:
        measured.append(config)
        return step_flops(config, vocab_size) / flops

    monkeypatch.setattr(budget, "measure_step", measure)
    return measured


def test_formula_fits_the_measured_losses() -> None:
    for size, losses in zip(SIZES, LOSSES, strict=False):
        for steps, loss in losses:
            run = with_size(RunConfig(train=TrainConfig(steps=steps)), *size)
            assert expected_loss(run, 1_003_854) == pytest.approx(loss, rel=0.03)


@given(st.integers(1000, 10**9), st.floats(1, 200))
def test_repeating_a_text_teaches_less_and_less(n_train: int, epochs: float) -> None:
    tokens = effective_tokens(epochs * n_train, n_train)
    assert effective_tokens(0.9 * n_train, n_train) == 0.9 * n_train
    assert tokens <= min(epochs * (1 + 1e-12), 1 + budget.REPEAT_VALUE) * n_train
    assert effective_tokens((epochs + 1) * n_train, n_train) > tokens


def test_time_is_filled_and_more_of_it_takes_larger_models(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = []
    for count, flops in ((0.5, 1e11), (5, 1e11), (60, 1e11), (60, 1e13)):
        measured = fake_speed(monkeypatch, flops)
        config, end = search(minutes(count), CPU, corpus(100_000_000), elapsed=3.0)
        train, left = config.train, end - time.perf_counter()
        assert 0.75 * left < train.steps * step_flops(config, 65) / flops < left < 60 * count - 3 - budget.FIXED_SECONDS
        assert 3.9 < train.steps / train.eval_every <= 20 and train.minutes == 0 and not config.problems()
        assert 1 <= len(measured) <= 4 and capsys.readouterr().out.count("\n        > ") == 1
        sizes.append(config.model.n_layers * config.model.d_model**2)
    assert sizes == sorted(sizes) and len(set(sizes)) >= 3


def test_too_little_time_names_the_least(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_speed(monkeypatch)
    with pytest.raises(
        UserError, match=r"train.minutes is 0.05, too short for 50 steps: give at least 0\.\d$"
    ) as error:
        search(minutes(0.05), CPU, corpus(), 3.0)
    enough = float(str(error.value).split()[-1])
    assert search(minutes(enough), CPU, corpus(), 3.0)[0].train.steps >= MIN_STEPS


def test_short_texts_and_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_speed(monkeypatch)
    assert search(minutes(60), CPU, corpus(100, 20), 3.0)[0].model.context < 100
    with pytest.raises(UserError, match="has 60 tokens, too few"):
        search(minutes(60), CPU, corpus(60, 20), 3.0)
    with pytest.raises(UserError, match="start without torchrun"):
        search(minutes(2), replace(CPU, world_size=2), corpus(), 3.0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--train.minutes=2", "--train.steps=100"], "train.minutes sets train.steps itself"),
        (["--train.minutes", "2", "--model.d_model", "64"], "train.minutes sets model.d_model itself"),
        (["--train.minutes=nan"], "train.minutes is nan"),
    ],
)
def test_contradicting_options_are_named(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_train(words)


def planned(steps: int) -> RunConfig:
    return RunConfig(train=TrainConfig(steps=steps), optim=OptimConfig(**RECIPE))  # type: ignore[arg-type]


@given(st.integers(2, 3000), st.floats(-100, 3000))
def test_adjusting_keeps_the_learning_rates_of_past_steps(steps: int, more: float) -> None:
    before = planned(steps)
    done = decay_start(before)
    after = adjust_steps(before, done, more)
    assert not after.problems() and after.train.steps > done
    for step in range(done):
        assert get_lr_scale(step, steps, before.optim) == get_lr_scale(step, after.train.steps, after.optim)
    assert get_lr_scale(after.train.steps - 1, after.train.steps, after.optim) < 1
    assert replace(after, train=before.train, optim=before.optim) == before


@pytest.mark.parametrize(("end", "expected"), [(130, 130), (80, 80), (51, 62)])
def test_steps_are_adjusted_once(end: float, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of one second, when the learning rate is about to decay after 50 of 100."""
    trainer: Any = SimpleNamespace(config=planned(100), state=SimpleNamespace())
    trainer.config = replace(trainer.config, run=replace(trainer.config.run, dir=str(tmp_path)))
    deadline = Deadline(1000 + end)
    for step in (0, 49, 50, 51):
        monkeypatch.setattr(time, "perf_counter", lambda step=step: 1000.0 + step)
        trainer.state.step = step
        deadline.on_step(trainer, {}) if step else deadline.on_start(trainer)
    assert trainer.config.train.steps == expected and (tmp_path / "config.toml").exists()


@pytest.mark.slow
def test_saved_config_reproduces_a_run_by_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a run that was stopped and resumed."""
    more, stop_at_step = 200, 115
    monkeypatch.setattr(budget, "SIZES", ((1, 2, 16, 16, 4), (1, 2, 32, 16, 4)))
    monkeypatch.setattr(budget, "measure_step", lambda *rest: 0.25)
    monkeypatch.setattr(budget, "adjust_steps", lambda config, step, _: adjust_steps(config, step, more))
    text = tmp_path / "text.txt"
    text.write_text("The fox met the hen at the well. " * 400)
    options = [f"--data.source={text}", "--data.tokenizer=char", "--log.sample_tokens=0", "--train.minutes=1"]
    first, again = tmp_path / "first", tmp_path / "again"
    done = script("train.py", *options, f"--run.dir={first}", f"--run.stop_at_step={stop_at_step}")
    assert done.returncode == 0 and "plan    1 min on cpu" in done.stdout, done.stderr
    ((steps, at),) = re.findall(r"^plan    (\d+) steps, from the time that (\d+) have taken$", done.stdout, re.M)
    assert int(steps) == int(at) + more == open_checkpoint(first).config.train.steps
    assert "--train.minutes=0.0" in read_toml(first / "config.toml")
    for option in ((f"--run.resume={first}",), (first / "config.toml", f"--run.dir={again}")):
        assert script("train.py", *option).returncode == 0
    times = {"tokens_per_second", "mfu", "peak_memory_mb", "final_seconds"}
    one, two = (
        [{key: value for key, value in row.items() if key not in times} for row in read_metrics(run / "metrics.jsonl")]
        for run in (first, again)
    )
    assert one == two and one[-1]["step"] == int(steps)
    assert open_checkpoint(first).state == open_checkpoint(again).state
