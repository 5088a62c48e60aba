"""Attention implementation, compilation, memory: what is chosen, and what is printed when memory runs out."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from common.errors import DISK_OR_MEMORY, UserError
from model.config import ModelConfig
from model.gpt import GPT
from training import device
from training.config import TrainConfig
from training.device import advise_on_oom

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MODEL = ModelConfig(n_layers=2, n_heads=2, d_model=16, context=8, attention="eager")


def test_attention_implementation_is_chosen_unless_named() -> None:
    auto = replace(MODEL, attention="auto")
    assert device.resolve_attention(auto, CPU, torch.bfloat16).attention == "chunked"
    assert device.resolve_attention(auto, CPU, torch.float32).attention == "sdpa"
    assert device.resolve_attention(auto, CUDA, torch.bfloat16).attention == "sdpa"
    assert device.resolve_attention(MODEL, CUDA, torch.bfloat16).attention == "eager"


def test_only_long_runs_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    train = TrainConfig()
    monkeypatch.setattr(device.shutil, "which", lambda name: "/usr/bin/c++")
    assert device.should_compile(train, 1e15, CPU) and not device.should_compile(train, 1e12, CPU)
    monkeypatch.setattr(device.shutil, "which", lambda name: None)
    assert not device.should_compile(train, 1e15, CPU)
    assert device.should_compile(replace(train, compile="on"), 1.0, CPU)
    assert not device.should_compile(replace(train, compile="off"), 1e20, CPU)


def test_failing_compiler_costs_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On the process where it fails; the others do not compile either."""

    class OtherFails(device.DistContext):
        def all_reduce_max(self, value: int) -> int:
            return 1

    def broken(model: nn.Module) -> nn.Module:
        raise RuntimeError("no compiler here\nand a long trace")

    model, example, ctx = GPT(MODEL, 257), torch.zeros(1, 8, dtype=torch.long), device.DistContext(CPU, torch.float32)
    monkeypatch.setattr(torch, "compile", nn.Sequential)
    assert device.compile_model(model, example, OtherFails(CPU, torch.float32)) == (model, False)
    compiled, is_compiled = device.compile_model(model, example, ctx)
    assert compiled is not model and is_compiled and all(p.grad is None for p in model.parameters())
    monkeypatch.setattr(torch, "compile", broken)
    assert device.compile_model(model, example, ctx) == (model, False)
    assert capsys.readouterr().err == "torch.compile failed, training continues without it: no compiler here\n"


def fail(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    "exhaust",
    [
        lambda: torch.empty(1 << 50),
        lambda: fail(MemoryError()),
        lambda: fail(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")),
    ],
)
def test_out_of_memory_names_the_micro_batch_to_try(exhaust: Callable[[], object]) -> None:
    for rows, advice in ((16, r"--train\.micro_batch_size 8, .* 64, or a sm"), (1, r"at once: lower .*sharding")):
        with pytest.raises(UserError, match=advice) as caught, advise_on_oom(rows, 64):
            exhaust()
        assert caught.value.exit_code == DISK_OR_MEMORY
    with pytest.raises(RuntimeError, match="shapes"), advise_on_oom(16, 64):
        raise RuntimeError("shapes do not fit")
