"""Quantized weights: outputs within the bounds that follow from the dtypes; fp32 stays fp32."""

import copy
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from common.errors import UserError
from model import quantize
from model.quantize import HalfLinear, Int8Linear, WeightDtype, quantize_, quantize_int8
from tests.model.helpers import PRESETS, modules_of, normal, random_model, random_tokens

has_fbgemm = torch.backends.quantized.engine in ("x86", "fbgemm")
needs_fbgemm = pytest.mark.skipif(not has_fbgemm, reason="this CPU has no fp16 and int8 kernels")


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


@needs_fbgemm
def test_fp16_linear_rounds_and_clamps_weights() -> None:
    layer, x = random_linear(), normal(2, 3, 40)
    error = (HalfLinear(layer)(x) - layer(x)).abs()
    assert (error <= 1.01 * 2**-11 * (x.abs() @ layer.weight.abs().T) + 1e-5).all()
    assert error.max() > 0
    layer.weight[3, 4] = -1e6
    x = 0.5 * torch.eye(40)[4:5]
    assert abs(HalfLinear(layer)(x)[0, 3] + 0.5 * 65504 - layer.bias[3]) < 20


@needs_fbgemm
def test_int8_linear_is_within_rounding() -> None:
    layer, x = random_linear(), normal(2, 3, 40)
    x[0, 1] *= 1000  # positions have scales of their own
    x[1, 2] = 0
    quantized = Int8Linear(layer)
    error = (quantized(x) - layer(x)).abs()
    assert torch.allclose(quantized(x[1:, 2:]), layer.bias.expand(1, 1, -1))
    alone = torch.stack([quantized(row[None])[0] for row in x.flatten(0, 1)]).view(error.shape)
    error = torch.maximum(error, (alone - layer(x)).abs())
    weight_scale, input_scale = quantize_int8(layer.weight)[1], 2 * x.abs().amax(-1, keepdim=True) / 127
    bound = x.abs().sum(-1, keepdim=True) * weight_scale / 2
    bound = bound + input_scale / 2 * (layer.weight.abs().sum(1) + 40 * weight_scale / 2)
    assert (error <= 1.001 * bound + 1e-4).all()
    assert error[0, 0].max() > 0


@pytest.mark.parametrize(
    ("dtype", "bound"),
    [("fp32", 1e-5), pytest.param("fp16", 0.01, marks=needs_fbgemm), pytest.param("int8", 0.5, marks=needs_fbgemm)],
)
@pytest.mark.parametrize("preset", [*PRESETS, "llama untied", "attention only"])
def test_quantized_logits_are_close(
    preset: str, dtype: WeightDtype, bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sharp attention of a random model amplifies errors: a hard case."""
    monkeypatch.setattr(quantize, "PREPACK_ABOVE", 0)  # as for a large model
    model, text = random_model(preset, "sdpa"), random_tokens(3, 12)
    other = copy.deepcopy(model)
    quantize_(other, dtype)
    with torch.no_grad():
        expected = model(text)
        error = (other(text) - expected).abs().max() / expected.std()
    assert error < bound and (error > 1e-5 or dtype == "fp32")
    before, after = dict(model.named_parameters()), dict(other.named_parameters())
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert not [name for name, value in after.items() if value.dim() == 2 and "embedding" not in name]


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "int8"])
def test_device_without_kernels(dtype: WeightDtype) -> None:
    model = random_model("glass").to("meta")
    if dtype == "fp32":
        quantize_(model, dtype)
        assert isinstance(model.lm_head, nn.Linear)
    else:
        with pytest.raises(UserError, match=f"--dtype {dtype} needs an x86 CPU"):
            quantize_(model, dtype)


def test_each_layer_is_freed_while_the_next_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, alive = random_model("glass"), list[int]()
    weights = [weakref.ref(layer.weight) for layer in modules_of(model.blocks, nn.Linear)]

    class Packed(nn.Module):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            alive.append(sum(weight() is not None for weight in weights))

    monkeypatch.setattr(quantize, "Int8Linear", Packed)
    quantize_(model, "int8")
    assert alive == [8, *range(8, 0, -1)]  # first the LM head, which shares its weight with the embedding
