"""Weight storage for generation: fp32, fp16 or int8.

Decoding multiplies every matrix with a single vector, so its time is that of reading the weights: half the bytes take
about half the time. The operators are PyTorch's kernels for x86 CPUs; elsewhere weights stay fp32.
"""

import warnings
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
    """Linear layer with int8 weights (`quantize_int8`) and inputs quantized to 7 bits with one scale per position.

    With 8 bits, sums would overflow on CPUs without VNNI. FBGEMM multiplies one row in half the time that oneDNN takes.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.bias = linear.bias
        integers, scale = quantize_int8(linear.weight.detach())
        with warnings.catch_warnings():  # PyTorch will remove quantized dtypes, but has no other kernel as fast
            warnings.filterwarnings("ignore", message=".*quantize", category=UserWarning)
            zero_points = torch.zeros(len(scale), dtype=torch.long)
            weight = torch._make_per_channel_quantized_tensor(integers, scale.double(), zero_points, 0)
            self.packed = torch.ops.quantized.linear_prepack(weight, None)

    def forward(self, x: Float[Tensor, "*batch K"]) -> Float[Tensor, "*batch N"]:
        if x.numel() == x.shape[-1]:
            # The kernel chooses the scale of a single position, which saves an eighth of a token's time.
            y = torch.ops.quantized.linear_dynamic(x, self.packed, reduce_range=True)
        else:
            largest = torch.linalg.vector_norm(x, torch.inf, dim=-1, keepdim=True).clamp_min(1e-30)
            y = torch.ops.quantized.linear_dynamic(x / largest, self.packed, reduce_range=True) * largest
        return y if self.bias is None else y + self.bias


@torch.no_grad()
def quantize_(model: GPT, dtype: WeightDtype) -> None:
    """Replace the linear layers of the blocks and the LM head, one after the other, to keep the peak memory low.

    Afterwards the model can be called, but neither trained nor saved. The token embedding stays fp32. So does a model
    in fp32 that is small or not on a CPU, bit for bit. Raises `UserError` (2) if PyTorch has no kernel for `dtype` here.
    """
    has_fbgemm, has_onednn = torch.backends.quantized.engine in ("x86", "fbgemm"), torch.backends.mkldnn.is_available()
    is_on_cpu = model.token_embedding.weight.device.type == "cpu"
    has_kernel = is_on_cpu and (has_onednn if dtype == "fp32" else has_fbgemm)
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
