"""`train.minutes`: what is chosen, how the time is filled, and that the saved config reproduces the run."""

import itertools
import math
import re
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from tests.runs import script
from tests.training.helpers import TRAIN, make_trainer
from training import time_budget as budget
from training.checkpoint import open_checkpoint
from training.config import RunConfig, TrainConfig, parse_train, read_toml, replace_options, to_toml
from training.device import DistContext
from training.flops import step_flops
from training.optimizer import get_lr_scale
from training.setup import Checkpointer, describe_resuming
from training.time_budget import (
    MIN_STEPS,
    OPTIM,
    ROUNDS,
    SIZES,
    Deadline,
    expected_loss,
    plan_decay,
    search,
    with_size,
)

CPU = DistContext(torch.device("cpu"), torch.float32)
LOSSES = (  # (steps, nats/token on the validation split of Tiny Shakespeare) of five sizes
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
    monkeypatch.setattr(budget, "measure_matmul_flops", lambda ctx: 1e11)
    return measured


def test_formula_fits_the_measured_losses() -> None:
    for size, batch_size, losses in zip(
        (SIZES[0], (4, 4, 128, 128), *SIZES[3:]), (16, 8, 12, 8, 8), LOSSES, strict=False
    ):
        for steps, loss in losses:
            run = with_size(RunConfig(train=TrainConfig(steps=steps)), set(), *size[:4], batch_size)
            assert expected_loss(run, 1_003_854) == pytest.approx(loss, rel=0.03)


def choose(config: RunConfig, data: Any, *given: str, ctx: DistContext = CPU, epochs: float = math.inf) -> Any:
    """The config and the deadline."""
    return search(config, ctx, data, 3.0, {"train.minutes", *given}, epochs)


def test_time_is_filled_and_more_of_it_takes_larger_models(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = []
    for count, flops in ((0.5, 1e11), (5, 1e11), (60, 1e11), (60, 1e13)):
        measured = fake_speed(monkeypatch, flops)
        config, deadline = choose(minutes(count), corpus(100_000_000))
        train, left = config.train, deadline.end - time.perf_counter()
        assert 0.75 * left < train.steps * step_flops(config, 65) / flops < left < 60 * count - 3 - budget.FIXED_SECONDS
        assert 3.9 < train.steps / train.eval_every <= 20 and train.minutes == 0 and not config.problems()
        assert ROUNDS <= len(measured) <= ROUNDS + 2
        assert f"plan    {count:g} min" in capsys.readouterr().out
        sizes.append(config.model.n_layers * config.model.d_model**2)
    assert sizes == sorted(sizes) and len(set(sizes)) >= 3


def test_choice_is_that_of_measured_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one thread 2 layers are better in a minute on most texts, 3 in two (Python's library 1.39 and 1.55 bits/byte)."""
    speeds = {(3, 64): 38_000, (2, 128): 35_000, (3, 128): 26_000, (4, 192): 11_000}  # tokens/s

    def measure(config: RunConfig, *rest: object) -> float:
        shape = config.model
        return config.train.batch_size * shape.context / speeds.get((shape.n_layers, shape.d_model), 4_000)

    monkeypatch.setattr(budget, "measure_step", measure)
    monkeypatch.setattr(budget, "measure_matmul_flops", lambda ctx: 1e11)
    assert [choose(minutes(m), corpus(1_313_576))[0].model.n_layers for m in (1, 2)] == [2, 3]


@pytest.mark.parametrize("epochs", [5.0, math.inf])
@pytest.mark.parametrize(
    "options",
    [
        {"model.d_model": 60, "model.n_heads": 3, "model.n_layers": 4},
        {"model.context": 128, "train.batch_size": 3, "train.eval_every": 7},
        {"optim.lr": 0.5, "optim.schedule": "cosine"},
    ],
)
def test_given_options_are_kept(options: dict[str, Any], epochs: float, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_speed(monkeypatch, 1e14)
    chosen = choose(replace_options(minutes(1), options), corpus(), *options, epochs=epochs)[0]
    assert chosen == replace_options(chosen, options) and not chosen.problems()
    step_tokens = chosen.train.batch_size * chosen.model.context
    assert chosen.train.steps <= max(MIN_STEPS, epochs * 1_003_854 / step_tokens)


def test_small_text_gets_a_small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_speed(monkeypatch)
    models = [choose(minutes(60), corpus(n))[0].model for n in (30_000, 300_000)]
    assert [model.d_model for model in models] == [64, 192]


def test_disturbed_round_does_not_choose_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_speed(monkeypatch)
    quiet, rounds = choose(minutes(5), corpus(100_000_000))[0], itertools.count()
    measure = budget.measure_step
    monkeypatch.setattr(budget, "measure_step", lambda *args: measure(*args) * (10 if next(rounds) == 0 else 1))
    assert choose(minutes(5), corpus(100_000_000))[0].model == quiet.model


def test_too_little_time_names_the_least(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fake_speed(monkeypatch)
    with pytest.raises(
        UserError, match=r"train.minutes is 0.05, too short for 50 steps: give at least 0\.\d$"
    ) as error:
        choose(minutes(0.05), corpus())
    assert search(minutes(0.05), CPU, corpus(), 3.0, set(), math.inf)[0].train.steps == MIN_STEPS  # by default
    fake_speed(monkeypatch, 1e8)
    capsys.readouterr()
    search(minutes(2), CPU, corpus(), 3.0, set(), math.inf)
    seconds = MIN_STEPS * step_flops(with_size(minutes(2), set(), *SIZES[0]), 65) / 1e8
    assert int(re.search(r"about (\d+) min for 50 steps", capsys.readouterr().out)[1]) > seconds / 60 > 3  # type: ignore[index]
    fake_speed(monkeypatch)
    enough = float(str(error.value).split()[-1])
    assert choose(minutes(enough), corpus())[0].train.steps >= MIN_STEPS


def test_short_texts_and_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_speed(monkeypatch)
    assert choose(minutes(60), corpus(100, 20))[0].model.context < 100
    with pytest.raises(UserError, match="has 60 tokens, and a context of 64 needs 65"):
        choose(minutes(60), corpus(60, 20))
    with pytest.raises(UserError, match="start without torchrun"):
        choose(minutes(2), corpus(), ctx=replace(CPU, world_size=2))


def test_other_steps_make_a_new_schedule(tmp_path: Path) -> None:
    config = replace_options(RunConfig(), {"train.steps": 600, "optim.decay_at": "300 500"})
    (tmp_path / "config.toml").write_text(to_toml(config))
    for argv in ([f"--run.resume={tmp_path}"], [str(tmp_path / "config.toml")]):
        assert parse_train(argv)[0].optim.decay_at == "300 500"
        assert parse_train([*argv, "--train.steps=900"])[0].optim.decay_at == ""


def planned(steps: int) -> RunConfig:
    return plan_decay(replace_options(RunConfig(), OPTIM), 0, steps)


def rates(config: RunConfig) -> list[float]:
    return [get_lr_scale(step, config.train.steps, config.optim) for step in range(config.train.steps)]


@settings(deadline=None)
@given(st.integers(1, 3000), st.floats(0, 1), st.lists(st.tuples(st.integers(0, 900), st.integers(0, 900)), max_size=5))
def test_looks_keep_the_learning_rates_of_past_steps(steps: int, share: float, looks: list[tuple[int, int]]) -> None:
    config, step = replace_options(RunConfig(), {**OPTIM, "optim.decay_fraction": share}), 0
    for done, more in [(0, steps), *looks]:
        step = min(step + done, max(config.train.steps, 1))
        before, config = config, plan_decay(config, step, max(1, step + more))
        assert not config.problems() and rates(config)[:step] == (rates(before)[:step] if step else [])
    falling = rates(config)[10:]
    assert falling == sorted(falling, reverse=True) and all(0 < scale <= 1 for scale in falling)


def test_planned_decay_is_nearly_linear() -> None:
    steady = rates(replace_options(planned(1000), {"optim.decay_at": ""}))
    assert rates(planned(1000)) == pytest.approx(steady, abs=0.051)


SPEEDS = {
    "as planned": lambda time: 1.0,
    "slow": lambda time: 3.0,
    "fast": lambda time: 0.3,
    "slow for a while": lambda time: 2.0 if 40 < time < 80 else 1.0,
    "slow in the decay": lambda time: 2.0 if time > 52 else 1.0,
    "fast in the decay": lambda time: 0.5 if time > 52 else 1.0,
    "long to compile": lambda time: 40.0 if time == 0 else 0.5,
}


@pytest.mark.parametrize("most", [1000, 120])
@pytest.mark.parametrize("seconds", SPEEDS.values(), ids=SPEEDS)
def test_run_ends_in_time(seconds: Any, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """100 steps of one second are planned; `seconds` is what a step takes at a time."""
    config = replace_options(planned(100), {"run.dir": str(tmp_path)})
    clock, trainer = [0.0], SimpleNamespace(config=config, state=SimpleNamespace(step=0))
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    deadline: Any = Deadline(100.0, most)
    taken = []
    while trainer.state.step < trainer.config.train.steps:
        taken.append(get_lr_scale(trainer.state.step, trainer.config.train.steps, trainer.config.optim))
        clock[0] += seconds(clock[0])
        trainer.state.step += 1
        deadline.on_step(trainer, {})
    assert taken == rates(trainer.config) and taken[-1] < 0.3
    assert abs(clock[0] - 100) < 5 or trainer.state.step == most == 120


def look_at_step_60(self: Deadline, trainer: Any, metrics: object) -> None:
    if trainer.state.step == 60:
        assert trainer.config.train.steps > 150
        trainer.config = plan_decay(trainer.config, 60, 130)


def test_killed_run_resumes_with_its_saved_options(tmp_path: Path) -> None:
    trainer = make_trainer(replace(TRAIN, save_every=3))
    trainer.config = config = replace_options(trainer.config, {"run.dir": str(tmp_path)})
    plan = SimpleNamespace(on_step=lambda *_: setattr(trainer, "config", plan_decay(config, 2, 9)))
    kill = SimpleNamespace(on_step=lambda *_: 1 / (trainer.state.step < 5))
    trainer.callbacks = [plan, kill, Checkpointer(config, trainer.ctx)]
    with pytest.raises(ZeroDivisionError):
        trainer.run()
    saved = open_checkpoint(tmp_path, "last")
    config = parse_train([f"--run.resume={tmp_path}"])[0]
    resumed: Any = SimpleNamespace(config=config, environment=saved.environment)
    assert config.train.steps == 9 and not describe_resuming(resumed, saved)


@pytest.mark.slow
def test_saved_config_reproduces_a_run_by_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a run that was stopped and resumed."""
    monkeypatch.setattr(budget, "SIZES", ((1, 2, 16, 16, 4), (1, 2, 32, 16, 4)))
    monkeypatch.setattr(budget, "measure_step", lambda *rest: 0.25)
    monkeypatch.setattr(Deadline, "on_step", look_at_step_60)
    text = tmp_path / "text.txt"
    text.write_text("The fox met the hen at the well. " * 400)
    options = [f"--data.source={text}", "--data.tokenizer=char", "--log.sample_tokens=0", "--train.minutes=1"]
    first, again = tmp_path / "first", tmp_path / "again"
    done = script("train.py", *options, f"--run.dir={first}", "--run.stop_at_step=115")
    assert done.returncode == 0 and "plan    1 min (" in done.stdout, done.stderr
    assert "--train.minutes=0.0" in read_toml(first / "config.toml")
    for option in ((f"--run.resume={first}",), (first / "config.toml", f"--run.dir={again}")):
        assert script("train.py", *option).returncode == 0
    one, two = (open_checkpoint(run, "last") for run in (first, again))
    assert one.state == two.state and one.state.step == 130
    assert (one.folder / "model.safetensors").read_bytes() == (two.folder / "model.safetensors").read_bytes()
