"""Results of head ablations: mean effects with their confidence intervals, and the JSON file that keeps them.

`ablation.py` measures them; tables and the page read them without torch.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.errors import CHECKPOINT, UserError
from common.files import write_atomic

FORMAT = "glassgpt-ablations-1"
RESAMPLES = 1000
LEVEL = 0.95


class Interval(NamedTuple):
    """A mean over items and its 95% confidence interval; low <= value <= high."""

    value: float
    low: float
    high: float


IntervalTable = tuple[tuple[Interval, ...], ...]
"""An interval for each layer and head, table[l][h]."""


@dataclass(frozen=True)
class HeadEffect:
    """The effect of ablating a head, or several of a layer together, on one measure: positive where ablating hurts.

    The control is another head of the layer, or as many others, drawn at random: the mean over all draws. The
    difference is the effect minus that of the control, paired by item. Both are None where a layer has one head.
    """

    zero: Interval
    """Zero ablation: the output is replaced by 0."""
    mean: Interval
    """Mean ablation: the output is replaced by its mean."""
    control_zero: Interval | None = None
    control_mean: Interval | None = None
    difference_zero: Interval | None = None
    difference_mean: Interval | None = None


@dataclass(frozen=True)
class AblationEffects:
    """The `HeadEffect` of every head on one measure, as tables."""

    unit: str
    """`nats/token` (of loss) or `nats` (of the right answer's logit difference)."""
    baseline: float
    """The loss, or the logit difference, without ablation."""
    count: int
    """Number of items: texts or contrast pairs."""
    zero: IntervalTable
    mean: IntervalTable
    control_zero: IntervalTable | None
    control_mean: IntervalTable | None
    difference_zero: IntervalTable | None
    difference_mean: IntervalTable | None

    @property
    def shape(self) -> tuple[int, int]:
        """(L, H)."""
        return len(self.zero), len(self.zero[0])

    def head(self, layer: int, head: int) -> HeadEffect:
        """The effect of ablating one head."""
        tables: dict[str, IntervalTable | None] = {name: getattr(self, name) for name in TABLES}
        cells: dict[str, Any] = {name: table[layer][head] for name, table in tables.items() if table}
        return HeadEffect(**cells)


TABLES = tuple(field.name for field in fields(HeadEffect))


@dataclass(frozen=True)
class AblationResults:
    """Ablation effects by measure (`repeats`, `corpus`, `logit_diff.KIND`), and the model they belong to."""

    step: int
    weights_sha256: str
    seed: int
    measures: dict[str, AblationEffects]

    def save(self, path: Path | str) -> None:
        """Write the results as JSON, atomically; an interval is [value, low, high].

        Raises:
            UserError: if the file cannot be written (exit code 6).
        """
        data = {"format": FORMAT, **asdict(self)}
        write_atomic(Path(path), [json.dumps(data, allow_nan=False).encode()])

    @staticmethod
    def load(path: Path | str) -> AblationResults:
        """Read the results that `save` wrote.

        Raises:
            UserError: if the file is missing, damaged, or has no ablation results (exit code 4).
        """
        try:
            data = json.loads(Path(path).read_text("utf-8"))
            if data.pop("format") != FORMAT:
                raise ValueError(f"its format is not {FORMAT}")
            measures = {name: _effects(entry) for name, entry in data.pop("measures").items()}
            return AblationResults(**data, measures=measures)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}", CHECKPOINT) from error
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            message = f"{path} has no readable ablation results ({error}); delete it and run attend.py ablate again"
            raise UserError(message, CHECKPOINT) from error


def _effects(entry: dict[str, Any]) -> AblationEffects:
    """One measure, with tables of one shape; only a layer of one head has no controls."""
    tables = {key: np.array(entry[key], dtype=np.float64) for key in TABLES if entry[key] is not None}
    L, H, _ = tables["zero"].shape
    if len(tables) != (len(TABLES) if H > 1 else 2) or any(table.shape != (L, H, 3) for table in tables.values()):
        raise ValueError("the tables of a measure do not fit each other")
    if not all(np.isfinite(table).all() for table in tables.values()):
        raise ValueError("a value is not a finite number")
    return AblationEffects(**entry | {key: _intervals(table) for key, table in tables.items()})


def bootstrap(values: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """Means over items with 95% percentile bootstrap intervals (Efron & Tibshirani 1993, section 13.3).

    All columns use the same resamples, so that they are compared on the same items. With few items the intervals are
    too narrow: for normally distributed items they cover the true mean in 94% of cases at 32 items, 88% at 8, 75% at 3
    and 50% at 2 (20,000 trials each).

    Args:
        values: (N, ...), one row for each of N >= 2 items.
        seed: of the generator that draws the resamples.

    Returns:
        (..., 3): value, low, high. Low and high are extended to include the value where rounding excludes it.
    """
    N = len(values)
    assert N >= 2 and np.isfinite(values).all(), "an interval needs two items and finite numbers"
    draws = np.random.default_rng(seed).integers(N, size=(RESAMPLES, N))
    shares = np.stack([np.bincount(draw, minlength=N) for draw in draws]) / N
    flat = values.reshape(N, -1)
    mean = flat.mean(axis=0)
    low, high = np.quantile(shares @ flat, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    intervals = np.stack([mean, np.minimum(low, mean), np.maximum(high, mean)], axis=-1)
    return intervals.reshape(*values.shape[1:], 3)


def bootstrap_interval(values: NDArray[np.float64], seed: int) -> Interval:
    """The bootstrap of values (N,)."""
    return Interval(*bootstrap(values, seed).tolist())


def bootstrap_table(values: NDArray[np.float64], seed: int) -> IntervalTable:
    """The bootstrap of values (N, L, H)."""
    return _intervals(bootstrap(values, seed))


def _intervals(array: NDArray[np.float64]) -> IntervalTable:
    """(L, H, 3) as a table."""
    return tuple(tuple(Interval(*cell) for cell in row) for row in array.tolist())
