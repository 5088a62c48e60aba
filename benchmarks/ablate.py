"""Recipe ablation: what each part of our recipe for Tiny Shakespeare is worth, over several seeds.

    python -m benchmarks.ablate                     # every change, seeds 1, 2, 3: a quarter of an hour on two cores
    python -m benchmarks.ablate --only muon rotary  # changes whose names contain one of these words
    python -m benchmarks.ablate --config configs/quickstart.toml

A part pays if the loss rises without it, or if steps take longer. Learning rates stay as they are, except that a change
of optimizer gets its own.
"""

import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple
from unittest.mock import patch

from benchmarks.common import parser, report, table
from model.config import PRESETS
from training.config import parse_train

RECIPE = "configs/shakespeare_char.toml"
MIN_DIFFERENCE = 0.005  # nats/token; a smaller difference, or one without the same sign for every seed, is not named


@dataclass(frozen=True, eq=False)
class Change:
    """One changed part of the recipe."""

    name: str
    options: Sequence[str] = ()  # of train.py
    architecture: Mapping[str, Any] = field(default_factory=dict)  # fields of the preset `glass`


class Result(NamedTuple):
    """Loss on the whole validation split, and seconds of the steps."""

    loss: float
    seconds: float


UNCHANGED = Change("the recipe")
CHANGES = (
    Change("no QK norm", architecture={"qk_norm": False}),
    Change("learned instead of rotary positions", architecture={"positions": "learned"}),
    Change("GELU instead of squared ReLU", architecture={"activation": "gelu"}),
    Change("SwiGLU with d_mlp 344", ["--model.d_mlp=344"], {"activation": "swiglu"}),
    Change("RMS norm instead of layer norm", architecture={"norm": "rms"}),
    Change("biases", architecture={"biases": True}),
    Change("embeddings N(0, 0.02²) instead of N(0, 0.2²)", architecture={"embedding_std": 0.02}),
    Change("final norm's weight starts at 1 instead of 1/4", architecture={"final_norm_weight": 1.0}),
    Change("outputs do not start at zero", architecture={"zero_outputs": False}),
    Change("the preset gpt2", ["--model.preset=gpt2"]),
    Change("AdamW at 0.003 instead of Muon", ["--optim.optimizer=adamw", "--optim.lr=0.003"]),
    Change("momentum 0.95 instead of 0.8", ["--optim.momentum=0.95"]),
    Change("cosine schedule", ["--optim.schedule=cosine"]),
    Change("decay over all steps", ["--optim.decay_fraction=1"]),
    Change("no weight decay", ["--optim.weight_decay=0"]),
    Change("two heads of 64 instead of four of 32", ["--model.n_heads=2"]),
    Change("8 sequences of 128 instead of 16 of 64", ["--model.context=128", "--train.batch_size=8"]),
)


def train(change: Change, recipe: Sequence[str], seed: int) -> Result:
    """Train the changed recipe in this process and keep nothing."""
    from data.prepare import prepare
    from training.device import get_dist_context
    from training.setup import build_trainer

    with patch.dict(PRESETS, glass=replace(PRESETS["glass"], **change.architecture)):
        config, _ = parse_train([*recipe, *change.options, f"--run.seed={seed}"])
        data, ctx = prepare(config.data), get_dist_context(config.train.dtype, config.run.threads, config.run.device)
        trainer = build_trainer(config, ctx, data)
        start = time.perf_counter()
        while trainer.state.step < config.train.steps:
            trainer.train_step()
        seconds = time.perf_counter() - start
        loss = trainer.validation_loss(trainer.final_subset)[0]
        trainer.batches.thread.shutdown(cancel_futures=True)
    return Result(loss, seconds)


def result_table(results: Mapping[Change, Sequence[Result]]) -> str:
    """For each change: the losses, the difference of the mean, and the time of the steps."""
    base = results[UNCHANGED]
    mean, rows = statistics.mean(result.loss for result in base), []
    for change, all_of in results.items():
        differences = [a.loss - b.loss for a, b in zip(all_of, base, strict=True)]
        difference = statistics.mean(differences)
        times = statistics.median(a.seconds / b.seconds for a, b in zip(all_of, base, strict=True))
        is_clear = abs(difference) >= MIN_DIFFERENCE and len({d > 0 for d in differences}) == 1
        label = ("worse" if difference > 0 else "better") if is_clear else "-"
        losses = ", ".join(f"{result.loss:.4f}" for result in all_of)
        rows.append((change.name, losses, f"{mean + difference:.4f}", f"{difference:+.4f}", label, f"{times:.2f} x"))
    return table(("", "loss of each seed", "mean", "change", "", "time of the steps"), rows)


def main() -> None:
    options = parser(__doc__, rounds=3)
    options.add_argument("--only", nargs="+", default=[], metavar="WORD", help="changes with one of these in the name")
    options.add_argument("--config", default=RECIPE, help="the recipe that is changed")
    options.add_argument("--option", action="append", default=[], help="an option of train.py for all, repeatable")
    args = options.parse_args()
    words = [word.lower() for word in args.only]
    changes = [change for change in CHANGES if not words or any(word in change.name.lower() for word in words)]
    if not changes:
        options.error(f"no such change; there are: {'; '.join(change.name for change in CHANGES)}")
    results: dict[Change, list[Result]] = {}
    with report("ablate", args.record) as out:
        for seed in range(1, args.rounds + 1):
            for change in (UNCHANGED, *changes):
                result = train(change, [args.config, *args.option], seed)
                results.setdefault(change, []).append(result)
                print(f"  {change.name}, seed {seed}: {result.loss:.4f}, {result.seconds:.1f} s", file=sys.stderr)
        recipe = " ".join([args.config, *args.option])
        out.add(f"{recipe}: loss on the whole validation split, seeds 1 to {args.rounds}.")
        out.add(result_table(results))


if __name__ == "__main__":
    main()
