"""Training next to nanoGPT: time to a loss, and steps at equal shape.

    python -m benchmarks.train loss --nanogpt PATH              # PATH: your own clone of nanoGPT
    python -m benchmarks.train speed --nanogpt PATH [--compiled]

`loss` trains on Tiny Shakespeare by character, nanoGPT with its README's recipe for a CPU, ours with
configs/shakespeare_char.toml, fewer layers and embeddings of n-grams, and once more without these and with as many steps
as nanoGPT's time allows. The clock covers the whole command up to its loss; losses are over the whole validation split.

`speed` measures steps of 10.65 M parameters on random tokens. benchmarks/gpu.py measures them on a GPU.
"""

import json
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import common, nanogpt

RECIPE = ("configs/shakespeare_char.toml", "--model.d_mlp=384", "--log.sample_tokens=0")
OURS = (
    *(*RECIPE, "--model.n_layers=2", "--model.ngrams=5", "--optim.lr=0.012"),
    *("--train.steps=72", "--train.eval_every=72", "--train.save_every=72"),
)  # nanoGPT's loss
LONGER = (
    *(*RECIPE, "--model.context=128", "--train.steps=1200", "--train.batch_size=12"),
    *("--optim.decay_fraction=0.5", "--optim.weight_decay=0", "--train.eval_every=1200", "--train.save_every=1200"),
)  # in nanoGPT's time
LOSS = 1.898  # of nanoGPT's README recipe for a CPU on the whole validation split


@dataclass(frozen=True)
class Shape:
    """A GPT-2 and its batch."""

    device: str
    n_layers: int
    n_heads: int
    d_model: int
    context: int
    batch_size: int
    vocab_size: int

    @property
    def options(self) -> tuple[str, ...]:
        """Of train.py."""
        model = [f"--model.{name}={getattr(self, name)}" for name in ("n_layers", "n_heads", "d_model", "context")]
        return (*model, f"--train.batch_size={self.batch_size}", "--train.steps=5000")

    @property
    def nanogpt(self) -> str:
        """As JSON for nanoGPT."""
        sizes = {"n_layer": self.n_layers, "n_head": self.n_heads, "n_embd": self.d_model}
        return json.dumps({**sizes, "block_size": self.context, "vocab_size": self.vocab_size})


CPU_SHAPE = Shape("cpu", 6, 6, 384, 256, 16, 65)
STEPS = 4  # in a round
SAME_MODEL = ("--model.preset=gpt2", "--optim.optimizer=adamw")


def train_ours(recipe: tuple[str, ...]) -> dict[str, float]:
    """Seconds to the printed loss and to the end, megabytes, and the loss."""
    with tempfile.TemporaryDirectory() as folder:
        result = common.run_command([sys.executable, "train.py", *recipe, f"--run.dir={folder}/run"])
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
        loss = next(row["final_val_loss"] for row in map(json.loads, reversed(lines)) if "final_val_loss" in row)
        seconds = result.seconds_until(f"{loss:.4f}")
        return {"seconds": seconds, "whole": result.seconds, "megabytes": result.megabytes, "loss": loss}


def train_nanogpt(folder: Path) -> dict[str, float]:
    """The same of nanoGPT, up to its last evaluation; preparing its data does not count."""
    result = nanogpt.train(folder)
    seconds, loss = result.seconds_until("step 2000:"), nanogpt.whole_split_loss(folder)
    return {"seconds": seconds, "whole": result.seconds, "megabytes": result.megabytes, "loss": loss}


def middle(results: list[dict[str, float]], key: str) -> float:
    return median(result[key] for result in results)


def measure_loss(clone: Path | None, rounds: int, out: common.Report) -> None:
    """Whole commands: seconds to a loss, and the loss after as many seconds."""
    from data.config import DataConfig, cache_folder
    from data.prepare import prepare

    prepare(DataConfig(source="shakespeare", tokenizer="char"))
    with ExitStack() as stack:
        contestants = {"ours": lambda: train_ours(OURS), "ours, longer": lambda: train_ours(LONGER)}
        if clone:
            shakespeare = (cache_folder() / "tinyshakespeare.txt").read_text(encoding="utf-8")
            folder = stack.enter_context(nanogpt.copied(clone, shakespeare))
            contestants["nanoGPT"] = lambda: train_nanogpt(folder)
        results = common.interleave(contestants, rounds)
    out.add(f"Whole commands on Tiny Shakespeare by character; medians of {rounds} interleaved rounds.")
    rows, peer = [], middle(results["nanoGPT"], "seconds") if clone else 0.0
    for name, all_of in results.items():
        numbers = (
            common.spread([r[key] for r in all_of], form)
            for key, form in (("seconds", ".1f"), ("whole", ".1f"), ("loss", ".4f"))
        )
        share = f"{middle(all_of, 'seconds') / peer:.3f}" if clone else ""
        rows.append((name, *numbers, f"{middle(all_of, 'megabytes'):.0f}", share))
    head = ("", "seconds to the loss", "to the end", "loss on the whole split", "peak MB", "of nanoGPT's time")
    out.add(common.table(head, rows))
    out.add(f"`ours`: train.py {' '.join(OURS)}\n`ours, longer`: train.py {' '.join(LONGER)}")
    targets = [common.target("loss of ours", max(r["loss"] for r in results["ours"]), LOSS, at_most=True, form=".4f")]
    if clone:
        shares = {name: middle(all_of, "seconds") / peer for name, all_of in results.items()}
        targets.append(common.target(f"time to a loss of {LOSS}, of nanoGPT's", shares["ours"], 1 / 15, True, ".3f"))
        targets.append(common.target("time of ours, longer, of nanoGPT's", shares["ours, longer"], 1.0, True))
        targets.append(common.target("loss in that time", middle(results["ours, longer"], "loss"), 1.55, True, ".4f"))
    out.add(common.table(common.TARGET_HEAD, targets))


def start_workers(
    clone: Path | None, compiled: bool, shape: Shape, tokens: Path, stack: ExitStack
) -> dict[str, common.Worker]:
    """All contestants of `speed`, warmed up."""
    ours = [sys.executable, "-m", "benchmarks.steps", str(tokens), str(shape.vocab_size), *shape.options]
    theirs = [sys.executable, "-c", nanogpt.STEPS, shape.nanogpt, str(tokens), str(shape.batch_size), shape.device]
    workers: dict[str, common.Worker] = {}
    for mode in ["eager", *["compiled"] * compiled]:
        switch = f"--train.compile={'on' if mode == 'compiled' else 'off'}"
        workers[f"ours, {mode}"] = stack.enter_context(common.Worker([*ours, *SAME_MODEL, switch]))
        workers[f"our default model and Muon, {mode}"] = stack.enter_context(common.Worker([*ours, switch]))
        if clone:
            folder = stack.enter_context(nanogpt.copied(clone))
            workers[f"nanoGPT, {mode}"] = stack.enter_context(common.Worker([*theirs, mode], folder))
    return workers


def measure_speed(clone: Path | None, rounds: int, compiled: bool, out: common.Report) -> None:
    """Tokens per second, peak memory, and MFU against large matrix products in bf16."""
    import torch

    from benchmarks.steps import write_random_tokens

    shape = CPU_SHAPE
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        tokens = Path(folder) / "tokens.npy"
        write_random_tokens(tokens, shape.vocab_size)
        workers = start_workers(clone, compiled, shape, tokens, stack)
        asks: dict[str, Callable[[], dict[str, Any]]] = {
            "peak": lambda: {"flops": max(common.matmul_flops((n, n, n), torch.bfloat16) for n in (1024, 2048, 3072))}
        }
        results = common.interleave(asks | {k: partial(worker.ask, STEPS) for k, worker in workers.items()}, rounds)
    peak = middle(results.pop("peak"), "flops")
    out.add(f"Large bf16 matrix products, the peak of MFU: {peak / 1e9:,.0f} GFLOP/s.")
    sizes = f"{shape.n_layers} layers, {shape.n_heads} heads, d_model {shape.d_model}, vocabulary {shape.vocab_size}"
    batch = f"{shape.batch_size} x {shape.context} random tokens"
    out.add(
        f"GPT-2 with AdamW but where named: {sizes}; {batch}. Medians of {rounds} interleaved rounds of {STEPS} steps."
    )
    tokens_per_round = STEPS * shape.batch_size * shape.context
    speed = {name: tokens_per_round / middle(all_of, "seconds") for name, all_of in results.items()}
    memory = {name: max(r["megabytes"] for r in all_of) for name, all_of in results.items()}
    rows, mfu, shares = [], {}, {}
    for name, worker in workers.items():
        cost = common.train_flops_per_token(worker.ready["matrices"], shape.n_layers, shape.d_model, shape.context)
        mfu[name] = speed[name] * cost / peak
        settings = worker.ready.get("settings", "float32")
        optimizer = ""
        if "nanoGPT" not in name:
            shares[name] = median(r["optimizer"] / r["seconds"] for r in results[name])
            optimizer = f"{shares[name]:.1%}"
        rows.append((name, settings, f"{speed[name]:,.0f}", f"{mfu[name]:.0%}", f"{memory[name]:,.0f}", optimizer))
    out.add(common.table(("", "settings", "tokens/s", "MFU", "peak MB", "in the optimizer"), rows))
    if clone:
        targets = speed_targets(speed, mfu, memory)
        targets += [common.target(f"optimizer, {name}", share, 0.05, True) for name, share in shares.items()]
        out.add(common.table(common.TARGET_HEAD, targets))


def speed_targets(speed: dict[str, float], mfu: dict[str, float], memory: dict[str, float]) -> list[tuple[str, ...]]:
    """The same model of both, eager and compiled."""
    targets = []
    for name, least in (("ours, eager", 0.65), ("ours, compiled", 0.7)):
        if name in speed:
            faster, share = (of[name] / of["nanoGPT, eager"] for of in (speed, memory))
            targets.append(common.target(f"tokens/s, {name}, of nanoGPT's eager", faster, 3.0))
            targets.append(common.target(f"MFU, {name}", mfu[name], least))
            targets.append(common.target(f"peak memory, {name}, of nanoGPT's eager", share, 0.65, at_most=True))
    if "nanoGPT, compiled" in speed:
        ratio = speed["ours, compiled"] / speed["nanoGPT, compiled"]
        targets.append(common.target("tokens/s, ours, compiled, of nanoGPT's compiled", ratio, 1.5))
    return targets


def main() -> None:
    options = common.parser(__doc__, rounds=3, nanogpt=True)
    options.add_argument("what", nargs="?", choices=["loss", "speed"], help="default: both")
    options.add_argument("--compiled", action="store_true", help="also measure compiled steps (minutes)")
    args = options.parse_args()
    if args.what != "speed":
        with common.report("train-loss", args.record) as out:
            measure_loss(args.nanogpt, args.rounds, out)
    if args.what != "loss":
        with common.report("train-speed", args.record) as out:
            measure_speed(args.nanogpt, args.rounds, args.compiled, out)


if __name__ == "__main__":
    main()
