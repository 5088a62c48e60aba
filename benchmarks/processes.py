"""Does a model learn the same in many processes as in one? One table, in about a minute and a half:

    python -m benchmarks.processes

A tiny model that has learned something already takes the same steps in one process and in several ways of sharing the
work, on the processor (gloo), in fp32. Documents differ in length, so that every process and every micro-batch counts
another number of targets; the gradient is that of `training.trainer.Trainer`. Several processes are started by torchrun.

Sums in another order round otherwise, so nothing is equal to the last bit; `--fp64` shows how far rounding alone
explains the differences. Exit code 1 if one is larger than its bound.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.errors import run_main
from data.dataloader import IGNORE_INDEX, get_batch, num_valid_tokens
from data.prepare import prepare
from data.stories import stories
from model.config import ModelConfig
from model.gpt import GPT
from training.checkpoint import TrainState
from training.config import DataConfig, OptimConfig, RunConfig, RunSettings, TrainConfig
from training.device import DistContext, get_dist_context
from training.distributed import full_tensor, is_fsdp, process_group, wrap_model
from training.optimizer import Optimizer
from training.trainer import Trainer

ROOT = Path(__file__).parent.parent
SHAPE = ModelConfig(preset="gpt2", n_layers=2, n_heads=2, d_model=36, context=64, attention="eager")
"""Learned positions, biases, a tied head; a width that four processes cannot share evenly."""
LEARNED, STEPS, BATCH, SGD_RATE = 60, 20, 16, 0.1
BOUNDS = {"gradient": 1e-6, "weights, SGD": 1e-6, "loss, AdamW": 1e-5}
"""Largest relative differences. A gradient is held to it tensor by tensor, weights as one vector."""
KINDS = ("gradient", "weights, SGD", "its worst tensor", "loss, AdamW", "weights, AdamW", "loss, Muon", "weights, Muon")
"""What is shown. Without a bound: the tensor of the SGD weights that is furthest off, a bias that began near zero; what
AdamW, which divides by the gradient's size, and Muon, which works in bf16, make of a difference in the last digit."""


@dataclass(frozen=True)
class Case:
    """A way to share the work of a step."""

    name: str
    process_group: int = 1
    micro_batch_size: int = 0
    sharding: str = "none"


ONE = Case("one process")
CASES = (
    Case("one process, 6 pieces", micro_batch_size=3),
    Case("DDP x2", 2),
    Case("DDP x2, 3 pieces", 2, micro_batch_size=3),
    Case("FSDP2 x2", 2, sharding="fsdp"),
    Case("FSDP2 x2, 3 pieces", 2, micro_batch_size=3, sharding="fsdp"),
    Case("DDP x4", 4),
    Case("FSDP2 x4", 4, sharding="fsdp"),
)


def settings(folder: Path, case: Case, optimizer: str = "adamw") -> RunConfig:
    """What every process is told."""
    return RunConfig(
        run=RunSettings(threads=1),
        data=DataConfig(source=str(folder / "stories.txt"), tokenizer="byte"),
        model=SHAPE,
        optim=OptimConfig(optimizer=optimizer, warmup_steps=5),  # type: ignore[arg-type]
        train=TrainConfig(steps=LEARNED, batch_size=BATCH, micro_batch_size=case.micro_batch_size),
    )


def trainer(folder: Path, case: Case, ctx: DistContext, optimizer: str = "adamw") -> Trainer:
    """The real loop on the learned weights; on new ones where there are none yet."""
    config = settings(folder, case, optimizer)
    data = prepare(config.data, progress=False, verify=False)
    model = GPT(config.model, data.tokenizer.vocab_size, seed=1)
    if (learned := folder / "learned.safetensors").exists():
        model.load_state_dict({**load_file(learned), "lm_head.weight": load_file(learned)["token_embedding.weight"]})
    stepped = wrap_model(model, ctx, case.sharding)
    moves = Optimizer(stepped if is_fsdp(stepped) else model, config.optim)
    return Trainer(config, ctx, data, model, stepped, moves, TrainState())


def gradient(one: Trainer, step: int) -> float:
    """Leave the gradient of a step's batch in the parameters; its loss."""
    rows = get_batch(one.data.train, one.train_sequences, 1, step, BATCH, one.ctx.rank, one.ctx.world_size)
    return float(one.forward_backward(rows, num_valid_tokens(one.train_sequences, 1, step, BATCH)))


def named(one: Trainer, of_gradient: bool = False) -> dict[str, Tensor]:
    """Every weight, or its gradient, whole, by the plain model's names; every process calls it."""
    return {
        name: full_tensor(p.grad if of_gradient and p.grad is not None else p).detach().clone()
        for p, name in one.optimizer.names.items()
    }


def after_sgd(one: Trainer) -> dict[str, Tensor]:
    """The weights after plain steps: whatever is wrong with a gradient adds up in them."""
    plain = torch.optim.SGD(list(one.optimizer.names), lr=SGD_RATE)
    for step in range(STEPS):
        gradient(one, step)
        plain.step()
        plain.zero_grad()
    return named(one)


def counted(one: Trainer) -> list[int]:
    """Targets that count in the first batch, of each process."""
    rows = get_batch(one.data.train, one.train_sequences, 1, 0, BATCH, one.ctx.rank, one.ctx.world_size)
    each = torch.zeros(one.ctx.world_size, dtype=torch.int64)
    each[one.ctx.rank] = (rows.targets != IGNORE_INDEX).sum()
    return one.ctx.all_reduce_sum(each).tolist()


def work(cases: list[Case], folder: Path) -> None:
    """Everything that is compared, of some cases, in every one of their processes; the first writes it down."""
    with process_group(timeout=120):
        ctx = get_dist_context("fp32", threads=1)
        for case in cases:
            assert ctx.world_size == case.processes
            one = trainer(folder, case, ctx)
            shares = counted(one)
            gradient(one, 0)
            found = {"gradient": named(one, of_gradient=True)}
            found["weights, SGD"] = after_sgd(trainer(folder, case, ctx))
            for optimizer, name in (("adamw", "AdamW"), ("muon", "Muon")):
                one = trainer(folder, case, ctx, optimizer)
                for _ in range(STEPS):
                    one.train_step()
                found[f"weights, {name}"] = named(one)
                found[f"loss, {name}"] = {"loss": torch.tensor(gradient(one, STEPS), dtype=torch.float64)}
            if ctx.is_main_process:
                save_file({f"{a}/{b}": v for a, vs in found.items() for b, v in vs.items()}, written(folder, case))
                written(folder, case).with_suffix(".json").write_text(json.dumps(shares))


def written(folder: Path, case: Case) -> Path:
    """Where a case's numbers are kept."""
    return folder / f"{case.name}.safetensors"


def differences(folder: Path, case: Case) -> dict[str, float]:
    """How far each kind of number is from one process's, relative to its size."""
    mine, alone = (load_file(written(folder, c)) for c in (case, ONE))
    assert mine.keys() == alone.keys()
    off: dict[str, list[tuple[float, float]]] = {}
    for key, value in alone.items():
        apart = (mine[key].double() - value.double()).norm(), value.double().norm()
        off.setdefault(key.partition("/")[0], []).append((float(apart[0]), float(apart[1])))
    worst = {kind: max(a / b for a, b in pairs) for kind, pairs in off.items()}
    found = {
        kind: math.hypot(*(a for a, _ in pairs)) / math.hypot(*(b for _, b in pairs)) for kind, pairs in off.items()
    }
    return {**found, "gradient": worst["gradient"], "its worst tensor": worst["weights, SGD"]}


def learn(folder: Path) -> None:
    """A corpus of stories of unequal length, and weights that have learned some of it."""
    texts = [story.text[: 60 + 37 * i % 400] for i, story in enumerate(stories("train", 150))]
    (folder / "stories.txt").write_text("\n<|endoftext|>\n".join(texts), encoding="utf-8")
    one = trainer(folder, ONE, get_dist_context("fp32", threads=1))
    for _ in range(LEARNED):
        one.train_step()
    save_file(named(one), folder / "learned.safetensors")


def launch(count: int, folder: Path, options: list[str]) -> None:
    """Let torchrun start so many processes, for all cases that want them, and wait for them."""
    agent = (sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}")
    command = [*agent, "-m", "benchmarks.processes", f"--processes={count}", f"--folder={folder}", *options]
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    ended = subprocess.run(command, cwd=ROOT, env={**os.environ, **threads}, capture_output=True, text=True)
    if ended.returncode:
        sys.exit(f"{count} processes failed:\n{ended.stderr[-3000:]}")


def row(case: Case, folder: Path) -> bool:
    """Print the differences of a case; whether they are within their bounds."""
    found = differences(folder, case)
    shares = json.loads(written(folder, case).with_suffix(".json").read_text())
    numbers = "".join(f"{found[kind]:>18.1e}" for kind in KINDS)
    print(f"{case.name:<24}{numbers}  {' + '.join(map(str, shares))}", flush=True)
    return all(found[kind] <= bound for kind, bound in BOUNDS.items())


def compare(folder: Path, options: list[str]) -> bool:
    """Run every case and print its row; whether all bounds hold."""
    learn(folder)
    print(f"{'relative to one process':<24}" + "".join(f"{kind:>18}" for kind in KINDS) + "  counted targets")
    print(f"{'bound':<24}" + "".join(f"{BOUNDS.get(kind, '-'):>18}" for kind in KINDS), flush=True)
    good = True
    for count in sorted({case.processes for case in CASES}):
        cases = [case for case in CASES if case.processes == count]
        if count == 1:
            work([ONE, *cases], folder)
        else:
            launch(count, folder, options)
        good &= all([row(case, folder) for case in cases])
    print("every bound holds" if good else "a bound is missed")
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fp64", action="store_true", help="weights and sums in double precision")
    parser.add_argument("--processes", type=int, help=argparse.SUPPRESS)  # what torchrun's processes are told
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_default_dtype(torch.float64 if arguments.fp64 else torch.float32)
    if arguments.processes:
        work([case for case in CASES if case.processes == arguments.processes], arguments.folder)
        return
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["GLASSGPT_CACHE"] = f"{temporary}/cache"
        if not compare(Path(temporary), ["--fp64"] * arguments.fp64):
            sys.exit(1)


if __name__ == "__main__":
    run_main(lambda argv: main())  # torchrun's processes must not be taken down while gloo's threads live
