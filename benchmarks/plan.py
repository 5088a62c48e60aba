"""Is `train.py --plan` right? What it says beside what then happens, in about seven minutes:

    python -m benchmarks.plan

For three shapes, in turn: the plan's step time beside that of the real `train.py`, from its metrics; and the plan's
memory beside that of the real loop: tensors counted part by part, and the growth of the process (resident set, Linux).
Every figure is measured in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from data.dataloader import get_batch
from data.prepare import prepare
from model.config import ModelConfig
from model.gpt import GPT
from training.checkpoint import TrainState
from training.config import RunConfig, parse_train
from training.device import get_dist_context, resolve_attention
from training.footprint import footprint, stand_in
from training.optimizer import Optimizer
from training.speed import measured
from training.trainer import Trainer, micro_batch_rows

ROOT = Path(__file__).parent.parent
LARGE = (
    *("configs/shakespeare_char.toml", "--model.n_layers=6", "--model.n_heads=6", "--model.d_model=384"),
    *("--model.context=256", "--train.batch_size=16"),
)
CASES = {
    "quickstart": (("configs/quickstart.toml",), 100),
    "shakespeare_char": (("configs/shakespeare_char.toml",), 120),
    "10.65 M": (LARGE, 14),
}
"""The command line, and the steps that the real run makes; the first few are left out of its time."""
LEFT_OUT = 3
PARTS = ("weights", "gradients", "moments", "activations", "peak")
RETURNED = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""Tells glibc to give memory back at once. What the process grows to otherwise stands in the row `held`."""


def planned(config: RunConfig) -> dict[str, float]:
    """What the plan says: seconds of a step, bytes by part."""
    config, ctx, vocab_size = settled(config)
    memory = footprint(config, vocab_size, ctx, config.train.batch_size)
    speed = measured(config, vocab_size, ctx, config.train.batch_size)
    found = {part: float(getattr(memory, part)) for part in PARTS}
    return {**found, "activations": found["activations"] + memory.copies, "step": speed.step}


def settled(config: RunConfig) -> tuple[RunConfig, Any, int]:
    """The config with its kernels decided, the machine, the size of the vocabulary."""
    ctx = get_dist_context(config.train.dtype, config.run.threads)
    config = replace(config, model=resolve_attention(config.model, ctx.device, ctx.dtype))
    return config, ctx, prepare(config.data, progress=False).tokenizer.vocab_size


def happened(config: RunConfig) -> dict[str, float]:
    """Bytes that the real loop takes, on the real text."""
    config, ctx, vocab_size = settled(config)
    data = prepare(config.data, progress=False)
    warm = replace(
        config, model=ModelConfig(n_layers=1, n_heads=2, d_model=16, context=16, attention=config.model.attention)
    )
    stand_in(warm, 50, ctx, GPT(warm.model, 50), 2).step()  # libraries are loaded by now
    before = resident(reset=True)
    model = GPT(config.model, vocab_size, seed=1)
    trainer = Trainer(config, ctx, data, model, model, Optimizer(model, config.optim), TrainState())
    for _ in range(4):
        trainer.train_step()
    grown = resident() - before
    rows = get_batch(data.train, trainer.train_sequences, 1, 0, micro_batch_rows(config, 1))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    blocks: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in weights:
            blocks[place] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), ctx.autocast():
        kept = model.hidden_states(rows.tokens)  # what is kept lives as long as this
        model.lm_head(kept[:1, :1])  # the copy of its weights
    trainer.forward_backward(rows, 1)
    sizes = {
        "weights": model.parameters(),
        "gradients": [p.grad for p in model.parameters() if p.grad is not None],
        "moments": [value for _, value in trainer.optimizer.named_state()],
    }
    found = {name: float(sum(t.numel() * t.element_size() for t in tensors)) for name, tensors in sizes.items()}
    return {**found, "activations": float(sum(blocks.values())), "peak": float(grown)}


def resident(reset: bool = False) -> int:
    """The most bytes of memory that this process has held, since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def trained(arguments: tuple[str, ...], steps: int) -> dict[str, float]:
    """Seconds of a step of the real command, from its metrics: tokens a second since the start, at each step."""
    with tempfile.TemporaryDirectory() as folder:
        quiet = ("--log.every=1", "--train.steps=100000", "--train.eval_every=100000", f"--run.stop_at_step={steps}")
        command = [sys.executable, "train.py", *arguments, *quiet, "--train.compile=off", f"--run.dir={folder}/run"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
        lines = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    config, _ = parse_train(list(arguments))
    tokens = config.train.batch_size * config.model.context
    passed = [line["step"] * tokens / line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
    return {"step": statistics.median([b - a for a, b in pairwise(passed)][LEFT_OUT:])}


def alone(what: str, arguments: tuple[str, ...], environment: dict[str, str] | None = None) -> dict[str, float]:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.plan", f"--tell={what}", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **(environment or {})})
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(repeats: int, only: str) -> None:
    """Print the table: plan, truth and their ratio."""
    print(f"{'':<18}{'':<13}{'planned':>12}{'happened':>12}{'ratio':>8}", flush=True)
    for name, (arguments, steps) in CASES.items():
        if only and name != only:
            continue
        plans, truths = [], []
        for _ in range(repeats):
            plan = alone("planned", arguments)
            plans.append({**plan, "held": plan["peak"]})
            truth = {**alone("happened", arguments, RETURNED), **trained(arguments, steps)}
            truths.append({**truth, "held": alone("happened", arguments)["peak"]})
        for part in ("step", *PARTS, "held"):
            said, was = (statistics.median(one[part] for one in each) for each in (plans, truths))
            size, unit = (1e-3, "ms") if part == "step" else (1e6, "MB")
            print(
                f"{name:<18}{part:<13}{said / size:>9.1f} {unit}{was / size:>9.1f} {unit}{said / was:>8.3f}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="times that everything is measured, in turn")
    parser.add_argument("--only", choices=tuple(CASES), default="", help="one of the shapes")
    parser.add_argument("--tell", choices=("planned", "happened"), help=argparse.SUPPRESS)
    arguments, rest = parser.parse_known_args()
    if arguments.tell:
        config, _ = parse_train(rest)
        print(json.dumps({"planned": planned, "happened": happened}[arguments.tell](config)))
    else:
        compare(arguments.repeats, arguments.only)


if __name__ == "__main__":
    main()
