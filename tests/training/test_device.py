"""Attention implementation, compilation, memory: what is chosen, and what is printed when memory runs out."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from common.errors import CONFIG, DISK_OR_MEMORY
from model.config import ModelConfig
from model.gpt import GPT
from tests.runs import user_error
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


def test_device_is_chosen_or_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    for name, found in (("mps", torch.backends.mps), ("cuda", torch.cuda)):
        monkeypatch.setattr(found, "is_available", lambda: False)
        with user_error(CONFIG, f"there is no {name} device: PyTorch .* use auto or cpu"):
            device.get_dist_context(device=name)
        assert device.resolve_device() == CPU
        monkeypatch.setattr(found, "is_available", lambda: True)
        assert device.resolve_device(name).type == name and device.resolve_device("cpu") == CPU
    assert device.resolve_device() == torch.device("cuda", 3)


@pytest.mark.parametrize(
    ("bf16", "capability", "expected"), [(True, (8, 0), "bf16"), (False, (7, 5), "fp16"), (False, (6, 1), "fp32")]
)
def test_dtype_is_what_the_gpu_multiplies_natively(
    bf16: bool, capability: tuple[int, int], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert device.auto_dtype(CUDA)[0] == expected and device.auto_dtype(torch.device("mps"))[0] == "fp32"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": bf16})
    ctx = device.get_dist_context(device="cpu")
    assert ctx.dtype == (torch.bfloat16 if bf16 else torch.float32) and ("bf16 (AVX512" in ctx.describe()) == bf16
    assert "fp16 (train.dtype)" in device.get_dist_context("fp16").describe()


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
        with user_error(DISK_OR_MEMORY, advice), advise_on_oom(rows, 64):
            exhaust()
    with pytest.raises(RuntimeError, match="shapes"), advise_on_oom(16, 64):
        raise RuntimeError("shapes do not fit")
