"""Chunked cross-entropy: no second copy of the logits.

With a large vocabulary the logits are the largest tensor of a step: 16 sequences of 1,024 tokens times 50,257 are 1.6 GB
in bf16 and 3.3 GB in fp32, and F.cross_entropy makes several such tensors. Here a few rows at a time go forward and
backward, and their gradient overwrites the logits.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from data.dataloader import IGNORE_INDEX

CHUNK = 1 << 22  # logits that are held in fp32 at a time: 16 MiB


def cross_entropy_sum(logits: Float[Tensor, "B T V"], targets: Int[Tensor, "B T"]) -> Float[Tensor, ""]:
    """Sum over all valid targets of -log p(target), in nats, computed in fp32.

    The gradient overwrites the logits: do not read them after it.
    """
    return ChunkedCrossEntropy.apply(logits.flatten(0, 1), targets.flatten())


class ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy whose backward pass recomputes it chunk by chunk, and writes the gradient over the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Float[Tensor, "N V"], targets: Int[Tensor, "N"]) -> Float[Tensor, ""]:
        ctx.save_for_backward(logits, targets)
        return torch.stack([cross_entropy(rows.float(), labels) for rows, labels in chunks(logits, targets)]).sum()

    @staticmethod
    def backward(ctx: Any, upstream: Float[Tensor, ""]) -> tuple[Float[Tensor, "N V"], None]:  # type: ignore[override]
        logits, targets = ctx.saved_tensors
        for rows, labels in chunks(logits, targets):
            with torch.enable_grad():
                wide = rows.detach().float().requires_grad_()
                loss = upstream * cross_entropy(wide, labels)  # upstream as grad_outputs would make torch import sympy
            rows.copy_(torch.autograd.grad(loss, wide)[0])
        return logits, None


def chunks(logits: Float[Tensor, "N V"], targets: Int[Tensor, "N"]) -> list[tuple[Tensor, Tensor]]:
    """A few rows of the logits at a time, as views, and their targets."""
    rows = max(1, CHUNK // logits.shape[1])
    return list(zip(logits.split(rows), targets.split(rows), strict=True))


def cross_entropy(logits: Float[Tensor, "N V"], targets: Int[Tensor, "N"]) -> Float[Tensor, ""]:
    return F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")
