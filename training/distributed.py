"""Several processes: torchrun's process group, DDP or FSDP2 around the model, and one process that prepares the data.

A `GPT` is trained as it is (one process), with gradients averaged over processes (DDP), or with parameters, gradients
and optimizer state sharded over them (FSDP2, `train.sharding = "fsdp"`). All three compute the same gradient.
"""

import contextlib
import copy
import math
import os
import re
import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from filelock import FileLock
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from common.errors import LOST_PROCESS, UserError
from data.config import DataConfig
from data.prepare import TokenizedCorpus, prepare
from model.gpt import GPT
from training.device import DistContext, resolve_device

LOST = re.compile(
    "(gloo|nccl).*(closed|reset|aborted|timed out|timeout|broken pipe|refused|unreachable|no route|remoteerror|systemerror)",
    re.IGNORECASE | re.DOTALL,
)
"""Messages of gloo and NCCL when another process ended or froze (third_party/gloo/gloo/transport/tcp,
torch/csrc/distributed/c10d/NCCLUtils.cpp and ProcessGroupNCCL.cpp)."""


def check_environment(device: str) -> None:
    """Raise `UserError` (2) if torchrun's environment is incomplete, or this process has no device of its own."""
    if missing := [
        name for name in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ
    ]:
        raise UserError(f"RANK is set, but not {', '.join(missing)}: start with torchrun, or unset RANK")
    if device == "mps":
        raise UserError("run.device mps is for one process: start without torchrun, or use --run.device cpu")
    if device != "cpu" and 0 < (gpus := torch.cuda.device_count()) <= int(os.environ["LOCAL_RANK"]):
        raise UserError(
            f"this machine has {gpus} GPU{'s' * (gpus > 1)}: start torchrun with --nproc_per_node={gpus} or less"
        )


@contextlib.contextmanager
def process_group(timeout: float, device: str = "auto") -> Iterator[None]:
    """Initialize torchrun's process group for the body, with `timeout` in seconds; does nothing without torchrun.

    Raises UserError if torchrun's environment is incomplete or a process has no GPU (exit code 2), or another process ended
    or froze (8).
    """
    if "RANK" not in os.environ:
        yield
        return
    check_environment(device)
    limit = timedelta(seconds=timeout)
    try:
        on_gpu = resolve_device(device).type == "cuda"
        if on_gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "nccl" if on_gpu and dist.is_nccl_available() else "gloo"
        store, rank, world_size = next(dist.rendezvous("env://", timeout=limit))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":  # else the ended processes of a restarted job are found there
            store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=limit)
        yield
    except Exception as error:
        if (group := dist.group.WORLD) is not None:
            group.abort()  # destroying it in order would wait for processes that may be gone
        is_lost = isinstance(error, dist.DistNetworkError | dist.DistStoreError) or LOST.search(str(error))
        if not (is_lost and isinstance(error, RuntimeError)):
            raise
        time.sleep(1)  # if the other process printed why it ended, torchrun now ends this one silently
        raise UserError(
            f"process {os.environ['RANK']} lost another process, which ended or did not answer for {timeout:g} s "
            "(run.dist_timeout); checkpoints are safe: continue with --run.resume",
            LOST_PROCESS,
        ) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def prepare_once(config: DataConfig, ctx: DistContext) -> TokenizedCorpus:
    """Prepare the corpus on one process of each machine; the others wait and read the cache.

    They wait for a file lock and not for a message, because preparing may take longer than `run.dist_timeout`, and the
    system releases the lock of a process that ends. Machines that share a cache prepare it at the same time.
    """
    if ctx.world_size == 1:
        return prepare(config)
    local_rank = int(os.environ["LOCAL_RANK"])
    # of this job and node; several nodes of torchrun can run on one machine
    user = os.getuid() if hasattr(os, "getuid") else "user"  # Windows has a folder for each user
    name = f"glassgpt-{user}-{os.environ['MASTER_PORT']}-{os.environ.get('GROUP_RANK', '0')}.lock"
    lock = FileLock(Path(tempfile.gettempdir()) / name)
    with lock if local_rank == 0 else contextlib.nullcontext():
        ctx.all_reduce_max(0)  # whoever prepares has the lock now
        if local_rank:
            with lock:  # wait for it, then read the cache with the others
                pass
        return prepare(config, progress=ctx.is_main_process, verify=local_rank == 0)


def wrap_model(model: GPT, ctx: DistContext, sharding: str) -> nn.Module:
    """The model to train: with `sharding = "none"` it is `model`, or DDP around it. `fsdp` returns a sharded copy and keeps
    `model` on the CPU of the main process, to be filled by `gather_weights`; without torchrun it is the same as `none`."""
    if sharding == "fsdp" and dist.is_initialized():
        return wrap_fsdp(model, ctx)
    model.to(ctx.device)
    if ctx.world_size == 1:
        return model
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    # DDP rebuilds its buckets after the first backward pass, which changes how sums over three or more processes round.
    # A pass on one token before training makes new and resumed runs add in the same order.
    wrapped(torch.zeros((1, 1), dtype=torch.long, device=ctx.device)).sum().backward()
    model.zero_grad()
    return wrapped


def wrap_fsdp(model: GPT, ctx: DistContext) -> GPT:
    """A copy of `model` sharded with FSDP2; `model` itself stays on the CPU of the main process, elsewhere on `meta`.

    Each block is a unit, whose parameters are gathered while it computes; embeddings and the final norm are one more.
    Every process has the same weights and keeps its shards of them, so that no device holds more.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    sharded = copy.deepcopy(model)
    mesh = init_device_mesh(ctx.device.type, (ctx.world_size,))
    for module in (*sharded.blocks, sharded):
        fully_shard(module, mesh=mesh)
    if not ctx.is_main_process:
        model.to("meta")
        model.tie_weights()  # moving to `meta` unties them
    return sharded


@torch.no_grad()
def gather_weights(wrapped_model: nn.Module, model: GPT) -> None:
    """Copy the full weights of an FSDP model, one by one, into `model` on the main process; every process must call it.

    Without FSDP `model` shares its weights with `wrapped_model`.
    """
    if not is_fsdp(wrapped_model):
        return
    sharded = cast(Any, unwrap_model(wrapped_model))
    sharded.reshard()  # an evaluation leaves the embeddings gathered
    for parameter, target in zip(sharded.parameters(), model.parameters(), strict=True):
        value = full_tensor(parameter)
        if not target.is_meta:
            target.copy_(value)


def unwrap_model(model: nn.Module) -> nn.Module:
    """The module inside torch.compile and DDP, whose parameters have the names of a `GPT`."""
    for wrapper in ("_orig_mod", "module", "_orig_mod"):
        model = getattr(model, wrapper, model)
    return model


def is_fsdp(model: nn.Module) -> bool:
    """Whether the parameters are sharded with FSDP2."""
    return hasattr(unwrap_model(model), "set_requires_gradient_sync")


def maybe_no_sync(model: nn.Module, sync: bool) -> contextlib.AbstractContextManager[object]:
    """Synchronize gradients in the backward pass only if `sync`; with FSDP a device holds them whole until then."""
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, DistributedDataParallel) and not sync:
        return model.no_sync()
    if is_fsdp(model):
        model.set_requires_gradient_sync(sync)  # type: ignore[operator]
    return contextlib.nullcontext()


def clip_grad_norm(model: nn.Module, max_norm: float) -> Tensor:
    """Scale the gradient down to `max_norm` (0: never); its norm before, the same on every process."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = full_tensor(get_total_norm([cast(Tensor, p.grad) for p in parameters]))
    clip_grads_with_norm_(parameters, max_norm or math.inf, norm)
    return norm


def is_dtensor(tensor: Tensor) -> bool:
    """Whether this process has a shard of the tensor."""
    return hasattr(tensor, "full_tensor")


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded; if it is, every process must call this."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


@torch.no_grad()
def distribute(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's shard of a tensor that every process has, on the device and with the sharding of `like`."""
    tensor = tensor.to(like.device)
    if not is_dtensor(like):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    shard = distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
    return torch.empty_like(like, requires_grad=False).copy_(shard)  # `shard` itself would keep the full tensor alive
