"""`train.minutes`: what is chosen, from what was measured, and what contradicts it."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from benchmarks import sizes
from common.errors import UserError
from model.config import ModelConfig
from tests.runs import script
from training import speed
from training import time_budget as budget
from training.cli import option_types
from training.config import MINUTES_DECIDE, RunConfig, TrainConfig, parse_train
from training.device import DistContext
from training.speed import Speed
from training.time_budget import SIZES, Size, choose, expected_loss, offer, useful_tokens

CPU = DistContext(torch.device("cpu"), torch.float32)
TINY = ModelConfig(n_layers=1, n_heads=2, d_model=16, context=16, attention="eager")
TEXT, HELD_OUT = 1_003_854, 111_540
"""Tokens of Tiny Shakespeare."""
KNOWN = [(i, steps, loss) for i, size in enumerate(SIZES) for steps, loss in size.losses]


def minutes(count: float) -> RunConfig:
    return RunConfig(train=TrainConfig(minutes=count))


def as_fast(factor: float, monkeypatch: pytest.MonkeyPatch) -> list[Size]:
    """Let every size be `factor` times as fast as where the table was measured; those that get measured, in order."""
    asked = []

    def speed(size: Size, *rest: object) -> Speed:
        asked.append(size)
        return Speed(size.seconds / factor, size.seconds / factor / size.batch_size / 3, "", 1e11)

    monkeypatch.setattr(budget, "speed", speed)
    return asked


@pytest.mark.parametrize("seconds", sizes.SECONDS)
def test_the_size_chosen_learns_as_well_as_the_best_of_the_table(
    seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the table was measured, for each of its times: within 2% of the best size's own loss, not the formula's."""
    measured = {i: loss for i, steps, loss in KNOWN if round(seconds / SIZES[i].seconds) == steps}
    assert len(measured) >= 3
    for fixed in ("BEGIN", "LOOK", "FINISH", "PASSES_A_HEAD", "EVALUATED", "FINAL_TARGETS"):
        monkeypatch.setattr(budget, fixed, 0)
    offers = [offer(SIZES[i], {}, seconds, TEXT, HELD_OUT) for i in measured]
    best = min(offers, key=lambda one: one.loss)
    assert measured[SIZES.index(best.size)] <= 1.02 * min(measured.values())


def test_the_formula_is_the_fit_of_the_table() -> None:
    e, a, alpha, b, beta = sizes.fit(sizes.points(KNOWN))
    assert (alpha, beta) == pytest.approx((budget.SIZE_POWER, budget.TOKEN_POWER), abs=1e-9)
    assert (e, a, b) == pytest.approx((budget.ENTROPY, budget.OF_SIZE, budget.OF_TOKENS), rel=1e-3)


def test_a_formula_is_found_again_from_its_own_values() -> None:
    law = (1.2, 9.0, 0.31, 700.0, 0.52)
    grid = [(n, d) for n in (10**5, 10**6, 10**7) for d in (10**5, 10**6, 10**7)]
    known = [(n, d, law[0] + law[1] / n ** law[2] + law[3] / d ** law[4]) for n, d in grid]
    assert sizes.fit(known) == pytest.approx(law, rel=1e-6)


@given(st.integers(1000, 10**9), st.floats(1, 200))
def test_repeating_a_text_teaches_less_and_less(text: int, times: float) -> None:
    useful = useful_tokens(times * text, text)
    assert useful <= times * text * (1 + 1e-12)
    assert useful_tokens(0.9 * text, text) == 0.9 * text
    assert useful <= text * (1 + budget.REPEATS_WORTH)
    assert useful_tokens((times + 1) * text, text) > useful


@given(st.integers(10**4, 10**9), st.floats(1e4, 1e10))
def test_more_weights_and_more_tokens_are_expected_to_help(weights: int, tokens: float) -> None:
    loss = expected_loss(weights, tokens)
    assert expected_loss(2 * weights, tokens) < loss and expected_loss(weights, 2 * tokens) < loss


@pytest.mark.parametrize("count", [0.5, 1, 2, 5, 20, 120])
@pytest.mark.parametrize("factor", [0.2, 1, 5, 500])
def test_the_time_is_filled_and_not_exceeded(count: float, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    as_fast(factor, monkeypatch)
    try:
        config, _, end = choose(minutes(count), CPU, 65, TEXT, HELD_OUT, spent=3.0)
    except UserError:
        assert count * factor < 1
        return
    train, model = config.train, config.model
    size = next(s for s in SIZES if (s.n_layers, s.d_model) == (model.n_layers, model.d_model))
    taken = next(one for one in budget_offers(count * 60 - 3, factor) if one.size == size)
    total = 3 + taken.fixed + train.steps * taken.step
    assert 0.98 * 60 * count - taken.step < total <= 60 * count
    look = budget.LOOK + budget.EVALUATED / size.context * taken.step / size.batch_size / 3
    early = budget.BEGIN + (taken.evaluations - 2) * look
    assert end - time.perf_counter() == pytest.approx(60 * count - 3 - (taken.fixed - early), abs=0.5)
    assert train.batch_size == size.batch_size and model.context == size.context
    assert train.eval_every * budget.MOST_EVALUATIONS >= train.steps and not config.problems()


def budget_offers(seconds: float, factor: float) -> list[budget.Offer]:
    known = {s: Speed(s.seconds / factor, s.seconds / factor / s.batch_size / 3, "", 1e11) for s in SIZES}
    return [offer(size, known, seconds, TEXT, HELD_OUT) for size in SIZES]


def test_more_time_and_a_faster_machine_take_larger_models(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    for count, factor in ((0.5, 1), (5, 1), (60, 1), (60, 100)):
        as_fast(factor, monkeypatch)
        config, *_ = choose(minutes(count), CPU, 65, 100 * TEXT, HELD_OUT, 3.0)
        taken.append(config.model.n_layers * config.model.d_model**2)
    assert taken == sorted(taken) and len(set(taken)) >= 3


def test_only_sizes_in_question_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = as_fast(1.3, monkeypatch)
    config, lines, _ = choose(minutes(2), CPU, 65, TEXT, HELD_OUT, 3.0)
    assert 1 <= len(asked) <= 3 and len(set(asked)) == len(asked)
    assert config.model.d_model in {size.d_model for size in asked}
    marked = [line for line in lines if line.lstrip().startswith(">")]
    assert len(marked) == 1 and str(config.model.d_model) in marked[0].split()


def test_what_is_decided_is_all_that_is_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever may not stand beside train.minutes, and nothing else but the minutes themselves and the compiler."""
    as_fast(1.0, monkeypatch)
    odd = replace(minutes(2), model=replace(RunConfig().model, preset="qwen3", n_heads=3, n_kv_heads=1, dropout=0.1))
    config, *_ = choose(odd, CPU, 65, TEXT, HELD_OUT, 3.0)

    def value(of: RunConfig, option: str) -> object:
        section, _, name = option.partition(".")
        return getattr(getattr(of, section), name)

    assert {f"optim.{name}" for name in budget.RECIPE} == {o for o in MINUTES_DECIDE if o.startswith("optim.")}
    changed = {option for option in option_types(RunConfig) if value(config, option) != value(odd, option)}
    assert changed <= {*MINUTES_DECIDE, "train.minutes", "train.compile"}
    assert config.train.minutes == 0 and config.model.dropout == 0.1 and config.model.preset == "qwen3"


def with_a_compiler(gain: float, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Steps that torch.compile makes `gain` times as fast; what was measured, by the switch's position."""
    asked = []

    def speed(size: Size, config: RunConfig, *rest: object) -> Speed:
        asked.append(config.train.compile)
        factor = gain if config.train.compile == "on" else 1.0
        return Speed(size.seconds / factor, size.seconds / size.batch_size / 3, "", 1e11)

    monkeypatch.setattr(budget, "speed", speed)
    monkeypatch.setattr(budget, "has_compiler", lambda device: True)
    return asked


def test_the_compiler_is_taken_where_it_is_measured_to_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = with_a_compiler(1.25, monkeypatch)
    config, lines, _ = choose(minutes(10), CPU, 65, 10 * TEXT, HELD_OUT, 3.0)
    assert config.train.compile == "on" and asked[-2:] == ["on", "off"] and "on" not in asked[:-2]
    assert any("compiled steps of" in line for line in lines)
    size = next(size for size in SIZES if size.d_model == config.model.d_model)
    fixed = next(one for one in budget_offers(600 - 3 - budget.AGAIN, 1.0) if one.size == size).fixed
    total = 3 + budget.AGAIN + fixed + config.train.steps * size.seconds / 1.25
    assert 0.98 * 600 < total <= 600


@pytest.mark.parametrize("gain", [0.5, 1.0, 1.01])
def test_the_compiler_is_left_out_where_it_does_not_pay(gain: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundredth of ten minutes is less than compiling takes once more."""
    asked = with_a_compiler(gain, monkeypatch)
    config, lines, _ = choose(minutes(10), CPU, 65, 10 * TEXT, HELD_OUT, 3.0)
    assert config.train.compile == "off" and "on" in asked
    assert not any("compiled" in line for line in lines)


def test_the_compiler_is_not_even_measured_where_it_cannot_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = with_a_compiler(2.0, monkeypatch)
    choose(minutes(2), CPU, 65, TEXT, HELD_OUT, 3.0)  # too short
    off = replace(minutes(10), train=TrainConfig(minutes=10, compile="off"))
    assert choose(off, CPU, 65, TEXT, HELD_OUT, 3.0)[0].train.compile == "off"
    monkeypatch.setattr(budget, "has_compiler", lambda device: False)
    assert choose(minutes(10), CPU, 65, TEXT, HELD_OUT, 3.0)[0].train.compile == "off"
    assert "on" not in asked


def test_who_asks_for_the_compiler_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with_a_compiler(0.9, monkeypatch)
    on = replace(minutes(2), train=TrainConfig(minutes=2, compile="on"))
    assert choose(on, CPU, 65, TEXT, HELD_OUT, 3.0)[0].train.compile == "on"


@pytest.mark.parametrize("switch", ["on", "off", "auto"])
def test_a_step_is_measured_as_it_will_be_taken(
    switch: Literal["on", "off", "auto"], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the compiler if, and only if, the config says so."""
    ran = []

    def compiled(model: nn.Module, example: torch.Tensor, ctx: DistContext) -> nn.Module:
        assert example.shape == (4, 16)
        fast = nn.Sequential(model)
        fast.register_forward_hook(lambda *_: ran.append(1))
        return fast

    monkeypatch.setattr(speed, "compile_model", compiled)
    config = replace(RunConfig(), train=TrainConfig(batch_size=4, compile=switch), model=TINY)
    found = speed.measured(config, 65, CPU, 4, 0.05)
    assert found.step > 0
    assert len(ran) >= speed.WARM_UP + speed.AT_LEAST if switch == "on" else not ran


def test_too_little_time_says_how_much_would_do(monkeypatch: pytest.MonkeyPatch) -> None:
    as_fast(1.0, monkeypatch)
    with pytest.raises(
        UserError, match=r"train.minutes is 0.05, which is too short: .* give at least (0\.\d)$"
    ) as told:
        choose(minutes(0.05), CPU, 65, TEXT, HELD_OUT, 3.0)
    enough = float(str(told.value).split()[-1])
    config, *_ = choose(minutes(enough), CPU, 65, TEXT, HELD_OUT, 3.0)
    assert config.train.steps >= budget.FEWEST_STEPS


def test_a_text_has_to_fill_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    as_fast(1.0, monkeypatch)
    config, *_ = choose(minutes(60), CPU, 65, 100, 20, 3.0)
    assert config.model.context < 100
    with pytest.raises(UserError, match="is 60 tokens long"):
        choose(minutes(60), CPU, 65, 60, 20, 3.0)


def test_several_processes_are_refused() -> None:
    with pytest.raises(UserError, match="leave torchrun out"):
        choose(minutes(2), replace(CPU, world_size=2), 65, TEXT, HELD_OUT, 3.0)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--train.minutes=2", "--train.steps=100"], "train.minutes chooses train.steps itself"),
        (["--train.minutes", "2", "--model.d_model", "64"], "train.minutes chooses model.d_model itself"),
        (["--train.minutes=-1"], "train.minutes is -1.0; it must be at least 0"),
        (["--train.minutes=nan"], "train.minutes is nan"),
        (["--train.minutes=inf"], "train.minutes is inf"),
    ],
)
def test_what_contradicts_it_is_named(words: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        parse_train(words)


def test_a_file_may_name_the_minutes_and_not_the_steps(tmp_path: Path) -> None:
    (tmp_path / "both.toml").write_text("[train]\nminutes = 2\nsteps = 100\n")
    (tmp_path / "one.toml").write_text("[train]\nminutes = 2\n")
    with pytest.raises(UserError, match=r"chooses train.steps itself"):
        parse_train([str(tmp_path / "both.toml")])
    assert parse_train([str(tmp_path / "one.toml")])[0].train.minutes == 2
    with pytest.raises(UserError, match=r"chooses optim.lr itself"):
        parse_train([str(tmp_path / "one.toml"), "--optim.lr=0.1"])


def test_a_plan_may_be_for_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_fast(1.0, monkeypatch)
    done = script("train.py", "--train.minutes=2", "--plan=h100")
    assert done.returncode == 2 and "leave out the name after --plan" in done.stderr
