"""One model in many processes: the group that torchrun starts, and the model as it is stepped there.

Three ways to step a `GPT`: as it is (one process), with gradients averaged over all processes (DDP), or with weights,
gradients and moments split among them (FSDP2, `train.sharding = "fsdp"`). All three leave the same gradient. The loop
asks `share` for one and treats it the same from then on; `training/device.py` knows where this process stands.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from common.errors import LOST_PROCESS, UserError
from model.gpt import GPT
from training.device import DistContext

LOST_GLOO = re.compile(
    r"gloo.*(closed by peer|reset by peer|timed out|timeout|Broken pipe|refused|unreachable|No route)", re.I | re.S
)
"""How gloo words that a process ended or froze (third_party/gloo/gloo/transport/tcp); a wrong call reads otherwise."""
PATIENCE = 1.0
"""Seconds; torchrun looks for processes that ended ten times in one."""
LOST_NCCL = re.compile(r"ncclRemoteError|ncclSystemError|timed out|timeout|aborted|closed|reset|refused", re.I)
"""The same of nccl (torch/csrc/distributed/c10d/NCCLUtils.cpp and ProcessGroupNCCL.cpp)."""


def is_lost(error: RuntimeError) -> bool:
    """Whether an error of torch.distributed says that another process ended or froze."""
    if isinstance(error, dist.DistNetworkError | dist.DistStoreError):
        return True
    pattern = LOST_NCCL if isinstance(error, dist.DistBackendError) else LOST_GLOO
    return bool(pattern.search(str(error)))


@contextlib.contextmanager
def process_group(timeout: float) -> Iterator[None]:
    """The process group of torchrun while the body runs; nothing when the program was started on its own.

    Args:
        timeout: seconds that a process waits for the others, at the start and in every exchange.

    Raises:
        UserError: if another process ended or froze (exit code 8).
    """
    if "RANK" not in os.environ:
        yield
        return
    try:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        store, rank, world = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout)))
        store = own_round(store, rank, world, timeout)
        limit = timedelta(seconds=timeout)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)
        yield
    except Exception as error:
        if (group := dist.group.WORLD) is not None:
            group.abort()  # an orderly end would wait for processes that may be gone
        if not (isinstance(error, RuntimeError) and is_lost(error)):
            raise
        time.sleep(PATIENCE)  # if the other one has said why it ended, torchrun ends this one before it speaks
        raise UserError(
            f"process {os.environ['RANK']} lost another one, which ended or did not answer for {timeout:g} s "
            "(run.dist_timeout); nothing saved is lost: go on with --run.resume",
            LOST_PROCESS,
        ) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def own_round(store: dist.Store, rank: int, world: int, timeout: float) -> dist.Store:
    """A part of torchrun's store that this start of the job shares with none before.

    After a restart the store is still the old one, and in it lie the addresses of the processes that ended. Who is
    faster than another one would find those and call nobody (seen with torch 2.13). So the first process names the
    round, and greets each other one by the number that it drew on arriving, until all have answered.

    Raises:
        torch.distributed.DistStoreError: if not all have come after `timeout` seconds.
    """
    me = str(store.add("arrivals", 1))
    store.set(f"here/{rank}", me)
    if rank:
        store.wait([f"welcome/{me}"], timedelta(seconds=timeout))
        name = store.get(f"welcome/{me}").decode()
        store.add(f"answers/{name}", 1)
        return dist.PrefixStore(name, store)
    deadline = time.monotonic() + timeout
    while store.add(f"answers/{me}", 0) < world - 1:
        if time.monotonic() > deadline:
            raise dist.DistStoreError(f"after {timeout:g} s not all of {world} processes have come")
        for key in (f"here/{other}" for other in range(1, world)):
            if store.check([key]):  # perhaps somebody's who is no more; then it changes soon
                store.set(f"welcome/{store.get(key).decode()}", me)
        time.sleep(0.02)
    return dist.PrefixStore(me, store)


def unwrap_model(stepped: nn.Module) -> nn.Module:
    """The model beneath the wrappers of torch.compile and DDP: its parameters have the names of a plain `GPT`."""
    while True:
        if isinstance(stepped, DistributedDataParallel):
            stepped = stepped.module
        elif hasattr(stepped, "_orig_mod"):
            stepped = cast(nn.Module, stepped._orig_mod)
        else:
            return stepped


def is_fsdp(stepped: nn.Module) -> bool:
    """Whether the weights are split among the processes (FSDP2)."""
    return hasattr(unwrap_model(stepped), "set_requires_gradient_sync")


def wrap_model(model: GPT, ctx: DistContext, sharding: str) -> nn.Module:
    """The model as it is stepped: itself, or what makes it one of many.

    Args:
        sharding: `none` gives the model itself, or DDP over it, so that `model`'s parameters are those that are
            stepped. `full` gives a copy that is split among the processes (FSDP2), and keeps `model` on the CPU of
            the first process alone, to be filled by `gather`; where torchrun did not start us there is nobody to
            share with, and it is `none`.
    """
    if sharding == "fsdp" and dist.is_initialized():
        return wrap_fsdp(model, ctx)
    model.to(ctx.device)
    if ctx.world_size == 1:
        return model
    ids = [ctx.device.index] if ctx.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)


def wrap_fsdp(plain: GPT, ctx: DistContext) -> GPT:
    """A copy of `plain` whose weights are split among the processes; `plain` itself goes to the CPU, or to `meta`.

    Each block is a unit: its weights are put together while it computes, and let go again. What lies outside the
    blocks, the embeddings and the last norm, is one more. The first process hands the weights out unit by unit, so
    that no device ever holds more than its share and one unit. In the computer's memory each process has the plain
    model it comes with, 4 bytes a parameter, until here; from here on the first one alone.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    plain.to("cpu" if ctx.is_main_process else "meta")
    plain.lm_head.weight = plain.token_embedding.weight  # on the way to `meta` each module gets a parameter of its own
    with torch.device("meta"):
        sharded = GPT(plain.config, plain.vocab_size)
    mesh = init_device_mesh(ctx.device.type, (ctx.world_size,))
    for block, source in zip(sharded.blocks, plain.blocks, strict=True):
        block.to_empty(device=ctx.device)
        broadcast_weights(block, source)
        fully_shard(block, mesh=mesh)
    for name, outside in sharded.named_children():
        if name != "blocks":
            outside.to_empty(device=ctx.device)
    sharded.lm_head.weight = sharded.token_embedding.weight
    broadcast_weights(sharded, plain)
    fully_shard(sharded, mesh=mesh)
    return sharded


@torch.no_grad()
def broadcast_weights(unit: nn.Module, source: nn.Module) -> None:
    """Give every process the first one's weights; those that are split already have theirs."""
    for parameter, value in zip(unit.parameters(), source.parameters(), strict=True):
        if not is_dtensor(parameter):
            if not value.is_meta:
                parameter.copy_(value)
            dist.broadcast(parameter, 0)


@torch.no_grad()
def gather_weights(stepped: nn.Module, plain: GPT) -> None:
    """Fill `plain` on the first process with the weights that are split; every process calls it, at the same point.

    One tensor at a time is put together on the device and laid down on the CPU. Where the weights are not split,
    `plain` has them already.
    """
    if not is_fsdp(stepped):
        return
    sharded = cast(Any, unwrap_model(stepped))
    sharded.reshard()  # an evaluation leaves the embeddings whole
    for parameter, kept in zip(sharded.parameters(), plain.parameters(), strict=True):
        value = full_tensor(parameter)
        if not kept.is_meta:
            kept.copy_(value)


def maybe_no_sync(stepped: nn.Module, last: bool) -> contextlib.AbstractContextManager[object]:
    """Processes exchange gradients on the last piece of a step only.

    Where weights are split, a device holds the gradient of the whole model until then: a step of one piece needs least.
    """
    while hasattr(stepped, "_orig_mod"):  # torch.compile's wrapper
        stepped = cast(nn.Module, stepped._orig_mod)
    if isinstance(stepped, DistributedDataParallel):
        return contextlib.nullcontext() if last else stepped.no_sync()
    if is_fsdp(stepped):
        stepped.set_requires_gradient_sync(last)  # type: ignore[operator]
    return contextlib.nullcontext()


def clip_grad_norm(stepped: nn.Module, limit: float) -> Tensor:
    """Scale the gradient down to the norm `limit` (0: leave it); its norm before that, the same on every process."""
    parameters = [p for p in stepped.parameters() if p.grad is not None]
    norm = full_tensor(get_total_norm([cast(Tensor, p.grad) for p in parameters]))
    clip_grads_with_norm_(parameters, limit or math.inf, norm)
    return norm


def is_dtensor(value: Tensor) -> bool:
    """Whether this process holds a part of the tensor."""
    return hasattr(value, "full_tensor")


def full_tensor(value: Tensor) -> Tensor:
    """All of a tensor that may be split among the processes; if it is, every process calls this at the same point."""
    return value.full_tensor() if is_dtensor(value) else value  # type: ignore[attr-defined]


@torch.no_grad()
def distribute(value: Tensor, like: Tensor) -> Tensor:
    """What this process keeps of a whole tensor that every process has, where `like` lies and split the same way."""
    here = value.to(like.device)
    if not is_dtensor(like):
        return here
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    part = distribute_tensor(here, like.device_mesh, like.placements, src_data_rank=None)
    return torch.empty_like(like, requires_grad=False).copy_(part)  # the part itself keeps the whole in memory
