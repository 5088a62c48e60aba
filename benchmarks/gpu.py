"""Training and sampling on a CUDA GPU: steps of GPT-2's 124 M and 350 M, time to nanoGPT's loss, tokens per second.

    python -m benchmarks.gpu [--nanogpt PATH]                 # PATH: your own clone of nanoGPT

Contestants run one after another, since together they would not fit into the memory of one GPU.
"""

import sys
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import common, nanogpt
from benchmarks.sample import CASES, ours
from benchmarks.steps import write_random_tokens
from benchmarks.train import SAME_MODEL, Shape, train_ours
from data.config import DataConfig
from data.prepare import prepare

GPT2 = Shape("cuda", 12, 12, 768, 1024, 32, 50304)
SHAPES = {"124 M": GPT2, "350 M": replace(GPT2, n_layers=24, n_heads=16, d_model=1024, batch_size=16)}
STEPS = 10  # in a round
LOSS = 1.4697  # nanoGPT's README, Tiny Shakespeare by character on an A100 after about 3 minutes
RECIPE = ("configs/shakespeare_best.toml", "--train.steps=1000", "--train.eval_every=1000", "--train.save_every=1000")


def measure_steps(shape: Shape, clone: Path | None, rounds: int, peak: float) -> list[tuple[str, ...]]:
    """A row for each contestant: tokens per second, share of the peak, megabytes."""
    rows = []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        tokens = Path(folder) / "tokens.npy"
        write_random_tokens(tokens, shape.vocab_size)
        train = [sys.executable, "-m", "benchmarks.steps", str(tokens), str(shape.vocab_size), *shape.options]
        commands: dict[str, tuple[list[str], Path]] = {}
        for mode, switch in (("eager", "off"), ("compiled", "on")):
            command = [*train, f"--train.compile={switch}"]
            commands[f"ours, {mode}"] = ([*command, *SAME_MODEL], common.ROOT)
            commands[f"our default model and Muon, {mode}"] = (command, common.ROOT)
            if clone:
                theirs = [shape.nanogpt, str(tokens), str(shape.batch_size), shape.device, mode]
                copy = stack.enter_context(nanogpt.copied(clone))
                commands[f"nanoGPT, {mode}"] = ([sys.executable, "-c", nanogpt.STEPS, *theirs], copy)
        for name, (command, at) in commands.items():
            with common.Worker(command, at) as worker:
                results: list[dict[str, Any]] = [worker.ask(STEPS) for _ in range(rounds)]
            speed = STEPS * shape.batch_size * shape.context / median(result["seconds"] for result in results)
            cost = common.train_flops_per_token(worker.ready["matrices"], shape.n_layers, shape.d_model, shape.context)
            megabytes = max(result["megabytes"] for result in results)
            rows.append((name, f"{speed:,.0f}", f"{speed * cost / peak:.0%}", f"{megabytes:,.0f}"))
    return rows


def main() -> None:
    args = common.parser(__doc__, rounds=3, nanogpt=True).parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu needs a CUDA GPU, and PyTorch finds none here")
    prepare(DataConfig(source="shakespeare", tokenizer="char"))
    with common.report("gpu", args.record) as out:
        peak = max(common.matmul_flops((n, n, n), torch.bfloat16, GPT2.device) for n in (4096, 8192))
        out.add(f"Large bf16 matrix products: {peak / 1e12:,.0f} TFLOP/s.")
        for name, shape in SHAPES.items():
            out.add(f"{name}, {shape}: medians of {args.rounds} rounds of {STEPS} steps.")
            rows = measure_steps(shape, args.nanogpt, args.rounds, peak)
            out.add(common.table(("", "tokens/s", "share of the peak", "peak MB"), rows))
        result = train_ours(RECIPE)
        out.add(f"train.py {' '.join(RECIPE)}: a loss of {result['loss']:.4f} after {result['seconds']:.1f} s.")
        out.add(common.table(common.TARGET_HEAD, [common.target("loss", result["loss"], LOSS, True, ".4f")]))
        generate = ours("fp32", GPT2.device)
        generate(1, 8, 2)
        seconds = {name: median(generate(*case) for _ in range(args.rounds)) for name, case in CASES.items()}
        speeds = [(name, f"{CASES[name][0] * CASES[name][2] / s:,.1f}", f"{s:.3f}") for name, s in seconds.items()]
        out.add(
            f"Sampling, 124 M, fp32: medians of {args.rounds}.\n\n" + common.table(("", "tokens/s", "seconds"), speeds)
        )


if __name__ == "__main__":
    main()
