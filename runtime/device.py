"""The machine a run lives on: device, number format, kernels, compilation, and the other processes of torchrun.

The only place that asks "cuda or cpu?" and the only one that knows of other processes. What it chooses it can say in
one line, `Machine.describe`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.config import ModelConfig
from runtime.config import TrainConfig

EXPLICIT_CONTEXT = 256
"""Up to here attention written out beats the processor's fused kernel in bf16 (benchmarks/NOTES.md)."""
COMPILE_SECONDS = 300.0
"""A run that would take longer than this without it earns the minute that torch.compile takes."""
ASSUMED_FLOPS = 1.5e11
"""Floating-point operations a second that such an estimate assumes of a small processor."""


@dataclass(frozen=True)
class Machine:
    """Where a process computes, and its place among the others."""

    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    world: int = 1

    @property
    def is_first(self) -> bool:
        """True for the one process that prints and writes."""
        return self.rank == 0

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Matrix products in this machine's number format; weights and sums stay in fp32."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""
        if self.world > 1:
            dist.all_reduce(value)
        return value

    def share(self, model: nn.Module) -> nn.Module:
        """The model, its gradients averaged over all processes."""
        if self.world == 1:
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)

    def last_only(self, model: nn.Module, last: bool) -> contextlib.AbstractContextManager[object]:
        """Processes exchange gradients on the last piece of a step only."""
        if isinstance(model, nn.parallel.DistributedDataParallel) and not last:
            return model.no_sync()
        return contextlib.nullcontext()

    def describe(self) -> str:
        """The choices in words, such as `cpu, 2 threads, bf16`."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        threads = f", {torch.get_num_threads()} threads" if self.device.type == "cpu" else ""
        processes = f", {self.world} processes" if self.world > 1 else ""
        return f"{name}{threads}{processes}, {'bf16' if self.dtype == torch.bfloat16 else 'fp32'}"


def bf16_is_fast(device: torch.device) -> bool:
    """Whether the hardware multiplies bf16 matrices natively; elsewhere bf16 is emulated and slow."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    tests = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, test, lambda: False)() for test in tests)


def find_machine(dtype: str = "auto", threads: int = 0) -> Machine:
    """The device of this process and the number format that pays on it.

    Under torchrun each process takes the GPU of its local rank, and the process group must be open (`processes`).
    """
    if threads:
        torch.set_num_threads(threads)
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    fast = bf16_is_fast(device) if dtype == "auto" else dtype == "bf16"
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return Machine(device, torch.bfloat16 if fast else torch.float32, rank, world)


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """The process group of torchrun while the body runs; nothing when the program was started on its own."""
    if "RANK" not in os.environ:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def choose_kernels(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> ModelConfig:
    """The config with `kernels` decided. The library's kernels win, but for bf16 on a processor at short context."""
    if config.kernels != "auto":
        return config
    explicit = device.type == "cpu" and dtype == torch.bfloat16 and config.context <= EXPLICIT_CONTEXT
    return replace(config, kernels="explicit" if explicit else "fused")


def worth_compiling(train: TrainConfig, tokens: int, parameters: int, device: torch.device) -> bool:
    """Whether `auto` compiles: where a compiler is there and the run is long enough to earn its minute back.

    Args:
        tokens: all that the run will train on; each costs about 6 operations a parameter (Kaplan et al. 2020, table 1).
    """
    if train.compile != "auto":
        return train.compile == "on"
    if device.type == "cuda":
        return train.steps >= 1000
    has_compiler = any(shutil.which(name) for name in ("g++", "clang++", "c++"))
    return has_compiler and 6 * parameters * tokens / ASSUMED_FLOPS > COMPILE_SECONDS


def compiled(model: nn.Module, example: Tensor, machine: Machine) -> nn.Module:
    """The model through torch.compile, tried on `example`; as it was, with one line on stderr, if that fails."""
    fast = model
    try:
        fast = torch.compile(model)  # type: ignore[assignment]
        with machine.autocast():
            fast(example).float().sum().backward()
    except Exception as error:  # a compiler fails in too many ways to name; the run goes on without it
        first = (str(error).splitlines() or [type(error).__name__])[0][:150]
        print(f"torch.compile failed, going on without it: {first}", file=sys.stderr)
        fast = model
    model.zero_grad(set_to_none=True)
    return fast
