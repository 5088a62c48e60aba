"""Matrices laid out for writing (`model/quantize.py`): what comes out is near what fp32 gives, within bounds that follow
from the numbers' formats; fp32 itself stays fp32."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from model import quantize as stored
from model.generate import generate, last_logits
from model.gpt import GPT
from model.kv_cache import KVCache
from model.quantize import BlockedLinear, ByteLinear, HalfLinear, Stored, quantize_, to_int8
from tests.model.checks import PRESETS, normal, random_model, random_tokens
from tests.runs import TINY, said, script

HALF = 2.0**-11
"""Most that fp16 moves a number by, relative to it; 2^-25 where it is below the smallest normal one."""


def linear(outputs: int = 24, inputs: int = 40, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=bias)
    with torch.no_grad():
        layer.weight.copy_(normal(outputs, inputs) * torch.logspace(-3, 0, outputs)[:, None])
    return layer.requires_grad_(False)


@given(st.integers(0, 10_000), st.floats(1e-6, 1e3), st.integers(1, 9), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_no_weight_is_off_by_more_than_half_a_step(seed: int, scale: float, rows: int, columns: int) -> None:
    weight = scale * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    weight[0, : columns // 2] = 0
    numbers, step = to_int8(weight)
    assert numbers.dtype == torch.int8 and int(numbers.min()) >= -127
    assert torch.allclose(step, weight.abs().amax(1) / 127)
    assert ((numbers * step[:, None] - weight).abs() <= 0.5001 * step[:, None]).all()
    assert torch.equal(to_int8(-weight)[0], -numbers)  # symmetrical about 0


def test_a_row_of_zeros_stays_zero() -> None:
    numbers, step = to_int8(torch.zeros(2, 3))
    assert not numbers.any() and step.isfinite().all()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kernel", [True, False])
def test_fp16_is_off_by_its_last_bit(kernel: bool, bias: bool) -> None:
    if kernel and torch.backends.quantized.engine not in ("x86", "fbgemm"):
        pytest.skip("this processor has no such kernel")
    layer, x = linear(bias=bias), normal(2, 3, 40)
    off = (HalfLinear(layer, kernel)(x) - layer(x)).abs()
    grown = x.abs() @ layer.weight.abs().T
    # the kernel rounds weights alone; without it inputs and outputs are fp16, too
    assert (off <= (1.01 if kernel else 3.1) * HALF * grown + 1e-5).all()
    assert off.max() > 0


def test_a_weight_beyond_fp16_is_moved_to_its_end() -> None:
    layer = linear()
    layer.weight[3, 4] = -1e6
    for kernel in (True, False):
        if not kernel or torch.backends.quantized.engine in ("x86", "fbgemm"):
            x = torch.zeros(1, 40)
            x[0, 4] = 0.5
            assert abs(HalfLinear(layer, kernel)(x)[0, 3] + 0.5 * 65504 - layer.bias[3]) < 20


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kernel", [True, False])
def test_int8_is_off_by_half_a_step_of_weights_and_inputs(kernel: bool, bias: bool) -> None:
    layer, x = linear(bias=bias), normal(2, 3, 40)
    x[0, 1] *= 1000  # a loud position
    x[1, 2] = 0
    off = (ByteLinear(layer, kernel)(x) - layer(x)).abs()
    weight_step, input_step = to_int8(layer.weight)[1], x.abs().amax(-1, keepdim=True) / 127
    bound = x.abs().sum(-1, keepdim=True) * weight_step / 2
    if kernel:
        bound = bound + input_step / 2 * (layer.weight.abs().sum(1) + 40 * weight_step / 2)
    assert (off <= 1.001 * bound + 1e-4).all()
    assert off[0, 0].max() > 0


def test_inputs_are_rounded_to_the_nearest_step() -> None:
    layer = nn.Linear(3, 2, bias=False).requires_grad_(False)
    layer.weight.fill_(1.0)
    x = torch.tensor([[127.0, 0.6, 0.0], [127.0, -0.6, 0.4], [-127.0, 1.4, 0.0]])  # steps of 1
    assert torch.allclose(ByteLinear(layer, True)(x)[:, 0], torch.tensor([128.0, 126.0, -126.0]), atol=1e-3)


@pytest.mark.parametrize("kernel", [True, False])
def test_a_loud_position_costs_the_others_nothing(kernel: bool) -> None:
    layer, x = ByteLinear(linear(), kernel), normal(4, 40)
    louder = x.clone()
    louder[0] *= 1e4
    assert torch.equal(layer(x)[1:], layer(louder)[1:])


@pytest.mark.parametrize("rows", [1, 2, 17, 200])
def test_blocks_change_the_order_of_sums_alone(rows: int) -> None:
    layer, x = linear(50, 96), normal(1, rows, 96)
    grown = x.abs() @ layer.weight.abs().T
    assert ((BlockedLinear(layer)(x) - layer(x)).abs() <= 2e-7 * grown + 1e-6).all()


def laid(model: GPT, how: Stored, monkeypatch: pytest.MonkeyPatch) -> GPT:
    """A copy of the model, laid out as a large one would be."""
    monkeypatch.setattr(stored, "LARGE", 0)
    other = copy.deepcopy(model)
    quantize_(other, how)
    assert not isinstance(other.head, nn.Linear)  # something was done
    return other


def distance(one: Tensor, other: Tensor) -> float:
    """How far logits are apart, relative to their spread."""
    return float((one - other).abs().max() / other.std())


BOUNDS: dict[Stored, float] = {"fp32": 1e-5, "fp16": 0.01, "int8": 0.35}
"""Of a random model, whose attention is sharp and whose layers only add up errors: a hard case."""


@pytest.mark.parametrize("how", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("preset", PRESETS)
def test_logits_stay_near(preset: str, how: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = random_model(preset, "sdpa"), random_tokens(3, 12)
    other = laid(model, how, monkeypatch)
    with torch.no_grad():
        wanted = model(text)
        found = other(text)
    assert distance(found, wanted) < BOUNDS[how]
    if how != "fp32":
        assert distance(found, wanted) > 1e-5


@pytest.mark.parametrize("how", ["fp32", "fp16", "int8"])
def test_a_cache_changes_nothing_then_either(how: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = laid(random_model("gpt2", "sdpa"), how, monkeypatch), random_tokens(2, 20)
    cache = KVCache(model.config, 2, model.token_embedding.weight)
    with torch.no_grad():
        for length in (5, 6, 7, 20):
            found, wanted = last_logits(model, text[:, :length], cache), last_logits(model, text[:, :length])
            assert distance(found, wanted) < (0.05 if how == "int8" else 1e-4)


def test_fp32_writes_the_same_text(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = random_model("glass", "sdpa"), random_tokens(2, 4)
    texts = [
        torch.stack(list(generate(each, prompt, 60, torch.Generator().manual_seed(4), 0.8)))
        for each in (model, laid(model, "fp32", monkeypatch))
    ]
    assert torch.equal(*texts)


def test_a_small_model_keeps_its_bits() -> None:
    model, text = random_model("glass", "sdpa"), random_tokens(2, 9)
    other = copy.deepcopy(model)
    quantize_(other, "fp32")
    assert torch.equal(model(text), other(text))


@pytest.mark.parametrize("how", ["fp16", "int8"])
def test_the_embedding_and_what_is_small_stay_fp32(how: Stored) -> None:
    model = random_model("qwen3", "sdpa")
    before = {name: value.clone() for name, value in model.named_parameters()}
    quantize_(model, how)
    after = dict(model.named_parameters())
    assert set(after) == {name for name, value in before.items() if value.dim() < 2 or "embedding" in name}
    assert all(torch.equal(value, before[name]) for name, value in after.items())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized")
    (folder / "text.txt").write_text("The fox met the hen. The hen saw the fox. " * 60)
    done = script("train.py", f"--data.source={folder / 'text.txt'}", f"--run.dir={folder / 'run'}", *TINY)
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.mark.parametrize("how", ["fp32", "fp16", "int8"])
def test_sample_takes_each(run: Path, how: str) -> None:
    done = script("sample.py", run, "--prompt=The fox", "--tokens=20", f"--weights={how}")
    assert done.returncode == 0 and done.stdout.startswith("The fox"), done.stderr
    assert done.stdout == script("sample.py", run, "--prompt=The fox", "--tokens=20", f"--weights={how}").stdout
    if how == "fp32":
        assert done.stdout == script("sample.py", run, "--prompt=The fox", "--tokens=20").stdout


def test_sample_refuses_weights_that_it_does_not_know(run: Path, tmp_path: Path) -> None:
    assert "--weights" in said(script("sample.py", run, "--weights=int4"), 2)
    line = said(script("sample.py", run, "--weights=int8", f"--attend={tmp_path / 'x'}"), 2)
    assert "--attend" in line and "--weights is int8" in line
    assert not list(tmp_path.iterdir())
