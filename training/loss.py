"""The loss, without a second copy of the logits.

With a large vocabulary the logits are the largest tensor of a step: 16 windows of 1,024 tokens times 50,257 are 1.6 GB
in bf16 and 3.3 GB in fp32, and cross-entropy as the library has it holds several such tensors. Here rows are taken a
few at a time, forwards and backwards, and their gradient is written where the logits stood.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from data.dataloader import IGNORE_INDEX

PIECE = 1 << 22
"""Numbers that are held in fp32 at a time: 16 MiB."""


def cross_entropy_sum(logits: Float[Tensor, "B T V"], targets: Int[Tensor, "B T"]) -> Float[Tensor, ""]:
    """Sum over all counted targets of -log p(target), in nats, computed in fp32.

    The backward pass overwrites the logits: nobody may read them after it.
    """
    total: Tensor = RowsAtATime.apply(logits.flatten(0, 1), targets.flatten())
    return total


def pieces(logits: Float[Tensor, "N V"], targets: Int[Tensor, "N"]) -> list[tuple[Tensor, Tensor]]:
    """Rows of the logits, as views, and their targets."""
    rows = max(1, PIECE // logits.shape[1])
    return list(zip(logits.split(rows), targets.split(rows), strict=True))


def cross_entropy(logits: Float[Tensor, "N V"], targets: Int[Tensor, "N"]) -> Float[Tensor, ""]:
    """The sum of a few rows."""
    return F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")


class RowsAtATime(torch.autograd.Function):
    """Cross-entropy whose gradient is computed, from the logits, when it is wanted, and in their place."""

    @staticmethod
    def forward(ctx: Any, logits: Float[Tensor, "N V"], targets: Int[Tensor, "N"]) -> Float[Tensor, ""]:
        ctx.save_for_backward(logits, targets)
        return torch.stack([cross_entropy(rows.float(), wanted) for rows, wanted in pieces(logits, targets)]).sum()

    @staticmethod
    def backward(ctx: Any, upstream: Float[Tensor, ""]) -> tuple[Float[Tensor, "N V"], None]:  # type: ignore[override]
        logits, targets = ctx.saved_tensors
        for rows, wanted in pieces(logits, targets):
            with torch.enable_grad():
                wide = rows.detach().float().requires_grad_()
                loss = upstream * cross_entropy(wide, wanted)  # given to `grad` apart, upstream makes torch load sympy
            rows.copy_(torch.autograd.grad(loss, wide)[0])
        return logits, None
