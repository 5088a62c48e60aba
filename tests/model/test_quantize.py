"""Quantized weights: outputs within the bounds that follow from the dtypes; fp32 stays fp32."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from model import quantize
from model.gpt import GPT
from model.quantize import HalfLinear, Int8Linear, WeightDtype, quantize_, quantize_int8
from tests.model.helpers import PRESETS, normal, random_model, random_tokens

FP16_ERROR = 2.0**-11
"""Largest relative rounding error of fp16."""
HAS_FP16_KERNEL = torch.backends.quantized.engine in ("x86", "fbgemm")
each_dtype = pytest.mark.parametrize("dtype", ["fp32", "fp16", "int8"])
each_kernel = pytest.mark.parametrize("native", [True, False])


def random_linear() -> nn.Linear:
    layer = nn.Linear(40, 24)
    with torch.no_grad():
        layer.weight.copy_(normal(24, 40) * torch.logspace(-3, 0, 24)[:, None])
    return layer.requires_grad_(False)


@given(st.integers(0, 10_000), st.floats(1e-6, 1e3), st.integers(1, 9), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_int8_error_is_at_most_half_a_scale(seed: int, size: float, n_out: int, n_in: int) -> None:
    weight = size * torch.randn(n_out, n_in, generator=torch.Generator().manual_seed(seed))
    weight[0, : n_in // 2] = 0
    integers, scale = quantize_int8(weight)
    assert integers.dtype == torch.int8 and int(integers.min()) >= -127
    assert torch.allclose(scale, weight.abs().amax(1) / 127)
    assert ((integers * scale[:, None] - weight).abs() <= 0.5001 * scale[:, None]).all()
    assert torch.equal(quantize_int8(-weight)[0], -integers)


@each_kernel
def test_fp16_linear_is_within_rounding(native: bool) -> None:
    if native and not HAS_FP16_KERNEL:
        pytest.skip("this CPU has no fp16 kernel")
    layer, x = random_linear(), normal(2, 3, 40)
    error = (HalfLinear(layer, native)(x) - layer(x)).abs()
    magnitude = x.abs() @ layer.weight.abs().T
    # the kernel rounds only weights; without it inputs and outputs are rounded too
    assert (error <= (1.01 if native else 3.1) * FP16_ERROR * magnitude + 1e-5).all()
    assert error.max() > 0


@each_kernel
def test_fp16_clamps_large_weights(native: bool) -> None:
    if native and not HAS_FP16_KERNEL:
        pytest.skip("this CPU has no fp16 kernel")
    layer, x = random_linear(), torch.zeros(1, 40)
    layer.weight[3, 4] = -1e6
    x[0, 4] = 0.5
    assert abs(HalfLinear(layer, native)(x)[0, 3] + 0.5 * 65504 - layer.bias[3]) < 20


@each_kernel
def test_int8_linear_is_within_rounding(native: bool) -> None:
    layer, x = random_linear(), normal(2, 3, 40)
    x[0, 1] *= 1000
    x[1, 2] = 0
    error = (Int8Linear(layer, native)(x) - layer(x)).abs()
    weight_scale, input_scale = quantize_int8(layer.weight)[1], x.abs().amax(-1, keepdim=True) / 127
    bound = x.abs().sum(-1, keepdim=True) * weight_scale / 2
    if native:
        bound = bound + input_scale / 2 * (layer.weight.abs().sum(1) + 40 * weight_scale / 2)
    assert (error <= 1.001 * bound + 1e-4).all()
    assert error[0, 0].max() > 0


@each_kernel
def test_int8_positions_have_their_own_scale(native: bool) -> None:
    layer, x = Int8Linear(random_linear(), native), normal(4, 40)
    larger = x.clone()
    larger[0] *= 1e4
    assert torch.equal(layer(x)[1:], layer(larger)[1:])


def quantized(model: GPT, dtype: WeightDtype, monkeypatch: pytest.MonkeyPatch) -> GPT:
    """A copy, quantized as a large model would be."""
    monkeypatch.setattr(quantize, "PREPACK_ABOVE", 0)
    other = copy.deepcopy(model)
    quantize_(other, dtype)
    assert not isinstance(other.lm_head, nn.Linear)
    return other


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference of logits, relative to their standard deviation."""
    return float((a - b).abs().max() / b.std())


BOUNDS: dict[WeightDtype, float] = {"fp32": 1e-5, "fp16": 0.01, "int8": 0.35}
"""Of a random model, whose sharp attention amplifies errors: a hard case."""


@each_dtype
@pytest.mark.parametrize("preset", PRESETS)
def test_quantized_logits_are_close(preset: str, dtype: WeightDtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = random_model(preset, "sdpa"), random_tokens(3, 12)
    other = quantized(model, dtype, monkeypatch)
    with torch.no_grad():
        error = difference(other(text), model(text))
    assert error < BOUNDS[dtype]
    assert error > 1e-5 or dtype == "fp32"


@pytest.mark.parametrize("dtype", ["fp16", "int8"])
def test_embedding_and_vectors_stay_fp32(dtype: WeightDtype) -> None:
    model = random_model("qwen3", "sdpa")
    before = {name: value.clone() for name, value in model.named_parameters()}
    quantize_(model, dtype)
    after = dict(model.named_parameters())
    assert set(after) == {name for name, value in before.items() if value.dim() < 2 or "embedding" in name}
    assert all(torch.equal(value, before[name]) for name, value in after.items())
