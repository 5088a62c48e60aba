"""The optimizer: AdamW, or Muon for the matrices inside the blocks and AdamW for the rest; and the learning rate."""

import math
from collections import defaultdict
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.adamw import adamw

from training.config import OptimConfig
from training.distributed import distribute, full_tensor, is_dtensor, unwrap_model
from training.muon import muon

ADAMW_EPS = 1e-8


def get_lr_scale(step: int, steps: int, config: OptimConfig) -> float:
    """The learning rate of a step as a fraction of its peak: a pure function of the step.

    Linear warmup over `warmup_steps` steps; then `cosine` decays to `min_lr_ratio` along a half cosine (Loshchilov & Hutter
    2017, equation 5), while `linear` stays at 1 until the last `decay_fraction` of the steps and decays linearly
    (warmup-stable-decay; Hägele et al. 2024), or falls by equal parts at the steps of `decay_at`. `step` counts from 0.
    """
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "cosine":
        progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
        decay = 0.5 * (1 + math.cos(math.pi * progress))
    elif config.decay_at:
        falls = config.decay_at.split()
        decay = 1 - sum(int(at) <= step for at in falls) / (len(falls) + 1)
    else:
        decay = min(1.0, (steps - step) / max(1.0, config.decay_fraction * steps))
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * decay


class Optimizer:
    """AdamW (Loshchilov & Hutter 2019, algorithm 2) and Muon (Jordan et al. 2024).

    | group    | parameters                                     | algorithm      | weight decay |
    |----------|------------------------------------------------|----------------|--------------|
    | matrices | embeddings, LM head; with `adamw` all matrices | AdamW          | yes          |
    | vectors  | norms and biases                               | AdamW          | no           |
    | hidden   | with `muon` the matrices inside the blocks     | Muon           | yes          |

    Muon orthogonalizes the update of a matrix, which makes sense where a matrix maps one hidden space to another.
    torch.optim's classes are not used because each of them imports torch's compiler, about a second; the arithmetic
    is torch.optim's own, through `torch.optim.adamw.adamw`. `step` also clears the gradients; set `lr_scale` for the schedule.
    FSDP-sharded parameters have sharded optimizer state.
    """

    def __init__(self, model: nn.Module, config: OptimConfig) -> None:
        self.config = config
        self.names = {parameter: name for name, parameter in unwrap_model(model).named_parameters()}
        self.state: defaultdict[Tensor, dict[str, Tensor]] = defaultdict(dict)
        groups = defaultdict(list)
        for parameter, name in self.names.items():
            is_matrix = parameter.dim() > 1
            is_hidden = is_matrix and config.optimizer == "muon" and ".blocks." in f".{name}"
            groups["muon" if is_hidden else "adamw", is_matrix].append(parameter)
        self.param_groups: list[dict[str, Any]] = [
            {
                "algorithm": algorithm,
                "params": params,
                "peak_lr": config.muon_lr if algorithm == "muon" else config.lr,
                "weight_decay": config.weight_decay if is_matrix else 0.0,
            }
            for (algorithm, is_matrix), params in groups.items()
        ]
        self.adamw_options: dict[str, Any] = {"beta1": config.beta1, "beta2": config.beta2, "eps": ADAMW_EPS}
        self.adamw_options |= {"amsgrad": False, "maximize": False}
        self.lr_scale = 1.0

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient, with `lr_scale` times its peak learning rate; drop the gradients."""
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            is_muon, lr = group["algorithm"] == "muon", self.lr_scale * group["peak_lr"]
            for parameter in parameters:
                if not self.state[parameter]:
                    entries = ("momentum_buffer",) if is_muon else ("exp_avg", "exp_avg_sq")
                    self.state[parameter] = {entry: torch.zeros_like(parameter) for entry in entries}
                    if not is_muon:
                        self.state[parameter]["step"] = torch.zeros((), device=parameter.device)
            states = [self.state[parameter] for parameter in parameters]
            if is_muon:
                buffers = [state["momentum_buffer"] for state in states]
                muon(parameters, buffers, lr, group["weight_decay"], self.config.momentum)
            elif parameters:
                gradients = [cast(Tensor, parameter.grad) for parameter in parameters]
                averages, squares, steps = ([s[entry] for s in states] for entry in ("exp_avg", "exp_avg_sq", "step"))
                options = {"lr": lr, "weight_decay": group["weight_decay"], **self.adamw_options}
                adamw(parameters, gradients, averages, squares, [], steps, fused=True, **options)
        self.zero_grad()

    def zero_grad(self) -> None:
        for parameter in self.names:
            parameter.grad = None

    def state_dict(self) -> dict[str, Tensor]:
        """Every tensor of the optimizer state, by name, such as `blocks.0.attention.qkv.weight/momentum_buffer`.

        Sharded state is gathered one tensor at a time onto the main process's CPU, where every process must call this;
        the others get an empty dict.
        """
        is_sharded, state = any(map(is_dtensor, self.names)), {}
        for parameter, name in self.names.items():
            for entry, value in self.state.get(parameter, {}).items():
                value = full_tensor(value)
                if not is_sharded or dist.get_rank() == 0:
                    state[f"{name}/{entry}"] = value.cpu() if is_sharded else value
        return state

    def load_state_dict(self, saved: dict[str, Tensor]) -> None:
        """Load what `state_dict` returned; of sharded parameters this process's shard. ValueError if it is of other ones."""
        parameters = {name: parameter for parameter, name in self.names.items()}
        for key, value in saved.items():
            name, _, entry = key.partition("/")
            parameter = parameters.get(name)
            if parameter is None or (value.dim() and value.shape != parameter.shape):
                raise ValueError(
                    f"the model has no parameter for the optimizer state {key} of shape {tuple(value.shape)}"
                )
            shard = distribute(value, parameter) if value.dim() else value.to(parameter.device)
            self.state[parameter][entry] = shard
        if missing := [name for name, parameter in parameters.items() if parameter not in self.state]:
            raise ValueError(f"the optimizer state of {missing[0]} is missing")
