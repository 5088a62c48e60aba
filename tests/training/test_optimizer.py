"""Learning rates, parameter groups, optimizer state; AdamW and Muon equal torch's bit for bit."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from model.config import ModelConfig
from model.gpt import GPT
from training import muon
from training.config import OptimConfig
from training.optimizer import Optimizer, get_lr_scale

MODEL = ModelConfig(n_layers=2, n_heads=2, d_model=16, context=8, attention="eager")
SHAPES = [(24, 8), (8, 24), (16, 16), (8, 24), (24, 8), (24, 8), (1, 8), (8, 1), (24, 8)]
"""Tall, wide and square, in an order that mixes those of one shape with others."""


@given(st.integers(1, 400), st.integers(0, 50), st.sampled_from(["linear", "cosine"]), st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_lr_rises_then_falls_within_its_bounds(
    steps: int, warmup: int, schedule: Any, decay: float, ratio: float
) -> None:
    config = OptimConfig(warmup_steps=warmup, schedule=schedule, decay_fraction=decay, min_lr_ratio=ratio)
    scales = [get_lr_scale(step, steps, config) for step in range(steps)]
    assert all(0 < scale <= 1 for scale in scales)
    rising, falling = scales[: min(warmup, steps)], scales[warmup:]
    assert rising == sorted(rising) and falling == sorted(falling, reverse=True)


def test_lr_in_closed_form() -> None:
    config = OptimConfig(warmup_steps=4, schedule="linear", decay_fraction=0.5, min_lr_ratio=0.0)
    assert [get_lr_scale(step, 20, config) for step in (0, 3, 4, 10, 15, 19)] == [0.2, 0.8, 1, 1, 0.5, 0.1]
    assert get_lr_scale(12, 20, replace(config, schedule="cosine")) == pytest.approx(0.5)


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_every_parameter_is_in_one_group_and_only_matrices_decay(name: Any) -> None:
    model = GPT(MODEL, 257)
    groups = Optimizer(model, OptimConfig(optimizer=name)).param_groups
    found = [(p, group) for group in groups for p in group["params"]]
    assert sorted(id(p) for p, _ in found) == sorted(id(p) for p in model.parameters())
    assert all((group["weight_decay"] > 0) == (p.dim() >= 2) for p, group in found)
    inside = {id(p) for p in model.blocks.parameters() if p.dim() == 2}
    assert {id(p) for p, group in found if group["algorithm"] == "muon"} == (inside if name == "muon" else set())


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_saved_state_must_fit_the_model(name: Any) -> None:
    """tests/training/test_train.py restores what fits."""
    model = GPT(MODEL, 257)
    optimizer = Optimizer(model, OptimConfig(optimizer=name))
    model(torch.arange(8)[None]).square().mean().backward()
    optimizer.step()
    state = optimizer.state_dict()
    key = next(key for key, value in state.items() if value.dim() == 2)
    for wrong in ({**state, "other.weight/exp_avg": torch.zeros(3, 5)}, {**state, key: torch.zeros(3, 5)}, {}):
        with pytest.raises(ValueError):
            Optimizer(GPT(MODEL, 257), OptimConfig(optimizer=name)).load_state_dict(wrong)


@pytest.mark.parametrize(("name", "max_stack"), [("adamw", 1), ("muon", 2 * 24 * 8), ("muon", 1 << 22)])
def test_steps_equal_torchs(name: Any, max_stack: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters and state, bit for bit; with learning rates that change, gradients of every size, zero or missing."""
    monkeypatch.setattr(muon, "MAX_STACK", max_stack)
    generator = torch.Generator().manual_seed(1)
    shapes = SHAPES if name == "muon" else [*SHAPES, (8,), (5,)]
    model = nn.Module()
    model.blocks = nn.ParameterList([torch.randn(shape, generator=generator) for shape in shapes])
    copies = [nn.Parameter(p.detach().clone()) for p in model.parameters()]
    ours = Optimizer(model, OptimConfig(name, lr=0.01, muon_lr=0.01, weight_decay=0.1, beta1=0.8, momentum=0.9))
    groups = [{"params": [p for p in copies if p.dim() > 1]}, {"params": [p for p in copies if p.dim() == 1]}]
    groups[1]["weight_decay"] = 0.0  # type: ignore[assignment]
    reference: torch.optim.Optimizer
    if name == "muon":
        reference = torch.optim.Muon(copies, lr=0.01, weight_decay=0.1, momentum=0.9)
    else:
        reference = torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1, betas=(0.8, 0.95), fused=True)
    for step in range(5):
        for i, (a, b) in enumerate(zip(model.parameters(), copies, strict=True)):
            gradient = torch.randn(a.shape, generator=generator) * 10.0 ** (i - 4) * (i != 3)
            a.grad, b.grad = (None, None) if i == step else (gradient, gradient.clone())
        ours.lr_scale = 1 / (step + 1)
        for group in reference.param_groups:
            group["lr"] = 0.01 * ours.lr_scale
        reference.step()
        ours.step()
    for a, b in zip(model.parameters(), copies, strict=True):
        assert torch.equal(a, b)
        assert ours.state[a].keys() == reference.state[b].keys()
        assert all(torch.equal(value, reference.state[b][key]) for key, value in ours.state[a].items())
