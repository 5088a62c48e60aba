"""What each part of our recipe is worth: the recipe for Tiny Shakespeare with one part changed, over several seeds.

    python -m benchmarks.ablate                     # every change, seeds 1, 2, 3: a quarter of an hour on two cores
    python -m benchmarks.ablate --only muon rotary  # the changes whose names hold one of these words
    python -m benchmarks.ablate --config configs/quickstart.toml

A part pays if the loss rises without it, or if the steps take longer: both columns count. Everything else stays as it
is, rates too, which were found with all parts in place; so a change of optimizer is given rates of its own.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.results import page
from benchmarks.side_by_side import options, table
from benchmarks.training import Trained, trained
from model.config import PRESETS
from training.config import parse_train

RECIPE = "configs/shakespeare_char.toml"
STEADY = 0.005
"""Nats/token below which a difference of means says nothing; and it must have the same sign with every seed."""


@dataclass(frozen=True, eq=False)
class Change:
    """One part of the recipe, made otherwise."""

    name: str
    options: Sequence[str] = ()
    """Of `train.py`."""
    architecture: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the preset `glass`."""


UNCHANGED = Change("the recipe")
CHANGES = (
    Change("no norm of queries and keys", architecture={"qk_norm": False}),
    Change("learned positions instead of rotary ones", architecture={"positions": "learned"}),
    Change("GELU instead of squared ReLU", architecture={"activation": "gelu"}),
    Change("SwiGLU, three matrices of 8/3 the width", ["--model.d_mlp=344"], {"activation": "swiglu"}),
    Change("RMS norm instead of layer norm", architecture={"norm": "rms"}),
    Change("biases", architecture={"biases": True}),
    Change("embeddings N(0, 0.02²) instead of N(0, 0.2²)", architecture={"embedding_std": 0.02}),
    Change("the final norm's weight starts at 1 instead of 1/4", architecture={"final_norm_weight": 1.0}),
    Change("embeddings N(0, 0.02²), final norm 1", architecture={"embedding_std": 0.02, "final_norm_weight": 1.0}),
    Change("outputs do not start at zero", architecture={"zero_outputs": False}),
    Change("the preset gpt2", ["--model.preset=gpt2"]),
    Change("AdamW alone at 0.003 instead of Muon", ["--optim.optimizer=adamw", "--optim.lr=0.003"]),
    Change("AdamW alone at 0.006", ["--optim.optimizer=adamw", "--optim.lr=0.006"]),
    Change("AdamW alone at 0.012", ["--optim.optimizer=adamw", "--optim.lr=0.012"]),
    Change("momentum 0.95 instead of 0.8", ["--optim.momentum=0.95"]),
    Change("the rate falls in a cosine", ["--optim.schedule=cosine"]),
    Change("the rate falls over all steps", ["--optim.decay_fraction=1"]),
    Change("no weight decay", ["--optim.weight_decay=0"]),
    Change("MLP of three times the width", ["--model.d_mlp=384"]),
    Change("two heads of 64 instead of four of 32", ["--model.n_heads=2"]),
    Change("8 windows of 128 instead of 16 of 64", ["--model.context=128", "--train.batch_size=8"]),
)


@contextlib.contextmanager
def altered(architecture: Mapping[str, Any]) -> Iterator[None]:
    """The preset `glass` with some fields otherwise."""
    before = PRESETS["glass"]
    PRESETS["glass"] = replace(before, **architecture)
    try:
        yield
    finally:
        PRESETS["glass"] = before


def learned(change: Change, recipe: Sequence[str], seed: int) -> Trained:
    """What the recipe learns with that change."""
    with altered(change.architecture):
        config, _ = parse_train([*recipe, *change.options, f"--run.seed={seed}"])
        return trained(config)


def described(found: Mapping[Change, Sequence[Trained]]) -> str:
    """A row for each change: the losses, how far their mean is from the recipe's, and the time of the steps."""
    first = found[UNCHANGED]
    mean = statistics.mean(one.loss for one in first)
    rows = []
    for change, all_of in found.items():
        rises = [one.loss - other.loss for one, other in zip(all_of, first, strict=True)]
        rise = statistics.mean(rises)
        times = statistics.median(one.seconds / other.seconds for one, other in zip(all_of, first, strict=True))
        clear = abs(rise) >= STEADY and len({one > 0 for one in rises}) == 1
        verdict = ("worse" if rise > 0 else "better") if clear else "-"
        losses = ", ".join(f"{one.loss:.4f}" for one in all_of)
        rows.append((change.name, losses, f"{mean + rise:.4f}", f"{rise:+.4f}", verdict, f"{times:.2f} x"))
    return table(("", "loss of each seed", "mean", "change", "", "time of the steps"), rows)


def main() -> None:
    parser = options(__doc__ or "", rounds=3)
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="changes whose names hold one of these")
    parser.add_argument("--config", default=RECIPE, help="the recipe that is changed")
    parser.add_argument("--option", action="append", default=[], help="an option of train.py for all, may be repeated")
    asked = parser.parse_args()
    words = [word.lower() for word in asked.only]
    chosen = [one for one in CHANGES if not words or any(word in one.name.lower() for word in words)]
    if not chosen:
        parser.error(f"no change is called so; there are: {'; '.join(one.name for one in CHANGES)}")
    found: dict[Change, list[Trained]] = {}
    with page("ablate", asked.record) as say:
        for seed in range(1, asked.rounds + 1):
            for change in (UNCHANGED, *chosen):
                one = learned(change, [asked.config, *asked.option], seed)
                found.setdefault(change, []).append(one)
                print(f"  {change.name}, seed {seed}: {one.loss:.4f}, {one.seconds:.1f} s", file=sys.stderr, flush=True)
        recipe = " ".join([asked.config, *asked.option])
        say.say(f"{recipe}: loss over the whole validation split, seeds 1 to {asked.rounds}.")
        say.say(described(found))


if __name__ == "__main__":
    main()
