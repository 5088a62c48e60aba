"""What AdamW and Muon have in common, and AdamW.

torch.optim's classes would do, but each imports torch's compiler, about a second, before the first step. The
arithmetic here is torch.optim's own, through its functions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

EPSILON = 1e-8


class Stepper:
    """Moves groups of parameters, each with a rate and a decay of its own, and keeps what it remembers of each one.

    Args:
        groups: each with `params`, `lr` and `weight_decay`; named as in torch.optim.
    """

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        self.param_groups = [{**group, "params": list(group["params"])} for group in groups]
        self.state: defaultdict[Tensor, dict[str, Tensor]] = defaultdict(dict)

    def step(self) -> None:
        """Move every parameter that has a gradient."""
        raise NotImplementedError

    def zero_grad(self) -> None:
        """Let the gradients go."""
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None


class AdamW(Stepper):
    """AdamW (Loshchilov & Hutter 2019, algorithm 2) by torch's fused kernel."""

    def __init__(self, groups: Iterable[dict[str, Any]], beta1: float, beta2: float) -> None:
        super().__init__(groups)
        self.beta1, self.beta2 = beta1, beta2

    @torch.no_grad()
    def step(self) -> None:
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            moved = [parameter for parameter in group["params"] if parameter.grad is not None]
            memories = [self.memory(parameter) for parameter in moved]
            adamw(
                moved,
                [parameter.grad for parameter in moved],
                [memory["exp_avg"] for memory in memories],
                [memory["exp_avg_sq"] for memory in memories],
                [],
                [memory["step"] for memory in memories],
                fused=True,
                amsgrad=False,
                beta1=self.beta1,
                beta2=self.beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=EPSILON,
                maximize=False,
            )

    def memory(self, parameter: Tensor) -> dict[str, Tensor]:
        """The running means of a parameter's gradient and of its square, and how many steps they have seen."""
        memory = self.state[parameter]
        if not memory:
            memory["step"] = torch.zeros((), device=parameter.device)
            memory["exp_avg"] = torch.zeros_like(parameter)
            memory["exp_avg_sq"] = torch.zeros_like(parameter)
        return memory
