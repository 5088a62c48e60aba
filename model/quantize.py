"""How the matrices of a model lie in memory while it writes: as fp32, fp16 or int8.

Writing a token multiplies every matrix with one vector: each weight is read for a single product, and the time is that
of reading them all. Half the bytes take about half the time. The modules keep their places and names, so a checkpoint
is loaded first and laid out then; what is laid out can only be called: it is neither trained nor saved.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int8
from torch import Tensor, nn

from model.gpt import GPT, Block

Stored = Literal["fp32", "fp16", "int8"]
LARGE = 64 << 20
"""Bytes of weights from which it matters how fp32 lies in memory; smaller models stay in the processor's caches."""
ROWS = 128
"""Rows of the products that `BlockedLinear` is laid out for; the layout for so many is the fastest for one, too."""


def to_int8(weight: Float[Tensor, "N K"]) -> tuple[Int8[Tensor, "N K"], Float[Tensor, "N"]]:
    """Whole numbers from -127 to 127 and the step of each row, so that `weight` is about `numbers * step[:, None]`.

    Nearest values on a grid that is symmetrical about 0, one for each output (Jacob et al. 2018, section 2.1, with zero
    point 0). A step is the row's largest weight / 127, and no weight is off by more than half a step.
    """
    step = weight.abs().amax(dim=1).clamp_min(1e-30) / 127
    return (weight / step[:, None]).round().to(torch.int8), step


class BlockedLinear(nn.Module):
    """A linear layer in fp32 whose weights lie in the blocks that the processor's product runs through."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.bias = linear.bias
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS)

    def forward(self, x: Float[Tensor, "*batch K"]) -> Float[Tensor, "*batch N"]:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return y


class HalfLinear(nn.Module):
    """A linear layer whose weights are fp16, widened as they are read; inputs, sums and outputs stay fp32.

    fp16 keeps three bits more than bf16. Weights are far from the ends of its range (6e-8 to 65,504); one beyond an end
    is moved to it. Without the processor's kernel for it, the product is one of fp16 numbers.
    """

    def __init__(self, linear: nn.Linear, kernel: bool) -> None:
        super().__init__()
        self.bias = linear.bias
        weight = linear.weight.detach().clamp(-65504, 65504)
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight, linear.bias) if kernel else None
        self.numbers = None if kernel else weight.half()

    def forward(self, x: Float[Tensor, "*batch K"]) -> Float[Tensor, "*batch N"]:
        if self.numbers is None:
            y: Tensor = torch.ops.quantized.linear_dynamic_fp16(x, self.packed)
            return y
        y = F.linear(x.half(), self.numbers).float()
        return y if self.bias is None else y + self.bias


class ByteLinear(nn.Module):
    """A linear layer whose weights are 8 bits (`to_int8`); so are its inputs, with a step for each position.

    Without the processor's kernel for it, weights are widened before each product, which saves memory and no time.
    """

    def __init__(self, linear: nn.Linear, kernel: bool) -> None:
        super().__init__()
        self.bias, self.kernel = linear.bias, kernel
        self.numbers, self.step = to_int8(linear.weight.detach())
        self.zero = torch.zeros(len(self.step), dtype=torch.int32, device=self.step.device)  # of every output's grid
        if kernel:
            self.numbers = torch.ops.onednn.qlinear_prepack(self.numbers, None)

    def forward(self, x: Float[Tensor, "*batch K"]) -> Float[Tensor, "*batch N"]:
        if self.kernel:
            rows = x.flatten(0, -2)
            largest = torch.linalg.vector_norm(rows, torch.inf, dim=-1, keepdim=True)
            step = largest.clamp_min(1e-30) / 127
            numbers = (rows / step).add_(128.5).to(torch.uint8)  # cut off, so that the half rounds; 128 stands for 0
            weights = (self.numbers, self.step, self.zero)
            # no bias, a sum in fp32, nothing after the product
            plain: tuple[Any, ...] = (None, 1.0, 0, torch.float32, "none", [], "")
            y = torch.ops.onednn.qlinear_pointwise(numbers, 1.0, 128, *weights, *plain)
            y = (y * step).unflatten(0, x.shape[:-1])
        else:
            y = F.linear(x, self.numbers.to(x.dtype)) * self.step
        return y if self.bias is None else y + self.bias


@torch.no_grad()
def quantize_(model: GPT, stored: Stored) -> None:
    """Lay out every matrix of the blocks and the head for writing; one after the other, so that no two copies stand.

    The embedding, of which each token reads a row, stays as it is, and with it the fp32 form of a head tied to it. A
    small model, or one that is not on a processor, keeps fp32 where it lies.
    """
    on_cpu = model.token_embedding.weight.device.type == "cpu"
    blocked = on_cpu and torch.backends.mkldnn.is_available()
    large = sum(p.numel() * p.element_size() for p in model.parameters()) >= LARGE
    halves = on_cpu and torch.backends.quantized.engine in ("x86", "fbgemm")
    places: list[tuple[nn.Module, str]] = [(model, "head")]
    for block in model.blocks:
        attention, mlp = cast(Block, block).attention, cast(Block, block).mlp
        places += [(attention, "qkv"), (attention, "out"), (mlp, "up"), (mlp, "down")]
    for holder, name in places:
        linear = cast(nn.Linear, getattr(holder, name))
        if stored == "fp16":
            setattr(holder, name, HalfLinear(linear, halves))
        elif stored == "int8":
            setattr(holder, name, ByteLinear(linear, blocked))
        elif blocked and large:
            setattr(holder, name, BlockedLinear(linear))
