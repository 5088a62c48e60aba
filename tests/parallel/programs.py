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
from training.device import DistContext, compiled, get_dist_context
from training.distributed import bare, clip_gradient, gather, last_only, processes, share
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


def pieces(machine: DistContext, step: int, rows: int = 12) -> list[Tensor]:
    """This process's share of a step's tokens, two rows at a time."""
    tokens = torch.randint(VOCAB, (rows, SHAPE.context), generator=torch.Generator().manual_seed(step))
    return list(tokens[machine.rank :: machine.world].split(2))


def gradient(stepped: nn.Module, machine: DistContext, step: int, rows: int = 12) -> None:
    """Leave the gradient of the mean over the whole batch in the parameters."""
    mine = pieces(machine, step, rows)
    for i, tokens in enumerate(mine):
        with last_only(stepped, i == len(mine) - 1):
            (stepped(tokens).square().mean(dim=(1, 2)).sum() / rows * machine.world).backward()


def optimizer_of(stepped: nn.Module) -> Optimizer:
    """Muon and AdamW, with rates at which every moment of every weight moves."""
    return Optimizer(stepped, OptimConfig(name="muon", lr=0.01, muon_lr=0.02))


def train(stepped: nn.Module, machine: DistContext, optimizer: Optimizer, steps: range) -> list[float]:
    """Some steps; the norm of each one's gradient."""
    norms = []
    for step in steps:
        gradient(stepped, machine, step)
        norms.append(clip_gradient(stepped, 0.5))
        optimizer.step()
    return norms


def keep(file: Path, model: GPT, moments: dict[str, Tensor]) -> None:
    """Weights and moments in one file."""
    weights = {f"weights/{name}": value.detach() for name, value in model.named_parameters()}
    save_file({**weights, **{f"moments/{name}": value for name, value in moments.items()}}, file)


def kept(file: Path, kind: str) -> dict[str, Tensor]:
    """The weights, or the moments, of such a file."""
    return {name.removeprefix(f"{kind}/"): value for name, value in load_file(file).items() if name.startswith(kind)}


def write(machine: DistContext, folder: Path) -> None:
    """Train a little, each way; the first process saves. Each process begins with other weights: the first's count."""
    for sharding in ("none", "full"):
        model = plain(seed=1 + machine.rank)
        stepped = share(model, machine, sharding)
        optimizer = optimizer_of(stepped)
        norms = train(stepped, machine, optimizer, range(3))
        gather(stepped, model)
        moments = optimizer.state_dict()
        if machine.is_main_process:
            keep(folder / f"{sharding}.safetensors", model, moments)
            (folder / f"{sharding}.json").write_text(json.dumps(norms))
        elif sharding == "full":
            assert not moments and all(value.is_meta for value in model.parameters())


def read(machine: DistContext, folder: Path) -> None:
    """Take up what was saved, split it among the processes, bring it together again, and save that; then go on."""
    for name in ("none", "full"):
        model = GPT(SHAPE, VOCAB, seed=9)
        if machine.is_main_process:
            model.load_state_dict(kept(folder / f"{name}.safetensors", "weights"), strict=False)
        stepped = share(model, machine, "full")
        optimizer = optimizer_of(stepped)
        optimizer.load_state_dict(kept(folder / f"{name}.safetensors", "moments"))
        if machine.is_main_process:
            nn.init.zeros_(model.blocks[0].mlp.up.weight)
        gather(stepped, model)
        moments = optimizer.state_dict()
        if machine.is_main_process:
            keep(folder / f"{name}-{machine.world}.safetensors", model, moments)
        train(stepped, machine, optimizer, range(3, 4))
        gather(stepped, model)
        if machine.is_main_process:
            keep(folder / f"{name}-{machine.world}-later.safetensors", model, {})


def exchanges(stepped: nn.Module, machine: DistContext) -> list[int]:
    """How often gradients are exchanged during each piece of a step."""
    counts, mine = [], pieces(machine, 0)
    for i, tokens in enumerate(mine):
        with profile() as seen, last_only(stepped, i == len(mine) - 1):
            stepped(tokens).sum().backward()
        counts.append(sum(event.name.startswith("c10d::") and "reduce" in event.name for event in seen.events()))
    return counts


def count(machine: DistContext, folder: Path) -> None:
    """Count the exchanges of a step of three pieces, each way."""
    found = {sharding: exchanges(share(plain(), machine, sharding), machine) for sharding in ("none", "full")}
    if machine.is_main_process:
        (folder / "counts.json").write_text(json.dumps(found))


def count_compiled(machine: DistContext, folder: Path) -> None:
    """The same of a single block, compiled; and how far the gradient is from that of the model as it is."""
    found = {}
    shape = replace(SHAPE, n_layers=1)
    for sharding in ("none", "full"):
        stepped = share(plain(shape=shape), machine, sharding)
        example = torch.zeros(2, SHAPE.context, dtype=torch.long)
        fast = compiled(stepped, example, machine)
        counts = exchanges(fast, machine)
        stepped.zero_grad()
        gradient(fast, machine, 0)
        one = plain(shape=shape)
        gradient(one, DistContext(machine.device, machine.dtype), 0)
        grads = [(p.grad, q.grad) for p, q in zip(bare(fast).parameters(), one.parameters(), strict=True)]
        far = [float((getattr(a, "full_tensor", lambda a=a: a)() - b).norm() / b.norm()) for a, b in grads]
        found[sharding] = {"counts": counts, "far": max(far), "wrapped": fast is not stepped}
    if machine.is_main_process:
        (folder / "compiled.json").write_text(json.dumps(found))


def agree(machine: DistContext, folder: Path) -> None:
    """Everything by which processes agree; each writes what it came to."""
    told: dict[str, object] = {
        "sum": float(machine.sum(torch.tensor(machine.rank + 0.5))),
        "largest": machine.all_reduce_max(10 - machine.rank),
        "agree": machine.broadcast_str(f"größer {machine.rank} \udc80" if machine.is_main_process else ""),
        "empty": machine.broadcast_str("" if machine.is_main_process else "something"),
        "last": machine.broadcast_str(str(machine.rank), source=machine.world - 1),
    }
    machine.require_same({"the data": "same", "settings": "a\nb"})
    try:
        odd = machine.rank == machine.world - 1
        machine.require_same({"the data": "same", "settings": f"a = 1\nb = {odd}\n" + "c" * 500})
    except UserError as error:
        told["refused"] = str(error)
    (folder / f"agree-{machine.rank}.json").write_text(json.dumps(told))


def fail_to_compile(machine: DistContext, folder: Path) -> None:
    """A compiler that the last process lacks."""

    def broken(model: nn.Module) -> nn.Module:
        raise RuntimeError("no compiler here")

    def lazy(model: nn.Module) -> nn.Module:
        return nn.Sequential(model)  # stands for torch's wrapper

    torch.compile = broken if machine.rank == machine.world - 1 else lazy  # type: ignore[assignment]
    stepped = share(plain(), machine, "none")
    fast = compiled(stepped, torch.zeros(2, SHAPE.context, dtype=torch.long), machine)
    (folder / f"compiler-{machine.rank}.json").write_text(json.dumps(fast is stepped))


def lose(how: signal.Signals, sharding: str) -> Callable[[DistContext, Path], None]:
    """Train until the last process is killed or frozen."""

    def program(machine: DistContext, folder: Path) -> None:
        stepped = share(plain(), machine, sharding)
        for step in range(1000):
            if step == 3 and machine.rank == machine.world - 1:
                (folder / "lost.json").write_text(json.dumps(os.getpid()))
                os.kill(os.getpid(), how)
            gradient(stepped, machine, step)
            time.sleep(0.01)

    return program


PROGRAMS = {
    "write": write,
    "read": read,
    "count": count,
    "count_compiled": count_compiled,
    "agree": agree,
    "fail_to_compile": fail_to_compile,
    **{f"{how.name}-{way}": lose(how, way) for how in (signal.SIGKILL, signal.SIGSTOP) for way in ("none", "full")},
}


def main(argv: list[str]) -> None:
    name, folder = argv
    with processes(5.0 if name.startswith("SIG") else TIMEOUT):
        PROGRAMS[name](get_dist_context("fp32", threads=1), Path(folder))


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_main(main)
