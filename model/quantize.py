"""Weight storage for generation: fp32, fp16 or int8.

Decoding multiplies every matrix with a single vector, so its time is that of reading the weights: half the bytes take
about half the time. The operators are PyTorch's kernels for x86 CPUs; elsewhere weights stay fp32.
"""

from typing import Any, Literal

import torch
from jaxtyping import Float, Int8
from torch import Tensor, nn

from common.errors import UserError
from model.gpt import GPT

WeightDtype = Literal["fp32", "fp16", "int8"]
PREPACK_ABOVE = 64 << 20  # bytes of fp32 weights to prepack; those of smaller models stay in the CPU's caches
PREPACK_ROWS = 128  # input rows that prepacking assumes; the layout for 128 is the fastest for one row too


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
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


class HalfLinear(nn.Module):
    """Linear layer with fp16 weights and fp32 inputs, sums and outputs. Weights beyond fp16's range are clamped."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().clamp(-65504, 65504)
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight, linear.bias)

    def forward(self, x: Float[Tensor, "*batch K"]) -> Float[Tensor, "*batch N"]:
        return torch.ops.quantized.linear_dynamic_fp16(x, self.packed)


class Int8Linear(nn.Module):
    """Linear layer with int8 weights (`quantize_int8`) and inputs quantized to 8 bits with one scale per position."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.bias = linear.bias
        weight, self.scale = quantize_int8(linear.weight.detach())
        self.packed = torch.ops.onednn.qlinear_prepack(weight, None)
        self.zero_points = torch.zeros(len(self.scale), dtype=torch.int32)

    def forward(self, x: Float[Tensor, "*batch K"]) -> Float[Tensor, "*batch N"]:
        rows = x.flatten(0, -2)
        x_scale = torch.linalg.vector_norm(rows, torch.inf, dim=-1, keepdim=True).clamp_min(1e-30) / 127
        x_uint8 = (rows / x_scale).add_(128.5).to(torch.uint8)  # zero point 128; truncation of +0.5 rounds
        weight = (self.packed, self.scale, self.zero_points)
        options: tuple[Any, ...] = (None, 1.0, 0, torch.float32, "none", [], "")  # no bias, fp32 output, no activation
        y = torch.ops.onednn.qlinear_pointwise(x_uint8, 1.0, 128, *weight, *options)
        y = (y * x_scale).unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias


@torch.no_grad()
def quantize_(model: GPT, dtype: WeightDtype) -> None:
    """Replace the linear layers of the blocks and the LM head, one after the other, to keep the peak memory low.

    Afterwards the model can be called, but neither trained nor saved. The token embedding stays fp32. So does a model
    in fp32 that is small or not on a CPU, bit for bit. Raises `UserError` (2) if PyTorch has no kernel for `dtype` here.
    """
    has_fp16, has_onednn = torch.backends.quantized.engine in ("x86", "fbgemm"), torch.backends.mkldnn.is_available()
    is_on_cpu = model.token_embedding.weight.device.type == "cpu"
    has_kernel = is_on_cpu and (has_fp16 if dtype == "fp16" else has_onednn)
    n_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    if dtype == "fp32" and (not has_kernel or n_bytes < PREPACK_ABOVE):
        return
    if not has_kernel:
        raise UserError(f"--dtype {dtype} needs an x86 CPU; use fp32, or --device cpu")
    replacement: Any = {"fp32": PrepackedLinear, "fp16": HalfLinear, "int8": Int8Linear}[dtype]
    parents = [module for module in model.modules() if not isinstance(module, nn.Linear)]  # keeps no weights alive
    for parent in parents:
        for name in [name for name, child in parent.named_children() if isinstance(child, nn.Linear)]:
            setattr(parent, name, replacement(getattr(parent, name)))
