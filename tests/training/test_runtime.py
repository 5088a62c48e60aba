"""The parts of a run: learning rates, parameter groups, the machine's choices."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from data.tokenizer import ByteTokenizer
from model.config import ModelConfig
from model.gpt import GPT
from training import device
from training.config import OptimConfig, TrainConfig
from training.muon import Muon
from training.optimizer import Optimizer, get_lr_scale

CPU = torch.device("cpu")
SHAPE = ModelConfig(n_layers=2, n_heads=2, d_model=16, context=8, attention="eager")


def tiny() -> GPT:
    return GPT(SHAPE, ByteTokenizer().vocab_size)


@given(st.integers(1, 400), st.integers(0, 50), st.sampled_from(["linear", "cosine"]), st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_the_rate_rises_then_falls_and_never_leaves_its_bounds(
    steps: int, warmup: int, schedule: str, decay: float, final: float
) -> None:
    config = OptimConfig(warmup_steps=warmup, schedule=schedule, decay_fraction=decay, min_lr_ratio=final)  # type: ignore[arg-type]
    rates = [get_lr_scale(step, steps, config) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates)
    rising, falling = rates[: min(warmup, steps)], rates[warmup:]
    assert rising == sorted(rising) and falling == sorted(falling, reverse=True)


def test_the_rate_in_closed_form() -> None:
    config = OptimConfig(warmup_steps=4, schedule="linear", decay_fraction=0.5, min_lr_ratio=0.0)
    assert [get_lr_scale(step, 20, config) for step in (0, 3, 4, 10, 15, 19)] == [0.2, 0.8, 1, 1, 0.5, 0.1]
    assert get_lr_scale(12, 20, replace(config, schedule="cosine")) == pytest.approx(0.5)


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_every_parameter_has_one_optimizer_and_only_matrices_decay(name: str) -> None:
    model = tiny()
    optimizer = Optimizer(model, OptimConfig(optimizer=name))  # type: ignore[arg-type]
    found = [
        (p, group["weight_decay"]) for part in optimizer.parts for group in part.param_groups for p in group["params"]
    ]
    assert {id(p) for p, _ in found} == {id(p) for p in model.parameters()} and len(found) == len(
        set(map(id, model.parameters()))
    )
    assert all((decay > 0) == (p.dim() >= 2) for p, decay in found)
    muon = [p for part in optimizer.parts if isinstance(part, Muon) for g in part.param_groups for p in g["params"]]
    inside = [p for p in model.blocks.parameters() if p.dim() == 2]
    assert {id(p) for p in muon} == ({id(p) for p in inside} if name == "muon" else set())


def stepped(model: GPT, optimizer: Optimizer, times: int) -> None:
    tokens = torch.arange(8)[None]
    for _ in range(times):
        model(tokens).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_moments_survive_being_saved(name: str) -> None:
    config = OptimConfig(optimizer=name)  # type: ignore[arg-type]
    model, other = tiny(), tiny()
    optimizer = Optimizer(model, config)
    stepped(model, optimizer, 2)
    other.load_state_dict(model.state_dict())
    again = Optimizer(other, config)
    again.load_state_dict({key: value.clone() for key, value in optimizer.state_dict().items()})
    stepped(model, optimizer, 2)
    stepped(other, again, 2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("damage", ["missing", "extra", "shape"])
def test_moments_of_another_model_are_refused(damage: str) -> None:
    model = tiny()
    optimizer = Optimizer(model, OptimConfig())
    stepped(model, optimizer, 1)
    state = optimizer.state_dict()
    key = next(key for key, value in state.items() if value.dim() == 2)
    if damage == "missing":
        state = {k: v for k, v in state.items() if not k.startswith(key.partition("/")[0])}
    elif damage == "extra":
        state["nobody.weight/exp_avg"] = torch.zeros(2)
    else:
        state[key] = torch.zeros(3, 5)
    with pytest.raises(ValueError):
        Optimizer(tiny(), OptimConfig()).load_state_dict(state)


def test_kernels_are_chosen_for_the_machine_unless_they_are_named() -> None:
    auto = replace(SHAPE, attention="auto")
    assert device.resolve_attention(auto, CPU, torch.bfloat16).attention == "chunked"
    assert device.resolve_attention(auto, CPU, torch.float32).attention == "sdpa"
    assert device.resolve_attention(auto, torch.device("cuda"), torch.bfloat16).attention == "sdpa"
    assert device.resolve_attention(SHAPE, torch.device("cuda"), torch.bfloat16).attention == "eager"


def test_compiling_has_to_be_earned(monkeypatch: pytest.MonkeyPatch) -> None:
    train = TrainConfig()
    assert not device.should_compile(train, 50.0, CPU)  # the quickstart: a minute saves nothing
    monkeypatch.setattr(device.shutil, "which", lambda name: "/usr/bin/c++")
    assert device.should_compile(train, 3600.0, CPU)
    monkeypatch.setattr(device.shutil, "which", lambda name: None)
    assert not device.should_compile(train, 3600.0, CPU)
    assert device.should_compile(replace(train, compile="on"), 1.0, CPU)
    assert not device.should_compile(replace(train, compile="off"), 1e9, CPU)


def test_a_compiler_that_fails_costs_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(model: nn.Module) -> nn.Module:
        raise RuntimeError("no compiler here\nand a long trace")

    monkeypatch.setattr(torch, "compile", broken)
    model = tiny()
    ctx = device.DistContext(CPU, torch.float32)
    assert device.compile_model(model, torch.zeros(1, 8, dtype=torch.long), ctx) == (model, False)
    assert capsys.readouterr().err == "torch.compile failed, training continues without it: no compiler here\n"
