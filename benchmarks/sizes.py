"""How well each size learns from so many tokens: the table behind `train.minutes`, and the formula fitted to it.

    python -m benchmarks.sizes                     # trains the table again, which takes an hour on two cores
    python -m benchmarks.sizes --fit               # only fits the formula to the table in training/time_budget.py
    python -m benchmarks.sizes --jobs 2            # so many trainings side by side, each on its share of the cores

Every training is one of its own, its rate falling to zero at its end; a figure is the loss over the whole validation
split of Tiny Shakespeare by character. What the formula and the table give is to be written into training/time_budget.py.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.results import page
from benchmarks.side_by_side import options, spend, spread, table
from benchmarks.training import trained
from training import time_budget as budget
from training.config import OptimConfig, RunConfig
from training.time_budget import SIZES, shaped

SECONDS = (30.0, 90.0, 240.0)
"""Of steps alone, at the speed that `SIZES` gives."""
POWERS = np.arange(0.05, 1.5, 0.01)
Point = tuple[int, float, float]
"""(weights, useful tokens, loss)."""


def plan(seconds: Sequence[float]) -> list[tuple[int, int]]:
    """(index of the size, steps) of every training, the longest first."""
    trained = [i for i, size in enumerate(SIZES) if size.losses or size.seconds < 2]
    wanted = [(i, max(budget.FEWEST_STEPS, round(time / SIZES[i].seconds))) for i in trained for time in seconds]
    return sorted(wanted, key=lambda one: -one[1] * SIZES[one[0]].seconds)


def train(index: int, steps: int, seed: int) -> float:
    """One training, in this process; its loss."""
    from data.config import DataConfig

    config = shaped(RunConfig(optim=OptimConfig(**budget.RECIPE)), SIZES[index])  # type: ignore[arg-type]
    config = replace(config, data=DataConfig(source="shakespeare", tokenizer="char"))
    config = replace(config, train=replace(config.train, steps=steps), run=replace(config.run, seed=seed))
    return trained(config).loss


def measured(jobs: int, seconds: Sequence[float], kept: Path | None, seed: int) -> list[tuple[int, int, float]]:
    """(index, steps, loss) of every training; those that stand in `kept` are not repeated."""
    done: dict[tuple[int, int], float] = {}
    if kept and kept.exists():
        rows = [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()]
        done = {(index, steps): loss for index, steps, loss in rows}
    threads = str(max(1, (os.cpu_count() or 1) // jobs))

    def one(what: tuple[int, int]) -> tuple[int, int, float]:
        if what not in done:
            words = [sys.executable, "-m", "benchmarks.sizes", "--one", *map(str, what), "--seed", str(seed)]
            done[what] = float(spend(words, OMP_NUM_THREADS=threads).output)
            print(f"  {what[1]} steps of {SIZES[what[0]]}: {done[what]:.4f}", file=sys.stderr, flush=True)
            if kept:
                with kept.open("a", encoding="utf-8") as file:
                    file.write(json.dumps([*what, done[what]]) + "\n")
        return (*what, done[what])

    with ThreadPoolExecutor(jobs) as pool:
        return sorted(pool.map(one, plan(seconds)))


def points(found: Sequence[tuple[int, int, float]]) -> list[Point]:
    """What the formula is fitted to."""
    return [(SIZES[index].weights, useful(index, steps), loss) for index, steps, loss in found]


def useful(index: int, steps: int) -> float:
    """The tokens of a training, those read again counting less."""
    return budget.useful_tokens(SIZES[index].tokens * steps, budget.TABLE_TEXT)


def fit(known: Sequence[Point]) -> tuple[float, float, float, float, float]:
    """E, A, α, B, β of `budget.expected_loss` with the least sum of squared relative errors.

    For each pair of powers the rest is a linear problem; pairs are tried in steps of 0.01.
    """
    weights, tokens, losses = (np.array(column, dtype=np.float64) for column in zip(*known, strict=True))
    best, found = np.inf, (0.0, 0.0, 0.0, 0.0, 0.0)
    for of_size in POWERS:
        for of_tokens in POWERS:
            terms = np.stack([np.ones_like(losses), weights**-of_size, tokens**-of_tokens], axis=1)
            solved = np.linalg.lstsq(terms / losses[:, None], np.ones_like(losses), rcond=None)[0]
            error = float(np.square(terms @ solved / losses - 1).sum())
            if error < best and (solved > 0).all():
                best, found = error, (*solved[:2], of_size, solved[2], of_tokens)
    e, a, alpha, b, beta = map(float, found)
    return e, a, alpha, b, beta


def described(found: Sequence[tuple[int, int, float]], fitted: Sequence[float]) -> str:
    """The table, and what the formula says of each training."""
    e, a, alpha, b, beta = fitted
    rows, off = [], []
    for index, steps, loss in found:
        size = SIZES[index]
        said = e + a / size.weights**alpha + b / useful(index, steps) ** beta
        off.append(said / loss - 1)
        shape = f"{size.n_layers} x {size.d_model}, {size.batch_size} x {size.context}"
        rows.append((shape, f"{steps:,}", f"{size.tokens * steps:,}", f"{loss:.4f}", f"{said:.4f}", f"{off[-1]:+.1%}"))
    head = ("layers x width, batch x context", "steps", "tokens", "loss", "formula", "off by")
    formula = f"{e:.4f} + {a:.4g} / weights^{alpha:.2f} + {b:.4g} / tokens^{beta:.2f}"
    return f"{table(head, rows)}\n\nloss = {formula}; off by {spread([abs(x) for x in off], '.1%')}."


def main() -> None:
    parser = options(__doc__ or "", rounds=1)
    parser.add_argument("--fit", action="store_true", help="train nothing")
    parser.add_argument("--jobs", type=int, default=1, help="trainings side by side")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, nargs="+", default=SECONDS, help="steps' time of each training")
    parser.add_argument("--keep", type=Path, help="a file that results are added to, and taken from")
    parser.add_argument("--one", type=int, nargs=2, metavar=("SIZE", "STEPS"), help="train one and print its loss")
    asked = parser.parse_args()
    if asked.one:
        print(train(*asked.one, asked.seed))
        return
    with page("sizes", asked.record) as say:
        if asked.fit:
            found = [(i, steps, loss) for i, size in enumerate(SIZES) for steps, loss in size.losses]
        else:
            found = measured(asked.jobs, asked.seconds, asked.keep, asked.seed)
        say.say(described(found, fit(points(found))))


if __name__ == "__main__":
    main()
