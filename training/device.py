"""The machine a run lives on: device, number format, kernels, compilation, and its place among torchrun's processes.

The place that asks "cuda or cpu?", and through which processes agree. What it chooses it can say in one line,
`DistContext.describe`. How a model is shared among processes stands in `training/distributed.py`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import deterministic

from common.errors import CONFIG, UserError
from model.config import ModelConfig
from model.gpt import GPT
from training.config import TrainConfig
from training.memory import keep_freed_memory

COMPILE_SECONDS = 300.0
"""A run that would take longer than this without it earns the minute that torch.compile takes."""
ASSUMED_FLOPS = 1.5e11
"""Operations a second in matrix products that a small processor is taken to reach before it is measured."""


@dataclass(frozen=True)
class DistContext:
    """Where a process computes, and its place among the others."""

    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_main_process(self) -> bool:
        """True for the one process that prints and writes."""
        return self.rank == 0

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Matrix products in this machine's number format; weights and sums stay in fp32."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def to_device(self, tensor: Tensor) -> Tensor:
        """A processor's tensor on this machine's device; a GPU fetches it on its own, while it is given more to do."""
        if self.device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def all_reduce_sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all processes, on this machine's device; `value` itself may be overwritten."""
        if self.world_size == 1:
            return value
        here = value.to(self.device)
        dist.all_reduce(here)
        return here

    def all_reduce_max(self, value: int) -> int:
        """The largest of what the processes say, on every process: how they agree on a step, a signal, a failure."""
        if self.world_size == 1:
            return value
        here = torch.tensor(value, device=self.device)
        dist.all_reduce(here, dist.ReduceOp.MAX)
        return int(here)

    def broadcast_str(self, text: str, source: int = 0) -> str:
        """The text of the first process, or of `source`, on every process."""
        if self.world_size == 1:
            return text
        content = list(text.encode("utf-8", "surrogateescape"))
        length = torch.tensor(len(content), device=self.device)
        dist.broadcast(length, source)
        if self.rank == source:
            told = torch.tensor(content, dtype=torch.uint8, device=self.device)
        else:
            told = torch.empty(int(length), dtype=torch.uint8, device=self.device)
        if len(told):
            dist.broadcast(told, source)
        return bytes(told.tolist()).decode("utf-8", "surrogateescape")

    def check_same_everywhere(self, what: dict[str, str]) -> None:
        """Go on only if every process says the same of each thing named.

        Raises:
            UserError: on every process, naming the first thing that differs and a process that differs.
        """
        first = json.loads(self.broadcast_str(json.dumps(what)))
        different = [key for key in [*first, *what] if first.get(key) != what.get(key)]
        odd = self.all_reduce_max(self.rank if different else 0)  # the first process never differs from itself
        if odd:
            key = self.broadcast_str(different[0] if different else "", odd)
            here, there = first_difference(*(self.broadcast_str(what.get(key, ""), rank) for rank in (0, odd)))
            raise UserError(
                f"{key} differs: {here!r} on process 0, {there!r} on process {odd}; "
                "start every process with the same command, data and versions",
                CONFIG,
            )

    def describe(self) -> str:
        """The choices in words, such as `cpu, 2 threads, bf16`."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        threads = f", {torch.get_num_threads()} threads" if self.device.type == "cpu" else ""
        processes = f", {self.world_size} processes" if self.world_size > 1 else ""
        return f"{name}{threads}{processes}, {'bf16' if self.dtype == torch.bfloat16 else 'fp32'}"


def first_difference(one: str, other: str) -> tuple[str, str]:
    """The first line in which two texts differ, of each one; at most 80 characters."""
    lines = zip_longest(one.splitlines(), other.splitlines(), fillvalue="")
    a, b = next(((a, b) for a, b in lines if a != b), (one, other))
    return a[:80], b[:80]


def bf16_is_fast(device: torch.device) -> bool:
    """Whether the hardware multiplies bf16 matrices natively; elsewhere bf16 is emulated and slow."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    tests = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, test, lambda: False)() for test in tests)


def get_dist_context(dtype: str = "auto", threads: int = 0) -> DistContext:
    """The device of this process and the number format that pays on it.

    Under torchrun each process takes the GPU of its local rank; its group must be open (`training/distributed.py`).
    """
    if threads:
        torch.set_num_threads(threads)
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cpu":
        keep_freed_memory()
    fast = bf16_is_fast(device) if dtype == "auto" else dtype == "bf16"
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return DistContext(device, torch.bfloat16 if fast else torch.float32, rank, world_size, local)


def resolve_attention(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> ModelConfig:
    """The config with `kernels` decided. The library's win, but for its attention in bf16 on a processor."""
    if config.attention != "auto":
        return config
    return replace(config, attention="chunked" if device.type == "cpu" and dtype == torch.bfloat16 else "sdpa")


def should_compile(train: TrainConfig, seconds: float, device: torch.device) -> bool:
    """Whether `auto` tries to compile: where a compiler is there and the run is long enough to earn its minute back.

    Args:
        seconds: that all the steps would take without it.
    """
    if train.compile != "auto":
        return train.compile == "on"
    if device.type == "cuda":
        return train.steps >= 1000
    return has_compiler(device) and seconds > COMPILE_SECONDS


def has_compiler(device: torch.device) -> bool:
    """Whether torch.compile has what it needs: for a processor it writes C++."""
    return device.type == "cuda" or any(shutil.which(name) for name in ("g++", "clang++", "c++"))


def compile_model(model: nn.Module, example: Tensor, ctx: DistContext) -> nn.Module:
    """The model as it is stepped, through torch.compile; as it was, with one line on stderr, if that fails anywhere.

    It is tried on `example` first, without a word to the other processes: then all go on compiled, or none. A model
    whose weights are split is compiled block by block, in place, since weights are exchanged between the blocks.
    """
    from torch.distributed.fsdp import FSDPModule

    set_deterministic(ctx.device.type == "cpu")
    split = isinstance(model, FSDPModule)
    failure, fast = "", model
    try:
        if split:
            shape = cast(GPT, model)
            small = GPT(replace(shape.config, n_layers=1), shape.vocab_size).to(ctx.device)
            trial = compile_blocks(small)
        else:
            trial = fast = torch.compile(model)  # type: ignore[assignment]
        with no_sync(model):
            forward_backward(trial, example, ctx)
    except Exception as error:  # a compiler fails in too many ways to name; the run goes on without it
        failure = (str(error).splitlines() or [type(error).__name__])[0][:150]
        print(f"torch.compile failed, going on without it: {failure}", file=sys.stderr)
    model.zero_grad(set_to_none=True)
    if ctx.all_reduce_max(int(bool(failure))):
        set_deterministic(False)
        return model
    return compile_blocks(model) if split else fast


def forward_backward(model: nn.Module, tokens: Tensor, ctx: DistContext) -> None:
    """A forward and a backward pass that leave no gradient."""
    with ctx.autocast():
        logits: Tensor = model(tokens)
    logits.float().sum().backward()
    model.zero_grad(set_to_none=True)


def no_sync(model: nn.Module) -> contextlib.AbstractContextManager[object]:
    """Backward passes without a word to the other processes."""
    return getattr(model, "no_sync", contextlib.nullcontext)()


def set_deterministic(on: bool) -> None:
    """Whether compiled code adds up the embedding's gradient in a fixed order, whatever its threads do.

    Else no compiled run is like another. Without the compiler the order is fixed anyway.
    """
    torch.use_deterministic_algorithms(on, warn_only=True)
    deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # it is for finding mistakes


def compile_blocks(model: nn.Module) -> nn.Module:
    """The model itself, its blocks compiled."""
    for block in cast(GPT, model).blocks:
        block.compile()
    return model


def is_compiled(model: nn.Module) -> bool:
    """Whether `compiled` changed anything."""
    blocks = getattr(model, "blocks", [])
    return hasattr(model, "_orig_mod") or any(block._compiled_call_impl is not None for block in blocks)
