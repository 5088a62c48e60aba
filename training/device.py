"""The only place that decides device, dtype, attention implementation and compilation; and a process's rank.

Every decision is a rule, so that the same command computes the same bits on the same machine. How a model is wrapped for
several processes is in `training/distributed.py`.
"""

import contextlib
import ctypes
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import deterministic

from common.errors import DISK_OR_MEMORY, UserError, is_out_of_memory, warn
from model.config import ModelConfig
from model.gpt import GPT
from training.config import TrainConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COMPILE_FLOPS = 4.5e13  # of a run on a CPU that `auto` compiles, five minutes: compiling takes up to a minute
COMPILE_STEPS = 1000  # of a run on a GPU that `auto` compiles


@dataclass(frozen=True)
class DistContext:
    """Device and dtype of this process, and its rank among all processes."""

    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    world_size: int = 1
    dtype_reason: str = ""  # why `dtype` was chosen, in a word or two

    @property
    def is_main_process(self) -> bool:
        """True for rank 0, which prints and writes files."""
        return self.rank == 0

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Matrix products in `dtype`; parameters and reductions stay in fp32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def to_device(self, tensor: Tensor) -> Tensor:
        """Copy a CPU tensor to the device, asynchronously to a CUDA GPU."""
        if self.device.type != "cuda":
            return tensor.to(self.device)
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def all_reduce_sum(self, value: Tensor) -> Tensor:
        """Sum a tensor over all processes, on the device; `value` may be overwritten."""
        if self.world_size == 1:
            return value
        value = value.to(self.device)
        dist.all_reduce(value)
        return value

    def all_reduce_max(self, value: int) -> int:
        """Maximum of an integer over all processes; used to agree on signals and failures."""
        if self.world_size == 1:
            return value
        tensor = torch.tensor(value, device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor)

    def broadcast_str(self, text: str, src: int = 0) -> str:
        """Return the text of rank `src` on every process."""
        if self.world_size == 1:
            return text
        data = torch.tensor(list(text.encode("utf-8", "surrogateescape")), dtype=torch.uint8, device=self.device)
        length = torch.tensor(len(data), device=self.device)
        dist.broadcast(length, src)
        if self.rank != src:
            data = torch.empty(int(length), dtype=torch.uint8, device=self.device)
        if length:
            dist.broadcast(data, src)
        return bytes(data.tolist()).decode("utf-8", "surrogateescape")

    def check_same_everywhere(self, what: str, text: str) -> None:
        """Raise `UserError` (2) on every process, with the first different line, unless `what` has the same text on all."""
        expected = self.broadcast_str(text)
        rank = self.all_reduce_max(self.rank if text != expected else 0)  # rank 0 never differs from itself
        if rank:
            other = self.broadcast_str(text, rank)
            lines = zip_longest(expected.splitlines(), other.splitlines(), fillvalue="")
            a, b = next(((x[:80], y[:80]) for x, y in lines if x != y), ("", "other line breaks"))
            raise UserError(
                f"{what} differs: {a!r} on process 0, {b!r} on process {rank}; "
                "start every process with the same command, data and versions"
            )

    def describe(self) -> str:
        """The choices in words, such as `cpu, 2 threads, bf16 (AVX512-BF16)`."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        threads = f", {torch.get_num_threads()} threads" if self.device.type == "cpu" else ""
        processes = f", {self.world_size} processes" if self.world_size > 1 else ""
        reason = f" ({self.dtype_reason})" if self.dtype_reason else ""
        dtype = next(name for name, dtype in DTYPES.items() if dtype == self.dtype)
        return f"{name}{threads}{processes}, {dtype}{reason}"


def resolve_device(name: str = "auto") -> torch.device:
    """The device of this process; `auto` is a CUDA GPU if there is one, else the CPU. Raises UserError (2) if there is none."""
    found = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = "cuda" if found["cuda"] else "cpu"
    if not found[name]:
        raise UserError(f"there is no {name} device: PyTorch {torch.__version__} finds none here; use auto or cpu")
    return torch.device(name, int(os.environ.get("LOCAL_RANK", "0"))) if name == "cuda" else torch.device(name)


def get_dist_context(dtype: str = "auto", threads: int = 0, device: str = "auto") -> DistContext:
    """Choose device (`resolve_device`) and dtype (`auto_dtype`) of this process, and its CPU threads unless `threads` is 0;
    under torchrun it must be in `distributed.process_group`."""
    if threads:
        torch.set_num_threads(threads)
    chosen = resolve_device(device)
    if chosen.type == "cpu" and sys.platform == "linux":
        keep_freed_memory()
    dtype, reason = auto_dtype(chosen) if dtype == "auto" else (dtype, "train.dtype")
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return DistContext(chosen, DTYPES[dtype], rank, world_size, reason)


def auto_dtype(device: torch.device) -> tuple[str, str]:
    """The dtype of matrix products and why: bf16 where the hardware multiplies it natively, else fp16 on a CUDA GPU with
    tensor cores (V100, T4), else fp32."""
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "native"
        has_tensor_cores = torch.cuda.get_device_capability(device) >= (7, 0)
        return ("fp16", "no native bf16") if has_tensor_cores else ("fp32", "no tensor cores")
    features = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    native = "AMX" if features.get("amx_tile") else "AVX512-BF16" if features.get("avx512_bf16") else ""
    return ("bf16", native) if native else ("fp32", "no native bf16")


def resolve_attention(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> ModelConfig:
    """Replace `attention = "auto"`: chunked for bf16 on a CPU, where torch's kernel is slow, else sdpa."""
    if config.attention != "auto":
        return config
    return replace(config, attention="chunked" if device.type == "cpu" and dtype == torch.bfloat16 else "sdpa")


def should_compile(train: TrainConfig, flops: float, device: torch.device) -> bool:
    """Whether to compile the model; `auto` compiles a run of many `flops` in this process if there is a compiler."""
    if train.compile != "auto":
        return train.compile == "on"
    if device.type == "cuda":
        return train.steps >= COMPILE_STEPS
    return flops > COMPILE_FLOPS and any(shutil.which(name) for name in ("g++", "clang++", "c++"))


def compile_model(model: nn.Module, example: Tensor, ctx: DistContext) -> tuple[nn.Module, bool]:
    """The model through torch.compile, and whether that worked; if not, the model itself and a line on stderr.

    Each process first tries `example` (B, T) without communication; then all use the compiled model, or none does.
    An FSDP model is compiled block by block, in place, because parameters are gathered between the blocks; a model of
    one block is tried in its place.
    """
    from torch.distributed.fsdp import FSDPModule

    # Compiled code must sum the embedding's gradient in a fixed order; without compiling the order is fixed anyway.
    torch.use_deterministic_algorithms(ctx.device.type == "cpu", warn_only=True)
    deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # only needed for debugging
    is_fsdp, failed = isinstance(model, FSDPModule), False
    try:
        if is_fsdp:
            gpt = cast(GPT, model)
            trial = compile_blocks(GPT(replace(gpt.config, n_layers=1), gpt.vocab_size).to(ctx.device))
        else:
            trial = cast(nn.Module, torch.compile(model))
        with getattr(model, "no_sync", contextlib.nullcontext)():
            with ctx.autocast():
                logits = trial(example)
            logits.float().sum().backward()
    except Exception as error:  # compilers fail in too many ways to list; training works without
        failed, reason = True, (str(error).splitlines() or [type(error).__name__])[0][:150]
        warn(f"torch.compile failed, training continues without it: {reason}")
    model.zero_grad(set_to_none=True)
    if ctx.all_reduce_max(int(failed)):
        torch.use_deterministic_algorithms(False)
        return model, False
    return compile_blocks(model) if is_fsdp else trial, True


def compile_blocks(model: nn.Module) -> nn.Module:
    for block in cast(GPT, model).blocks:
        block.compile()
    return model


def clock(ctx: DistContext) -> float:
    """The time in seconds, once a GPU has finished its queued work."""
    if ctx.device.type != "cpu":
        torch.accelerator.synchronize(ctx.device)
    return time.perf_counter()


def measure_matmul_flops(ctx: DistContext) -> float:
    """FLOP/s of a large matrix product in `ctx.dtype`: the best of five, in about 0.1 s."""
    size = 1024 if ctx.device.type == "cpu" else 4096
    a, b = torch.ones(2, size, size, device=ctx.device, dtype=ctx.dtype)
    times = []
    for _ in range(6):  # the first one loads libraries
        start = clock(ctx)
        a @ b
        times.append(clock(ctx) - start)
    return 2 * size**3 / min(times)


def keep_freed_memory() -> None:
    """Let glibc keep freed memory in the process instead of returning it to the system.

    Otherwise pages are returned and cleared again during every step, a ninth of its time (benchmarks/NOTES.md).
    `MALLOC_` variables of the environment take precedence.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is not None and not any(name.startswith("MALLOC_") for name in os.environ):
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, to the highest value that it accepts


@contextlib.contextmanager
def advise_on_oom(micro_batch_size: int, batch_size: int) -> Iterator[None]:
    """Turn running out of memory in the body into a UserError (6) that names the micro-batch size to try."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        if micro_batch_size > 1:
            advice = f"try --train.micro_batch_size {micro_batch_size // 2}, with the same batch of {batch_size}"
            advice += ", or a smaller model"
        else:
            advice = "lower model.context or the model's size, or shard it over processes with --train.sharding fsdp"
        raise UserError(f"out of memory with {micro_batch_size} sequences at once: {advice}", DISK_OR_MEMORY) from error
