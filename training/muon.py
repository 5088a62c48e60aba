"""Muon (Jordan et al. 2024): momentum whose update is orthogonalized, so that every direction moves about equally.

torch.optim.Muon computes the same, one matrix at a time, and takes about as long as the backward pass of a small model;
here all matrices of one shape go through each product together. The results are bit-identical.
"""

import math
from collections import defaultdict
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from training.distributed import distribute, full_tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # (a, b, c) of a x + b x³ + c x⁵, each Newton-Schulz step (Jordan et al. 2024)
NEWTON_SCHULZ_STEPS = 5
EPS = 1e-7
MAX_STACK = 1 << 22  # elements; larger matrices keep the CPU busy on their own, sharded ones need memory for the stack


def orthogonalize(matrices: Float[Tensor, "N R C"]) -> Float[Tensor, "N R C"]:
    """Each matrix with its singular values brought near 1, in bf16.

    With U S Vᵀ = X / |X|, five steps of X <- a X + (b XXᵀ + c (XXᵀ)²) X give U S' Vᵀ, S' between about 0.7 and 1.2
    except where S is near 0 (Newton-Schulz iteration, Jordan et al. 2024).
    """
    a, b, c = COEFFICIENTS
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.bfloat16()
    x = x.mT if is_tall else x
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=EPS)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def muon(
    parameters: list[Tensor], momentum_buffers: list[Tensor], lr: float, weight_decay: float, momentum: float
) -> None:
    """One step with Nesterov momentum and decoupled weight decay, the defaults of torch.optim.Muon, in place.

    Sharded parameters and buffers stay sharded: the momentum of one stack at a time is gathered on every process, and
    each then applies its shard of the update. (torch.optim.Muon multiplies shards instead, which changes the update by
    1 to 2%, and communicates 11 to 16 times as much.)

    Args:
        parameters: matrices that have a gradient.
        lr: learning rate; an R x C matrix moves by lr · √max(1, R / C) times an orthogonal one.
    """
    for stack in stacks(list(zip(parameters, momentum_buffers, strict=True))):
        updates = []
        for parameter, buffer in stack:
            gradient = parameter.grad
            assert gradient is not None
            buffer.lerp_(gradient, 1 - momentum)
            updates.append(full_tensor(gradient.lerp(buffer, momentum)))
        rows, columns = stack[0][0].shape
        adjusted_lr = lr * math.sqrt(max(1, rows / columns))
        for (parameter, _), update in zip(stack, orthogonalize(torch.stack(updates)), strict=True):
            parameter.mul_(1 - lr * weight_decay)
            parameter.add_(distribute(update, parameter), alpha=-adjusted_lr)


def stacks(pairs: list[tuple[Tensor, Tensor]]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """(parameter, buffer) pairs of one shape together, at most `MAX_STACK` elements of each, in a fixed order."""
    by_shape = defaultdict(list)
    for pair in pairs:
        by_shape[pair[0].shape].append(pair)
    for shape, alike in by_shape.items():
        count = max(1, MAX_STACK // shape.numel())
        yield from (alike[i : i + count] for i in range(0, len(alike), count))
