"""Training beside nanoGPT, contestants in turn in one run:

    python -m benchmarks.train loss --nanogpt PATH              # PATH: your own clone of nanoGPT
    python -m benchmarks.train speed --nanogpt PATH [--compiled]

`loss` trains on Tiny Shakespeare by character, each with its own recipe: nanoGPT with its README's for a CPU, we with
configs/shakespeare_char.toml and a narrower MLP, and once more with as many steps as nanoGPT's time allows. The clock
runs over the whole command. The loss is over the whole validation split for all: nanoGPT's own print is a sample of 20
batches, so its checkpoint is read and evaluated here, and so is not on the clock.

`speed` takes steps at equal shape and batch: 10.65 M parameters (6 layers, 6 heads, width 384), context 256, 16
windows, random tokens. Ours are taken by the trainer itself, theirs by their model and optimizer. `--compiled` adds
both after torch.compile, whose own time does not count. Without `--nanogpt` only ours run; without `loss` or `speed`
both are measured.
"""

from __future__ import annotations

import json
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import nanogpt
from benchmarks.results import Page, page
from benchmarks.side_by_side import Target, Worker, alternate, options, spend, spread, table, targets

RECIPE = ("configs/shakespeare_char.toml", "--model.d_mlp=384")
OURS = (*RECIPE, "--train.steps=196", "--train.eval_every=196", "--train.save_every=196", "--log.sample_tokens=0")
"""Our recipe for a given loss, as arguments of train.py."""
LONGER = (
    *RECIPE,
    *("--model.context=128", "--train.steps=1200", "--train.batch_size=12"),
    *("--optim.decay_fraction=0.5", "--optim.weight_decay=0"),
    *("--train.eval_every=1200", "--train.save_every=1200", "--log.sample_tokens=0"),
)
"""Our recipe for the time that nanoGPT takes."""
LOSS = 1.898
"""What nanoGPT's README recipe for a CPU reaches over the whole validation split."""
LAYERS, HEADS, WIDTH, CONTEXT, ROWS, VOCABULARY = 6, 6, 384, 256, 16, 65
"""The shape of nanoGPT's train_shakespeare_char.py, with a batch that a small processor can take."""
SHAPE = (
    *(f"--model.n_layers={LAYERS}", f"--model.n_heads={HEADS}", f"--model.d_model={WIDTH}"),
    *(f"--model.context={CONTEXT}", f"--train.batch_size={ROWS}", "--train.steps=5000"),
)
SAME_MODEL = ("--model.preset=gpt2", "--optim.optimizer=adamw")


def ours(recipe: tuple[str, ...]) -> dict[str, float]:
    """Seconds from the command's start until it has said its loss, and to its end, megabytes and loss."""
    with tempfile.TemporaryDirectory() as folder:
        spent = spend([sys.executable, "train.py", *recipe, f"--run.dir={folder}/run"])
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
        loss = json.loads(lines[-1])["final_val_loss"]
        seconds = spent.until(f"{loss:.4f}")
        return {"seconds": seconds, "whole": spent.seconds, "megabytes": spent.megabytes, "loss": loss}


def theirs(folder: Path) -> dict[str, float]:
    """The same of nanoGPT's recipe, up to its last evaluation, of 20 batches; preparing its data is not counted."""
    spent = nanogpt.train(folder)
    seconds = spent.until("step 2000:")
    loss = nanogpt.whole_split_loss(folder)
    return {"seconds": seconds, "whole": spent.seconds, "megabytes": spent.megabytes, "loss": loss}


def middle(found: list[dict[str, float]], key: str) -> float:
    """The median of one figure."""
    return median(one[key] for one in found)


def to_a_loss(clone: Path | None, rounds: int, say: Page) -> None:
    """Whole commands: seconds to a loss, and the loss after as many seconds."""
    from data.config import DataConfig, cache_folder
    from data.prepare import prepare

    prepare(DataConfig(source="shakespeare", tokenizer="char"))  # the text is there, for both, before the clock runs
    with ExitStack() as stack:
        contestants = {"ours": lambda: ours(OURS), "ours, longer": lambda: ours(LONGER)}
        if clone:
            folder = stack.enter_context(nanogpt.copied(clone, cache_folder() / "tinyshakespeare.txt"))
            contestants["nanoGPT"] = lambda: theirs(folder)
        found = alternate(contestants, rounds)
    say.say(f"Whole commands on Tiny Shakespeare by character; medians of {rounds} rounds, in turn.")
    rows = [
        (
            name,
            spread([one["seconds"] for one in all_of], ".1f"),
            spread([one["whole"] for one in all_of], ".1f"),
            spread([one["loss"] for one in all_of], ".4f"),
            f"{middle(all_of, 'megabytes'):.0f}",
            f"{middle(all_of, 'seconds') / middle(found['nanoGPT'], 'seconds'):.3f}" if clone else "",
        )
        for name, all_of in found.items()
    ]
    say.say(
        table(
            ("", "seconds to the loss", "to the end", "loss over the whole split", "peak MB", "of nanoGPT's time"), rows
        )
    )
    say.say(f"`ours`: train.py {' '.join(OURS)}\n`ours, longer`: train.py {' '.join(LONGER)}")
    judged = [Target("loss of ours", max(one["loss"] for one in found["ours"]), LOSS, at_most=True, form=".4f")]
    if clone:
        time = middle(found["nanoGPT"], "seconds")
        judged += [
            Target(
                f"time to a loss of {LOSS}, of nanoGPT's", middle(found["ours"], "seconds") / time, 1 / 6, True, ".3f"
            ),
            Target("time of ours, longer, of nanoGPT's", middle(found["ours, longer"], "seconds") / time, 1.0, True),
            Target("loss in that time", middle(found["ours, longer"], "loss"), 1.55, True, ".4f"),
        ]
    say.say(targets(judged))


def workers(clone: Path | None, compiled: bool, tokens: Path, stack: ExitStack) -> dict[str, Worker]:
    """Everybody who takes steps, started and warm."""
    shape = {"n_layer": LAYERS, "n_head": HEADS, "n_embd": WIDTH, "block_size": CONTEXT, "vocab_size": VOCABULARY}
    step = [sys.executable, "-m", "benchmarks.steps", str(tokens), str(VOCABULARY), *SHAPE]
    folder = stack.enter_context(nanogpt.copied(clone)) if clone else None
    found: dict[str, Worker] = {}

    def start(name: str, command: list[str], *place: Path) -> None:
        print(f"  starting {name}", file=sys.stderr, flush=True)
        found[name] = stack.enter_context(Worker(command, *place))

    for mode in ["eager", *["compiled"] * compiled]:
        switch = f"--train.compile={'on' if mode == 'compiled' else 'off'}"
        start(f"ours, {mode}", [*step, *SAME_MODEL, switch])
        start(f"ours with its own model and Muon, {mode}", [*step, switch])
        if folder:
            program = [sys.executable, "-c", nanogpt.STEPS, json.dumps(shape), str(tokens), str(ROWS), "cpu", mode]
            start(f"nanoGPT, {mode}", program, folder)
    return found


def at_equal_shape(clone: Path | None, rounds: int, compiled: bool, steps: int, say: Page) -> None:
    """Tokens a second, peak memory, and the share of the processor's matrix products."""
    from benchmarks.steps import random_tokens

    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        tokens = Path(temporary) / "tokens.npy"
        random_tokens(tokens, VOCABULARY)
        everybody = workers(clone, compiled, tokens, stack)
        asks = {name: lambda worker=worker: worker.ask(steps) for name, worker in everybody.items()}
        found: dict[str, list[dict[str, Any]]] = alternate(asks, rounds)
        about = {name: worker.ready for name, worker in everybody.items()}
    speed = {name: steps * ROWS * CONTEXT / middle(all_of, "seconds") for name, all_of in found.items()}
    memory = {name: max(one["megabytes"] for one in all_of) for name, all_of in found.items()}
    flops = {name: flops_of(about[name]["matrices"]) * speed[name] for name in found}
    peaks = ceilings(say)
    say.say(
        f"Steps of {ROWS} x {CONTEXT} tokens, {LAYERS} layers, {HEADS} heads, width {WIDTH}: medians of {rounds} "
        f"rounds of {steps} steps, in turn."
    )
    rows = [
        (
            name,
            how(about[name]),
            f"{speed[name]:,.0f}",
            f"{flops[name] / 1e9:.0f}",
            f"{flops[name] / peaks['bf16']:.0%}",
            f"{memory[name]:,.0f}",
        )
        for name in found
    ]
    say.say(table(("", "how", "tokens/s", "GFLOP/s", "of the bf16 peak", "peak MB"), rows))
    if clone:
        say.say(targets(judged(speed, flops, memory, peaks["bf16"])))


def judged(speed: dict[str, float], flops: dict[str, float], memory: dict[str, float], peak: float) -> list[Target]:
    """Our like-for-like model, at its quickest, beside nanoGPT."""
    best = max((name for name in ("ours, eager", "ours, compiled") if name in speed), key=lambda name: speed[name])
    eager, compiled = "nanoGPT, eager", "nanoGPT, compiled"
    found = [Target("tokens/s, ours, eager, of nanoGPT's eager", speed["ours, eager"] / speed[eager], 3.0)]
    if compiled in speed:
        found.append(Target(f"tokens/s, {best}, of nanoGPT's eager", speed[best] / speed[eager], 3.0))
        found.append(Target(f"tokens/s, {best}, of nanoGPT's compiled", speed[best] / speed[compiled], 1.5))
    for name in dict.fromkeys(["ours, eager", best]):
        found.append(Target(f"share of the bf16 peak, {name}", flops[name] / peak, 0.6))
        found.append(
            Target(f"peak memory, {name}, of nanoGPT's eager", memory[name] / memory[eager], 0.7, at_most=True)
        )
    return found


def flops_of(matrices: int) -> int:
    """Operations for a token of this shape, the same formula for everybody."""
    from benchmarks.ceilings import flops_per_token

    return flops_per_token(matrices, LAYERS, WIDTH, CONTEXT)


def how(about: dict[str, Any]) -> str:
    """What a worker's run has chosen; nanoGPT computes in fp32 on a processor."""
    chosen = about.get("how")
    return f"{chosen['dtype']}, {chosen['kernels']} attention" if chosen else "float32, library's attention"


def ceilings(say: Page) -> dict[str, float]:
    """Matrix products of this machine, large and as this model has them; FLOP/s."""
    import torch

    from benchmarks.ceilings import peak_speed, product_speed

    formats = {"fp32": torch.float32, "bf16": torch.bfloat16}
    peaks = {name: peak_speed(dtype) for name, dtype in formats.items()}
    shapes = [(WIDTH, 3 * WIDTH), (WIDTH, WIDTH), (WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH)]
    rows = [("large", *(f"{peaks[name] / 1e9:.0f}" for name in formats))]
    for into, out in shapes:
        speeds = (product_speed(ROWS * CONTEXT, into, out, dtype) for dtype in formats.values())
        rows.append((f"{ROWS * CONTEXT} x {into} x {out}", *(f"{one / 1e9:.0f}" for one in speeds)))
    say.say("Matrix products of this machine at their best, GFLOP/s:")
    say.say(table(("", *formats), rows))
    return peaks


def main() -> None:
    parser = options(__doc__ or "", rounds=3, nanogpt=True)
    parser.add_argument("what", nargs="?", choices=["loss", "speed"], help="both without it")
    parser.add_argument("--compiled", action="store_true", help="measure steps after torch.compile, too (minutes)")
    parser.add_argument("--steps", type=int, default=4, help="steps in a round")
    asked = parser.parse_args()
    if asked.what != "speed":
        with page("train-loss", asked.record) as say:
            to_a_loss(asked.nanogpt, asked.rounds, say)
    if asked.what != "loss":
        with page("train-speed", asked.record) as say:
            at_equal_shape(asked.nanogpt, asked.rounds, asked.compiled, asked.steps, say)


if __name__ == "__main__":
    main()
