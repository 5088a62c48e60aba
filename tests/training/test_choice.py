"""What a run leaves to the machine: measured, clearly better or left alone, remembered, and kept when it is resumed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from model.config import ModelConfig
from tests.runs import TINY, script
from training import choice
from training.checkpoint import open_checkpoint, steps_in
from training.choice import choose_way, clearly_fastest, compiled_if_faster
from training.config import RunConfig, RunSettings, TrainConfig
from training.device import DistContext
from training.way import Choice, Way

CPU = DistContext(torch.device("cpu"), torch.float32)
LOW = replace(CPU, dtype=torch.bfloat16)
SHAPE = ModelConfig(n_layers=3, n_heads=2, d_model=16, context=16)
LONG = RunConfig(model=SHAPE, train=TrainConfig(steps=10**9, batch_size=4))
BEGUN = {"device": "cpu", "dtype": "bfloat16", "attention": "eager", "threads": "1"}
Times = Callable[[Way], float]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, and a user who says nothing of threads."""
    monkeypatch.setenv("GLASSGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Way]]:
    """Let ways take the times of a function, on a machine of so many threads; the ways that are tried, in order."""

    def set_up(seconds: Times, threads: int = 2) -> list[Way]:
        tried: list[Way] = []

        def layer(config: RunConfig, ctx: DistContext, way: Way, rows: int) -> Way:
            tried.append(way)
            return way

        def timed(works: dict[Way, Way], ctx: DistContext) -> dict[Way, list[float]]:
            return {way: [seconds(way)] * choice.ROUNDS for way in works}

        monkeypatch.setattr(choice, "layer", layer)
        monkeypatch.setattr(choice, "timed", timed)
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
        return tried

    return set_up


def chosen(config: RunConfig = LONG, ctx: DistContext = CPU, begun: dict[str, str] | None = None) -> Choice:
    return choose_way(config, ctx, 100, config.train.batch_size, begun or {})


def test_a_short_run_goes_by_the_rules(pretend: Callable[..., list[Way]], cache: Path) -> None:
    tried = pretend(lambda way: 1.0)
    assert chosen(replace(LONG, train=TrainConfig(steps=10))) == choice.by_rule(LONG, CPU, 100)
    assert not tried and not cache.exists()


def test_the_rule_stays_where_nothing_is_clearly_faster(pretend: Callable[..., list[Way]]) -> None:
    pretend(lambda way: 1.0 if way == Way("fp32", "sdpa", 2) else 0.9)
    assert chosen().way == Way("fp32", "sdpa", 2)
    assert chosen(replace(LONG, train=replace(LONG.train, batch_size=8)), LOW).way == Way("bf16", "chunked", 2)


@pytest.mark.parametrize("best", [Way("fp32", "chunked", 2), Way("bf16", "chunked", 2), Way("bf16", "sdpa", 2)])
def test_what_is_clearly_faster_is_taken(pretend: Callable[..., list[Way]], best: Way) -> None:
    pretend(lambda way: 0.5 if way == best else 1.0)
    found = chosen()
    assert (
        found.way == best and found.others["fp32 sdpa".replace(best.dtype, "").replace(best.attention, "").strip()] == 2
    )
    assert found.way.machine(CPU).dtype == (torch.bfloat16 if best.dtype == "bf16" else torch.float32)
    assert found.way.model(SHAPE).attention == best.attention
    assert "2 x" in found.said()


def test_what_the_user_says_is_not_tried_otherwise(pretend: Callable[..., list[Way]]) -> None:
    tried = pretend(lambda way: 0.1 if way.dtype == "bf16" or way.threads < 16 else 1.0, threads=16)
    asked = replace(LONG, train=replace(LONG.train, dtype="fp32"), run=RunSettings(threads=16))
    asked = replace(asked, model=replace(SHAPE, attention="eager"))
    assert chosen(asked).way == Way("fp32", "eager", 16)
    assert set(tried) == {Way("fp32", "eager", 16)}


def test_threads_are_halved_as_long_as_fewer_are_faster(pretend: Callable[..., list[Way]]) -> None:
    tried = pretend(lambda way: {16: 1.0, 8: 0.7, 4: 0.6, 2: 0.1}[way.threads], threads=16)
    found = chosen()
    assert found.way.threads == 8 and {way.threads for way in tried} == {16, 8, 4}
    assert found.others["16 threads"] == pytest.approx(1 / 0.7) and found.others["4 threads"] == pytest.approx(6 / 7)
    pretend(lambda way: 1 / way.threads if way.threads > 4 else 0.001, threads=4)  # few always pay
    assert chosen(replace(LONG, train=replace(LONG.train, batch_size=8))).way.threads == 4


def test_threads_that_the_environment_names_are_kept(
    pretend: Callable[..., list[Way]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "16")
    pretend(lambda way: float(way.threads), threads=16)
    assert chosen().way.threads == 16


def test_a_moment_of_other_work_decides_nothing() -> None:
    assert clearly_fastest({"rule": [1.0, 1.0, 5.0], "other": [0.95, 0.95, 0.95]}) == "rule"
    assert clearly_fastest({"rule": [1.0, 9.0, 9.0], "other": [0.9, 0.9, 0.9]}) == "rule"
    assert clearly_fastest({"rule": [2.0, 9.0, 9.0], "other": [0.9, 0.9, 0.9], "best": [0.8, 0.8, 7.0]}) == "best"
    assert clearly_fastest({"rule": [2.0, 2.0, 2.0], "gave up": [0.1]}) == "rule"


def test_the_same_command_goes_the_same_way_again(pretend: Callable[..., list[Way]], cache: Path) -> None:
    pretend(lambda way: 0.5 if way.dtype == "bf16" else 1.0)
    before = chosen()
    tried = pretend(lambda way: 0.5 if way.dtype == "fp32" else 1.0)
    assert chosen() == before and not tried
    assert before.way.dtype == "bf16" and [path.suffix for path in (cache / "ways").iterdir()] == [".json"]
    for other in (
        replace(LONG, model=replace(SHAPE, context=8)),
        replace(LONG, train=replace(LONG.train, batch_size=2)),
    ):
        assert chosen(other).way.dtype == "fp32" and tried
        tried.clear()


@pytest.mark.parametrize(
    "damage",
    [
        *("", "{", "[]", "null", '"x"', "{}"),
        *({"token": None}, {"others": {"\x1b[31m": 1.0}}, {"others": []}),
        *({"way": {"dtype": "fp8", "attention": "sdpa", "threads": 2}}, {"way": {}}),
        *({"way": {"dtype": "fp32", "attention": "rm -rf", "threads": 2}},),
        *({"way": {"dtype": "fp32", "attention": "sdpa", "threads": n}} for n in (0, 3, 10**9, "many")),
    ],
)
def test_what_cannot_be_taken_is_measured_again(
    pretend: Callable[..., list[Way]], cache: Path, damage: str | dict[str, object]
) -> None:
    tried = pretend(lambda way: 1.0)
    good = chosen()
    (path,) = (cache / "ways").iterdir()
    tables = json.loads(path.read_text("utf-8"))
    path.write_text(damage if isinstance(damage, str) else json.dumps({**tables, **damage}), "utf-8")
    tried.clear()
    assert chosen() == good and tried
    assert json.loads(path.read_text("utf-8")) == tables


def test_a_cache_that_cannot_be_written_costs_only_the_memory(pretend: Callable[..., list[Way]], cache: Path) -> None:
    cache.write_text("a file where the folder should be", "utf-8")
    tried = pretend(lambda way: 1.0)
    assert chosen() == chosen() and len(tried) == 8


def test_a_resumed_run_goes_on_as_it_began(pretend: Callable[..., list[Way]], monkeypatch: pytest.MonkeyPatch) -> None:
    tried = pretend(lambda way: 1.0)
    monkeypatch.setattr(choice, "bf16_is_fast", lambda device: True)
    assert chosen(begun=BEGUN).way == Way("bf16", "eager", 1)
    assert chosen(ctx=LOW, begun={**BEGUN, "dtype": "float32"}).way == Way("fp32", "eager", 1)
    assert chosen(begun={"device": "cpu"}).way == Way("fp32", "sdpa", 2)  # an old checkpoint says no more
    assert chosen(begun={**BEGUN, "threads": "64"}).way.threads == 2
    asked = replace(LONG, train=replace(LONG.train, dtype="fp32"), model=replace(SHAPE, attention="sdpa"))
    assert chosen(replace(asked, run=RunSettings(threads=2)), begun=BEGUN).way == Way("fp32", "sdpa", 2)
    assert not tried
    monkeypatch.setattr(choice, "bf16_is_fast", lambda device: False)
    assert chosen(begun=BEGUN).way == Way("fp32", "eager", 1)  # a machine on which bf16 would take for ever


def test_a_run_from_another_kind_of_machine_is_measured(pretend: Callable[..., list[Way]]) -> None:
    tried = pretend(lambda way: 1.0)
    assert chosen(begun={**BEGUN, "device": "cuda"}).way == Way("fp32", "sdpa", 2) and tried


def test_real_passes_are_measured_and_leave_no_trace() -> None:
    torch.manual_seed(3)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    found = choice.measure(LONG, CPU, choice.by_rule(LONG, CPU, 100), 4)
    assert torch.equal(torch.get_rng_state(), before) and torch.get_num_threads() == threads
    assert found.token > 0 and len(found.others) == 3 and min(found.others.values()) > 0


def test_hopeless_ways_are_tried_once() -> None:
    calls = {"rule": 0, "slow": 0, "near": 0}

    def work(name: str, seconds: float) -> Callable[[], None]:
        def sleep() -> None:
            calls[name] += 1
            time.sleep(seconds)

        return sleep

    found = choice.timed({"rule": work("rule", 0.01), "slow": work("slow", 0.1), "near": work("near", 0.01)}, CPU)
    assert calls == {"rule": choice.ROUNDS + 1, "slow": 2, "near": choice.ROUNDS + 1}
    assert len(found["slow"]) == 1 and found["slow"][0] > 0.09


class Sleeper(nn.Module):
    """A model whose step takes so long."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds, self.weight = seconds, nn.Parameter(torch.ones(1))

    def forward(self, tokens: Tensor) -> Tensor:
        time.sleep(self.seconds)
        return self.weight * tokens


@pytest.mark.parametrize("slower", [0.002, 0.03])
def test_compiled_only_where_that_is_faster(monkeypatch: pytest.MonkeyPatch, slower: float) -> None:
    model, fast = Sleeper(0.012), Sleeper(slower)

    def compiled(model: nn.Module, example: Tensor, ctx: DistContext) -> nn.Module:
        torch.use_deterministic_algorithms(True, warn_only=True)
        return fast

    monkeypatch.setattr(choice, "compile_model", compiled)
    try:
        taken = compiled_if_faster(model, torch.ones(2, 4), CPU)
        assert taken is (fast if slower < 0.012 else model)
        assert torch.are_deterministic_algorithms_enabled() == (taken is fast)
        assert model.weight.grad is None and fast.weight.grad is None
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_run_says_what_it_measured_and_repeats_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat. " * 200, "utf-8")
    monkeypatch.setattr(choice, "WORTH", 0.0)
    runs = [tmp_path / "one", tmp_path / "two"]
    options = (*TINY, f"--data.source={text}")
    told = [script("train.py", *options, f"--run.dir={run}") for run in runs]
    lines = [next(line for line in one.stdout.splitlines() if line.startswith("machine")) for one in told]
    assert lines[0] == lines[1] and "; measured beside it: " in lines[0]
    hows = [open_checkpoint(steps_in(run / "checkpoints")[-1]).origin.how for run in runs]
    assert hows[0] == hows[1]
    monkeypatch.setattr(choice, "measure", None)  # a resumed run has nothing to measure
    again = script("train.py", f"--run.resume={runs[0]}", "--train.steps=9")
    assert again.returncode == 0, again.stderr
    assert "another path" not in again.stdout and "measured" not in again.stdout
