"""Muon (Jordan et al. 2024) over stacked matrices, whole or split among processes.

It moves a matrix by its gradient's momentum after orthogonalising that: every direction in which the matrix acts gets
about the same step. torch.optim.Muon computes the same, one matrix at a time, and takes about as long as the backward
pass of a small model; here all matrices of a shape go through each product together. The bits are the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from training.distributed import distribute, full_tensor, is_dtensor
from training.stepper import Stepper

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the polynomial, a x + b x³ + c x⁵, that is applied again and again (Jordan et al. 2024)."""
ROUNDS = 5
SMALLEST_NORM = 1e-7
STACKED = 1 << 22
"""Numbers in a stack. Larger matrices keep the processor busy on their own, and split ones are put together for it."""


def orthogonalize(matrices: Float[Tensor, "N R C"]) -> Float[Tensor, "N R C"]:
    """Each matrix with its singular values brought near 1, in bf16.

    With U S Vᵀ = X / |X|, five rounds of X ← a X + (b XXᵀ + c (XXᵀ)²) X leave U S' Vᵀ, S' between about 0.7 and 1.2
    except where S was near 0 (a Newton-Schulz iteration, Jordan et al. 2024).
    """
    a, b, c = COEFFICIENTS
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.bfloat16()
    x = x.mT if is_tall else x
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=SMALLEST_NORM)
    for _ in range(ROUNDS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def stacks(matrices: list[Tensor]) -> Iterator[list[Tensor]]:
    """The matrices that have a gradient, those of one shape together as far as `STACKED` goes, in a fixed order."""
    by_shape: dict[torch.Size, list[Tensor]] = {}
    for matrix in matrices:
        if matrix.grad is not None:
            by_shape.setdefault(matrix.shape, []).append(matrix)
    for shape, alike in by_shape.items():
        count = max(1, STACKED // shape.numel())
        yield from (alike[i : i + count] for i in range(0, len(alike), count))


class Muon(Stepper):
    """Muon with Nesterov's momentum and decoupled weight decay, as torch.optim.Muon has them by default.

    Weights and momentum of split matrices stay split: only the momentum of one stack at a time is put together, on
    every process, and each then takes its share of the change. (torch.optim.Muon runs on split matrices too, but its
    products are then cut otherwise, which moves the update by 1 to 2%, and it exchanges 11 to 16 times as much.)

    Args:
        lr: learning rate; a matrix of R x C moves by lr · √max(1, R / C) times an orthogonal one.
    """

    def __init__(self, matrices: list[Tensor], lr: float, weight_decay: float, momentum: float) -> None:
        super().__init__([{"params": matrices, "lr": lr, "weight_decay": weight_decay}])
        self.momentum = momentum

    @torch.no_grad()
    def step(self) -> None:
        """Move every matrix that has a gradient."""
        for group in self.param_groups:
            for stack in stacks(group["params"]):
                self.move(stack, group["lr"], group["weight_decay"])

    def move(self, stack: list[Tensor], lr: float, weight_decay: float) -> None:
        """Move matrices of one shape."""
        directions = []
        for matrix in stack:
            gradient, memory = matrix.grad, self.state[matrix]
            assert gradient is not None
            if "momentum_buffer" not in memory:
                memory["momentum_buffer"] = torch.zeros_like(matrix)
            memory["momentum_buffer"].lerp_(gradient, 1 - self.momentum)
            directions.append(full_tensor(gradient.lerp(memory["momentum_buffer"], self.momentum)))
        rows, columns = stack[0].shape
        rate = lr * math.sqrt(max(1, rows / columns))
        for matrix, change in zip(stack, orthogonalize(torch.stack(directions)), strict=True):
            matrix.mul_(1 - lr * weight_decay)
            matrix.add_(distribute(change, matrix) if is_dtensor(matrix) else change, alpha=-rate)
