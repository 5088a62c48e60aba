"""Programs that the tests run in several processes; each leaves its results in a folder.

python -m torch.distributed.run --standalone --nproc_per_node=2 -m tests.parallel.programs NAME FOLDER
"""

import contextlib
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.profiler import profile

from common.errors import UserError, run_main
from model.config import ModelConfig
from model.gpt import GPT
from training.config import OptimConfig
from training.device import DistContext, compile_model, get_dist_context
from training.distributed import (
    clip_grad_norm,
    full_tensor,
    gather_weights,
    maybe_no_sync,
    process_group,
    unwrap_model,
    wrap_model,
)
from training.optimizer import Optimizer

SHAPE = ModelConfig(preset="qwen3", n_layers=2, n_heads=2, d_model=20, context=8, attention="eager")
VOCAB = 257
"""No dimension is divisible by every number of processes."""


def tiny_model(seed: int = 1, shape: ModelConfig = SHAPE) -> GPT:
    """A model whose parameters are all nonzero and random."""
    model = GPT(shape, VOCAB, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def tiny_optimizer(model: nn.Module) -> Optimizer:
    return Optimizer(model, OptimConfig(optimizer="muon", lr=0.01, muon_lr=0.02))


def backward(model: nn.Module, ctx: DistContext, step: int, context: Any = contextlib.nullcontext) -> list[Any]:
    """Compute the gradient of the mean over a batch, two sequences at a time, each within a `context()`."""
    tokens = torch.randint(VOCAB, (12, SHAPE.context), generator=torch.Generator().manual_seed(step))
    parts, entered = tokens[ctx.rank :: ctx.world_size].split(2), []
    for i, part in enumerate(parts):
        with context() as seen, maybe_no_sync(model, i == len(parts) - 1):
            (model(part).square().mean(dim=(1, 2)).sum() / len(tokens) * ctx.world_size).backward()
        entered.append(seen)
    return entered


def train(model: nn.Module, ctx: DistContext, optimizer: Optimizer, steps: range) -> list[float]:
    """Train; the gradient norm of each step."""
    norms = []
    for step in steps:
        backward(model, ctx, step)
        norms.append(float(clip_grad_norm(model, 0.5)))
        optimizer.step()
    return norms


def save(file: Path, model: GPT, state: dict[str, Tensor]) -> None:
    weights = {f"weights/{name}": value.detach() for name, value in model.named_parameters()}
    save_file({**weights, **{f"state/{name}": value for name, value in state.items()}}, file)


def load(file: Path, kind: str) -> dict[str, Tensor]:
    """`weights` or optimizer `state` of a saved file."""
    return {name.removeprefix(f"{kind}/"): value for name, value in load_file(file).items() if name.startswith(kind)}


def write(ctx: DistContext, folder: Path) -> None:
    """Train three steps with DDP and with FSDP, and save."""
    for sharding in ("none", "fsdp"):
        model = tiny_model()
        wrapped = wrap_model(model, ctx, sharding)
        optimizer = tiny_optimizer(wrapped)
        norms = train(wrapped, ctx, optimizer, range(3))
        gather_weights(wrapped, model)
        state = optimizer.state_dict()
        if ctx.is_main_process:
            save(folder / f"{sharding}.safetensors", model, state)
            (folder / f"{sharding}.json").write_text(json.dumps(norms))
        elif sharding == "fsdp":
            assert not state and all(value.is_meta for value in model.parameters())


def read(ctx: DistContext, folder: Path) -> None:
    """Load what `write` saved into an FSDP model, gather and save it again."""
    for name in ("none", "fsdp"):
        model = GPT(SHAPE, VOCAB, seed=9)
        model.load_state_dict(load(folder / f"{name}.safetensors", "weights"), strict=False)
        wrapped = wrap_model(model, ctx, "fsdp")
        optimizer = tiny_optimizer(wrapped)
        optimizer.load_state_dict(load(folder / f"{name}.safetensors", "state"))
        if ctx.is_main_process:
            nn.init.zeros_(model.get_parameter("blocks.0.mlp.up.weight"))
        gather_weights(wrapped, model)
        state = optimizer.state_dict()
        if ctx.is_main_process:
            save(folder / f"{name}-{ctx.world_size}.safetensors", model, state)


def gradients(ctx: DistContext, folder: Path) -> None:
    """Reductions and gradients of a model of one block, also compiled, against a model in one process."""
    found, shape = {}, replace(SHAPE, n_layers=1)
    reference = tiny_model(shape=shape)
    backward(reference, DistContext(ctx.device, ctx.dtype), 0)
    for sharding, compiling in itertools.product(("none", "fsdp"), (False, True)):
        wrapped, is_compiled = wrap_model(tiny_model(shape=shape), ctx, sharding), False
        if compiling:
            wrapped, is_compiled = compile_model(wrapped, torch.zeros(2, SHAPE.context, dtype=torch.long), ctx)
        events = [profiler.events() for profiler in backward(wrapped, ctx, 0, profile)]
        counts = [sum(e.name.startswith("c10d::") and "reduce" in e.name for e in batch) for batch in events]
        pairs = zip(unwrap_model(wrapped).parameters(), reference.parameters(), strict=True)
        grads = [(full_tensor(p.grad), q.grad) for p, q in pairs if p.grad is not None and q.grad is not None]
        error = max(float((a - b).norm() / b.norm()) for a, b in grads)
        found[f"{sharding} {compiling}"] = {"counts": counts, "is_exact": error < 1e-5, "compiled": is_compiled}
    if ctx.is_main_process:
        (folder / "gradients.json").write_text(json.dumps(found))


def agree(ctx: DistContext, folder: Path) -> None:
    """Every collective of `DistContext`."""
    found: dict[str, object] = {
        "sum": float(ctx.all_reduce_sum(torch.tensor(ctx.rank + 0.5))),
        "max": ctx.all_reduce_max(10 - ctx.rank),
        "text": ctx.broadcast_str(f"größer {ctx.rank} \udc80" if ctx.is_main_process else ""),
        "empty": ctx.broadcast_str("" if ctx.is_main_process else "something"),
        "last": ctx.broadcast_str(str(ctx.rank), src=ctx.world_size - 1),
    }
    ctx.check_same_everywhere("the data", "same")
    try:
        is_last = ctx.rank == ctx.world_size - 1
        ctx.check_same_everywhere("settings", f"a = 1\nb = {is_last}\n" + "c" * 500)
    except UserError as error:
        found["error"] = str(error)
    (folder / f"agree-{ctx.rank}.json").write_text(json.dumps(found))


PROGRAMS = {f.__name__: f for f in (write, read, gradients, agree)}


def main(argv: list[str]) -> None:
    name, folder = argv
    with process_group(60.0):
        PROGRAMS[name](get_dist_context("fp32", threads=1), Path(folder))


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_main(main)
