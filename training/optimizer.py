"""How weights follow gradients: parameter groups, AdamW and Muon, the rate of each step."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch.distributed as dist
from torch import Tensor, nn

from training.config import OptimConfig
from training.distributed import distribute, full_tensor, is_dtensor, unwrap_model
from training.muon import Muon
from training.stepper import AdamW, Stepper


def get_lr_scale(step: int, steps: int, config: OptimConfig) -> float:
    """The learning rate of a step as a share of its peak: a pure function of the step.

    It rises in a line over `warmup_steps` steps; then `cosine` falls along a half cosine to `min_lr_ratio`
    (Loshchilov & Hutter 2017, equation 5), while `linear` stays at 1 until the last `decay_fraction` of the steps and
    falls in a line (the trapezoid of Hägele et al. 2024).

    Args:
        step: counted from 0, below `steps`.
    """
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "cosine":
        progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
        falling = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        falling = min(1.0, (steps - step) / max(1.0, config.decay_fraction * steps))
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * falling


class Optimizer:
    """AdamW, or Muon for the matrices inside the blocks and AdamW for the rest, stepped as one.

    Muon (Jordan et al. 2024) orthogonalises the update of a matrix, which makes sense where a matrix maps one hidden
    space to another; embeddings, the head, gains and biases stay with AdamW. Matrices decay, gains and biases do not.

    Args:
        model: as it is stepped; where its weights are split among processes, their moments are split the same way.
    """

    def __init__(self, model: nn.Module, config: OptimConfig) -> None:
        hidden, matrices, vectors = [], [], []
        self.names: dict[Tensor, str] = {parameter: name for name, parameter in unwrap_model(model).named_parameters()}
        for parameter, name in self.names.items():
            if parameter.dim() < 2:
                vectors.append(parameter)
            elif config.optimizer == "muon" and ".blocks." in f".{name}":
                hidden.append(parameter)
            else:
                matrices.append(parameter)
        decay = config.weight_decay
        groups = [
            {"params": matrices, "lr": config.lr, "weight_decay": decay},
            {"params": vectors, "lr": config.lr, "weight_decay": 0.0},
        ]
        self.parts: list[Stepper] = [AdamW(groups, config.beta1, config.beta2)]
        if hidden:
            self.parts.append(Muon(hidden, config.muon_lr, decay, config.momentum))
        self.peaks = [[group["lr"] for group in part.param_groups] for part in self.parts]

    def set_lr_scale(self, share: float) -> None:
        """Set every learning rate to `share` of its peak."""
        for part, peaks in zip(self.parts, self.peaks, strict=True):
            for group, peak in zip(part.param_groups, peaks, strict=True):
                group["lr"] = share * peak

    def step(self) -> None:
        """Move the weights, and forget the gradient."""
        for part in self.parts:
            part.step()
        self.zero_grad()

    def zero_grad(self) -> None:
        """Let the gradient go."""
        for part in self.parts:
            part.zero_grad()

    def named_state(self) -> Iterator[tuple[str, Tensor]]:
        """Every moment as it lies here, named by its parameter; in the same order on every process."""
        for part in self.parts:
            for parameter in (p for group in part.param_groups for p in group["params"]):
                for key, value in part.state.get(parameter, {}).items():
                    yield f"{self.names[parameter]}/{key}", value

    def state_dict(self) -> dict[str, Tensor]:
        """Every moment, whole, named by its parameter, such as `blocks.0.attention.qkv.weight/momentum_buffer`.

        Where moments are split every process calls this at the same point; they are put together one at a time and
        laid down on the first process's CPU, and only that one gets them.
        """
        if not any(is_dtensor(parameter) for parameter in self.names):
            return dict(self.named_state())
        found = {}
        for name, value in self.named_state():
            value = full_tensor(value)
            if dist.get_rank() == 0:
                found[name] = value.cpu()
        return found

    def load_state_dict(self, saved: dict[str, Tensor]) -> None:
        """Take over what `state` gave, or this process's share of it.

        Raises:
            ValueError: if it belongs to other parameters or another optimizer.
        """
        by_name = {name: parameter for parameter, name in self.names.items()}
        owners = {p: part for part in self.parts for group in part.param_groups for p in group["params"]}
        if missing := set(by_name) - {key.partition("/")[0] for key in saved}:
            raise ValueError(f"it lacks the moments of {sorted(missing)[0]}")
        for key, value in saved.items():
            name, _, entry = key.partition("/")
            if name not in by_name:
                raise ValueError(f"it holds moments of {name}, which the model lacks")
            parameter = by_name[name]
            if value.dim() and value.shape != parameter.shape:
                raise ValueError(f"the moments of {name} have shape {tuple(value.shape)}, not {tuple(parameter.shape)}")
            mine = distribute(value, parameter) if value.dim() else value.to(parameter.device)
            owners[parameter].state[parameter][entry] = mine
