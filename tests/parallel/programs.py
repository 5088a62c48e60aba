"""What the tests let several processes do: small programs, started by torchrun, that leave what they found in a folder.

python -m torch.distributed.run --standalone --nproc_per_node=2 -m tests.parallel.programs NAME FOLDER
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.profiler import profile

from common.errors import UserError, run_main
from model.config import ModelConfig
from model.gpt import GPT
from training.config import OptimConfig
from training.device import DistContext, compile_model, get_dist_context
from training.distributed import clip_grad_norm, gather_weights, maybe_no_sync, process_group, unwrap_model, wrap_model
from training.optimizer import Optimizer

SHAPE = ModelConfig(preset="qwen3", n_layers=2, n_heads=2, d_model=20, context=8, attention="eager")
VOCAB = 257
"""No tensor's length is divisible by every number of processes that is tried."""
TIMEOUT = 60.0


def plain(seed: int = 1, shape: ModelConfig = SHAPE) -> GPT:
    """A model in which every weight matters: drawn, then nudged, as some begin at zero."""
    model = GPT(shape, VOCAB, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def pieces(ctx: DistContext, step: int, rows: int = 12) -> list[Tensor]:
    """This process's share of a step's tokens, two rows at a time."""
    tokens = torch.randint(VOCAB, (rows, SHAPE.context), generator=torch.Generator().manual_seed(step))
    return list(tokens[ctx.rank :: ctx.world_size].split(2))


def gradient(stepped: nn.Module, ctx: DistContext, step: int, rows: int = 12) -> None:
    """Leave the gradient of the mean over the whole batch in the parameters."""
    mine = pieces(ctx, step, rows)
    for i, tokens in enumerate(mine):
        with maybe_no_sync(stepped, i == len(mine) - 1):
            (stepped(tokens).square().mean(dim=(1, 2)).sum() / rows * ctx.world_size).backward()


def optimizer_of(stepped: nn.Module) -> Optimizer:
    """Muon and AdamW, with rates at which every moment of every weight moves."""
    return Optimizer(stepped, OptimConfig(optimizer="muon", lr=0.01, muon_lr=0.02))


def train(stepped: nn.Module, ctx: DistContext, optimizer: Optimizer, steps: range) -> list[float]:
    """Some steps; the norm of each one's gradient."""
    norms = []
    for step in steps:
        gradient(stepped, ctx, step)
        norms.append(float(clip_grad_norm(stepped, 0.5)))
        optimizer.step()
    return norms


def keep(file: Path, model: GPT, moments: dict[str, Tensor]) -> None:
    """Weights and moments in one file."""
    weights = {f"weights/{name}": value.detach() for name, value in model.named_parameters()}
    save_file({**weights, **{f"moments/{name}": value for name, value in moments.items()}}, file)


def kept(file: Path, kind: str) -> dict[str, Tensor]:
    """The weights, or the moments, of such a file."""
    return {name.removeprefix(f"{kind}/"): value for name, value in load_file(file).items() if name.startswith(kind)}


def write(ctx: DistContext, folder: Path) -> None:
    """Train a little, each way; the first process saves. Each process begins with other weights: the first's count."""
    for sharding in ("none", "fsdp"):
        model = plain(seed=1 + ctx.rank)
        stepped = wrap_model(model, ctx, sharding)
        optimizer = optimizer_of(stepped)
        norms = train(stepped, ctx, optimizer, range(3))
        gather_weights(stepped, model)
        moments = optimizer.state_dict()
        if ctx.is_main_process:
            keep(folder / f"{sharding}.safetensors", model, moments)
            (folder / f"{sharding}.json").write_text(json.dumps(norms))
        elif sharding == "fsdp":
            assert not moments and all(value.is_meta for value in model.parameters())


def read(ctx: DistContext, folder: Path) -> None:
    """Take up what was saved, split it among the processes, bring it together again, and save that; then go on."""
    for name in ("none", "fsdp"):
        model = GPT(SHAPE, VOCAB, seed=9)
        if ctx.is_main_process:
            model.load_state_dict(kept(folder / f"{name}.safetensors", "weights"), strict=False)
        stepped = wrap_model(model, ctx, "fsdp")
        optimizer = optimizer_of(stepped)
        optimizer.load_state_dict(kept(folder / f"{name}.safetensors", "moments"))
        if ctx.is_main_process:
            nn.init.zeros_(model.blocks[0].mlp.up.weight)
        gather_weights(stepped, model)
        moments = optimizer.state_dict()
        if ctx.is_main_process:
            keep(folder / f"{name}-{ctx.world_size}.safetensors", model, moments)
        train(stepped, ctx, optimizer, range(3, 4))
        gather_weights(stepped, model)
        if ctx.is_main_process:
            keep(folder / f"{name}-{ctx.world_size}-later.safetensors", model, {})


def exchanges(stepped: nn.Module, ctx: DistContext) -> list[int]:
    """How often gradients are exchanged during each piece of a step."""
    counts, mine = [], pieces(ctx, 0)
    for i, tokens in enumerate(mine):
        with profile() as seen, maybe_no_sync(stepped, i == len(mine) - 1):
            stepped(tokens).sum().backward()
        counts.append(sum(event.name.startswith("c10d::") and "reduce" in event.name for event in seen.events()))
    return counts


def count(ctx: DistContext, folder: Path) -> None:
    """Count the exchanges of a step of three pieces, each way."""
    found = {sharding: exchanges(wrap_model(plain(), ctx, sharding), ctx) for sharding in ("none", "fsdp")}
    if ctx.is_main_process:
        (folder / "counts.json").write_text(json.dumps(found))


def count_compiled(ctx: DistContext, folder: Path) -> None:
    """The same of a single block, compiled; and how far the gradient is from that of the model as it is."""
    found = {}
    shape = replace(SHAPE, n_layers=1)
    for sharding in ("none", "fsdp"):
        stepped = wrap_model(plain(shape=shape), ctx, sharding)
        example = torch.zeros(2, SHAPE.context, dtype=torch.long)
        fast, _ = compile_model(stepped, example, ctx)
        counts = exchanges(fast, ctx)
        stepped.zero_grad()
        gradient(fast, ctx, 0)
        one = plain(shape=shape)
        gradient(one, DistContext(ctx.device, ctx.dtype), 0)
        grads = [(p.grad, q.grad) for p, q in zip(unwrap_model(fast).parameters(), one.parameters(), strict=True)]
        far = [float((getattr(a, "full_tensor", lambda a=a: a)() - b).norm() / b.norm()) for a, b in grads]
        found[sharding] = {"counts": counts, "far": max(far), "wrapped": fast is not stepped}
    if ctx.is_main_process:
        (folder / "compiled.json").write_text(json.dumps(found))


def agree(ctx: DistContext, folder: Path) -> None:
    """Everything by which processes agree; each writes what it came to."""
    told: dict[str, object] = {
        "sum": float(ctx.all_reduce_sum(torch.tensor(ctx.rank + 0.5))),
        "largest": ctx.all_reduce_max(10 - ctx.rank),
        "agree": ctx.broadcast_str(f"größer {ctx.rank} \udc80" if ctx.is_main_process else ""),
        "empty": ctx.broadcast_str("" if ctx.is_main_process else "something"),
        "last": ctx.broadcast_str(str(ctx.rank), source=ctx.world_size - 1),
    }
    ctx.check_same_everywhere({"the data": "same", "settings": "a\nb"})
    try:
        odd = ctx.rank == ctx.world_size - 1
        ctx.check_same_everywhere({"the data": "same", "settings": f"a = 1\nb = {odd}\n" + "c" * 500})
    except UserError as error:
        told["refused"] = str(error)
    (folder / f"agree-{ctx.rank}.json").write_text(json.dumps(told))


def fail_to_compile(ctx: DistContext, folder: Path) -> None:
    """A compiler that the last process lacks."""

    def broken(model: nn.Module) -> nn.Module:
        raise RuntimeError("no compiler here")

    def lazy(model: nn.Module) -> nn.Module:
        return nn.Sequential(model)  # stands for torch's wrapper

    torch.compile = broken if ctx.rank == ctx.world_size - 1 else lazy  # type: ignore[assignment]
    stepped = wrap_model(plain(), ctx, "none")
    fast, _ = compile_model(stepped, torch.zeros(2, SHAPE.context, dtype=torch.long), ctx)
    (folder / f"compiler-{ctx.rank}.json").write_text(json.dumps(fast is stepped))


def lose(how: signal.Signals, sharding: str) -> Callable[[DistContext, Path], None]:
    """Train until the last process is killed or frozen."""

    def program(ctx: DistContext, folder: Path) -> None:
        stepped = wrap_model(plain(), ctx, sharding)
        for step in range(1000):
            if step == 3 and ctx.rank == ctx.world_size - 1:
                (folder / "lost.json").write_text(json.dumps(os.getpid()))
                os.kill(os.getpid(), how)
            gradient(stepped, ctx, step)
            time.sleep(0.01)

    return program


PROGRAMS = {
    "write": write,
    "read": read,
    "count": count,
    "count_compiled": count_compiled,
    "agree": agree,
    "fail_to_compile": fail_to_compile,
    **{f"{how.name}-{way}": lose(how, way) for how in (signal.SIGKILL, signal.SIGSTOP) for way in ("none", "fsdp")},
}


def main(argv: list[str]) -> None:
    name, folder = argv
    with process_group(5.0 if name.startswith("SIG") else TIMEOUT):
        PROGRAMS[name](get_dist_context("fp32", threads=1), Path(folder))


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_main(main)
