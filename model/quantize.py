"""Weight storage for generation: fp32, fp16 or int8.

Decoding multiplies every matrix with a single vector, so its time is that of reading the weights: half the bytes take
about half the time. `quantize_` replaces the linear layers of a loaded model in place; afterwards the model can be
called, but neither trained nor saved.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int8
from torch import Tensor, nn

from model.gpt import GPT, Block

WeightDtype = Literal["fp32", "fp16", "int8"]
PREPACK_ABOVE = 64 << 20
"""Bytes of parameters above which fp32 weights are prepacked; the weights of smaller models stay in the CPU's caches."""
PREPACK_ROWS = 128
"""Number of input rows that prepacking assumes; the layout for 128 is the fastest for one row too."""


def quantize_int8(weight: Float[Tensor, "N K"]) -> tuple[Int8[Tensor, "N K"], Float[Tensor, "N"]]:
    """Symmetric quantization per output channel: integers from -127 to 127 and scales with weight ≈ integers * scale.

    Jacob et al. 2018, section 2.1, with zero point 0. The error is at most half a scale.
    """
    scale = weight.abs().amax(dim=1).clamp_min(1e-30) / 127
    return (weight / scale[:, None]).round().to(torch.int8), scale


class PrepackedLinear(nn.Module):
    """fp32 linear layer whose weights are stored in oneDNN's blocked layout.

    PyTorch offers this layout through private operators only. With 124 M parameters they take a token from 40 to 26 ms.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.bias = linear.bias
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), PREPACK_ROWS)

    def forward(self, x: Float[Tensor, "*batch K"]) -> Float[Tensor, "*batch N"]:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return y


class HalfLinear(nn.Module):
    """Linear layer with fp16 weights and fp32 inputs, sums and outputs. Weights beyond fp16's range are clamped.

    Args:
        native: use the CPU's kernel for it; otherwise the whole product is computed in fp16.
    """

    def __init__(self, linear: nn.Linear, native: bool) -> None:
        super().__init__()
        self.bias, self.native = linear.bias, native
        weight = linear.weight.detach().clamp(-65504, 65504)
        self.weight = torch.ops.quantized.linear_prepack_fp16(weight, linear.bias) if native else weight.half()

    def forward(self, x: Float[Tensor, "*batch K"]) -> Float[Tensor, "*batch N"]:
        if self.native:
            y: Tensor = torch.ops.quantized.linear_dynamic_fp16(x, self.weight)
            return y
        y = F.linear(x.half(), self.weight).float()
        return y if self.bias is None else y + self.bias


class Int8Linear(nn.Module):
    """Linear layer with int8 weights (`quantize_int8`) and inputs quantized to 8 bits with one scale per position.

    Args:
        native: use the CPU's kernel for it; otherwise weights are converted for each product and inputs stay fp32,
            which saves memory but no time.
    """

    def __init__(self, linear: nn.Linear, native: bool) -> None:
        super().__init__()
        self.bias, self.native = linear.bias, native
        self.weight, self.scale = quantize_int8(linear.weight.detach())
        self.zero_points = torch.zeros(len(self.scale), dtype=torch.int32, device=self.scale.device)
        if native:
            self.weight = torch.ops.onednn.qlinear_prepack(self.weight, None)

    def forward(self, x: Float[Tensor, "*batch K"]) -> Float[Tensor, "*batch N"]:
        y = self.native_product(x) if self.native else F.linear(x, self.weight.to(x.dtype)) * self.scale
        return y if self.bias is None else y + self.bias

    def native_product(self, x: Float[Tensor, "*batch K"]) -> Float[Tensor, "*batch N"]:
        rows = x.flatten(0, -2)
        x_scale = torch.linalg.vector_norm(rows, torch.inf, dim=-1, keepdim=True).clamp_min(1e-30) / 127
        x_uint8 = (rows / x_scale).add_(128.5).to(torch.uint8)  # zero point 128; truncation of +0.5 rounds
        weight = (self.weight, self.scale, self.zero_points)
        options: tuple[Any, ...] = (None, 1.0, 0, torch.float32, "none", [], "")  # no bias, fp32 output, no activation
        y = torch.ops.onednn.qlinear_pointwise(x_uint8, 1.0, 128, *weight, *options)
        return cast(Tensor, (y * x_scale).unflatten(0, x.shape[:-1]))


@torch.no_grad()
def quantize_(model: GPT, dtype: WeightDtype) -> None:
    """Store the matrices of the blocks and the LM head as `dtype`, one after the other, to keep the peak memory low.

    The token embedding stays fp32. So does a model in fp32 that is small or not on a CPU, bit for bit.
    """
    on_cpu = model.token_embedding.weight.device.type == "cpu"
    has_onednn = on_cpu and torch.backends.mkldnn.is_available()
    has_fp16_kernel = on_cpu and torch.backends.quantized.engine in ("x86", "fbgemm")
    n_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    linears: list[tuple[nn.Module, str]] = [(model, "lm_head")]
    for block in model.blocks:
        attention, mlp = cast(Block, block).attention, cast(Block, block).mlp
        linears += [(attention, "qkv"), (attention, "out"), (mlp, "up"), (mlp, "down")]
    for parent, name in linears:
        linear = cast(nn.Linear, getattr(parent, name))
        if dtype == "fp16":
            setattr(parent, name, HalfLinear(linear, has_fp16_kernel))
        elif dtype == "int8":
            setattr(parent, name, Int8Linear(linear, has_onednn))
        elif has_onednn and n_bytes >= PREPACK_ABOVE:
            setattr(parent, name, PrepackedLinear(linear))
