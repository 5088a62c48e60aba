"""What taking heads away has shown, as numbers with their uncertainty, and the file that keeps them.

`causal.py` measures and fills an `AblationResults`; tables and the page read it, and need numpy alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import CHECKPOINT, UserError
from common.files import write_atomic

FORMAT = "glassgpt-ablations-1"
RESAMPLES = 1000
LEVEL = 0.95
MAX_BYTES = 100_000_000
"""A file from a stranger must not fill the memory; 48 layers of 32 heads and 10 measures take 10 MB."""
UNITS = ("nats/token", "nats")


@dataclass(frozen=True)
class Interval:
    """A mean over items and its 95 % interval; low <= value <= high."""

    value: float
    low: float
    high: float

    @property
    def clear(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low > 0 or self.high < 0


Table = tuple[tuple[Interval, ...], ...]
"""An interval for each layer and head, table[l][h]."""


@dataclass(frozen=True)
class AblationEffects:
    """What one measure says about every head: positive where taking the head away hurts.

    The control of a head is another head of its layer, drawn at random: its expectation over all of them. The margin
    is the head minus its control, paired item by item. Both are None where a layer has one head.
    """

    unit: str
    """`nats/token` (of loss) or `nats` (of the right answer's lead)."""
    baseline: float
    """The loss, or the lead, of the whole model."""
    count: int
    """Items: repeats, texts or probes."""
    zero: Table
    """The head's output replaced with 0."""
    mean: Table
    """The head's output replaced with its mean."""
    control_zero: Table | None
    control_mean: Table | None
    difference_zero: Table | None
    difference_mean: Table | None


TABLES = tuple(field.name for field in fields(AblationEffects))[3:]


@dataclass(frozen=True)
class AblationResults:
    """The effects by measure (`repeats`, `corpus`, `logit_diff.KIND`), and of which weights they speak."""

    step: int
    weights_sha256: str
    seed: int
    measures: dict[str, AblationEffects]

    def as_json(self) -> dict[str, Any]:
        """The table that `save` writes; an interval is [value, low, high]."""
        about = {"format": FORMAT, "step": self.step, "weights_sha256": self.weights_sha256, "seed": self.seed}
        return {**about, "measures": {name: _as_json(effects) for name, effects in self.measures.items()}}

    def save(self, path: Path | str) -> None:
        """Write the evidence as JSON; `path` is replaced whole or not at all.

        Raises:
            UserError: if the file cannot be written (exit code 6).
        """
        write_atomic(Path(path), [json.dumps(self.as_json(), allow_nan=False).encode()])

    @staticmethod
    def load(path: Path | str) -> AblationResults:
        """The evidence that `save` wrote. Nothing in the file is believed before it is checked.

        Raises:
            UserError: if the file is missing, damaged, or holds no evidence (exit code 4).
        """
        path = Path(path)
        try:
            if path.stat().st_size > MAX_BYTES:
                raise ValueError("it is larger than any evidence")
            return _evidence(json.loads(path.read_text("utf-8"), object_pairs_hook=_unique, parse_constant=_no_number))
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}", CHECKPOINT) from error
        except RecursionError:
            reason = "it is nested too deeply"
        except json.JSONDecodeError:
            reason = "it is no JSON"
        except UnicodeDecodeError:
            reason = "it is no UTF-8 text"
        except ValueError as error:
            reason = str(error)
        message = f"{path} holds no evidence that can be read: {reason}; delete it and measure the heads anew"
        raise UserError(message, CHECKPOINT)


def bootstrap(values: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """Means over items with their 95 % percentile intervals (Efron & Tibshirani 1993, section 13.3).

    The same resamples serve every column, so that columns are compared on the same items. With few items such
    intervals are too narrow: of normally spread items they hold the true mean in 94 % of cases at 32 items, in 88 %
    at 8, 75 % at 3 and 50 % at 2 (20,000 trials each).

    Args:
        values: (N, ...), one row for each of N >= 2 items.
        seed: of the generator that draws the resamples.

    Returns:
        (..., 3): value, low, high. Low and high are stretched to hold the value where rounding leaves it outside.
    """
    N = len(values)
    assert N >= 2 and np.isfinite(values).all(), "an interval needs two items and finite numbers"
    draws = np.random.default_rng(seed).integers(N, size=(RESAMPLES, N))
    shares = np.stack([np.bincount(draw, minlength=N) for draw in draws]) / N
    flat = values.reshape(N, -1)
    mean = flat.mean(axis=0)
    low, high = np.quantile(shares @ flat, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    found = np.stack([mean, np.minimum(low, mean), np.maximum(high, mean)], axis=-1)
    return found.reshape(*values.shape[1:], 3)


def interval(values: NDArray[np.float64], seed: int) -> Interval:
    """The bootstrap of values (N,)."""
    return Interval(*map(float, bootstrap(values, seed)))


def table(values: NDArray[np.float64], seed: int) -> Table:
    """The bootstrap of values (N, L, H) as intervals."""
    return tuple(tuple(Interval(*map(float, cell)) for cell in row) for row in bootstrap(values, seed))


def _as_json(effects: AblationEffects) -> dict[str, Any]:
    found: dict[str, Any] = {"unit": effects.unit, "baseline": effects.baseline, "count": effects.count}
    for name in TABLES:
        rows: Table | None = getattr(effects, name)
        found[name] = None if rows is None else [[[c.value, c.low, c.high] for c in row] for row in rows]
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("it names something twice")
    return found


def _no_number(name: str) -> float:
    raise ValueError(f"it holds {name}, which is no number")


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e300 or math.isnan(value):
        raise ValueError("a value in it is no number")
    return float(value)


def _whole(value: object, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 1 << 63:
        raise ValueError(f"a value in it is no whole number from {least}")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str) or not value.isprintable():
        raise ValueError("a value in it is no text")
    return value


def _keys(value: object, names: tuple[str, ...], what: str) -> Mapping[str, Any]:
    if not isinstance(value, dict) or set(value) != set(names):
        raise ValueError(f"{what} has not exactly the entries {', '.join(names)}")
    return value


def _interval(cell: object) -> Interval:
    if not isinstance(cell, list) or len(cell) != 3:
        raise ValueError("an interval in it is not [value, low, high]")
    value, low, high = map(_number, cell)
    if not low <= value <= high:
        raise ValueError("an interval in it does not hold its value")
    return Interval(value, low, high)


def _table(rows: object) -> Table:
    """Intervals in rows of one length, at least one of each."""
    if not isinstance(rows, list) or not rows or not all(isinstance(row, list) and row for row in rows):
        raise ValueError("a table in it has no rows of heads")
    if len({len(row) for row in rows}) > 1:
        raise ValueError("a table in it has rows of unlike length")
    return tuple(tuple(map(_interval, row)) for row in rows)


def _effects(name: str, entry: object) -> AblationEffects:
    """One measure, once its tables are found to fit each other."""
    known = _keys(entry, tuple(field.name for field in fields(AblationEffects)), "a measure")
    unit = _text(known["unit"])
    if unit not in UNITS or not (name in ("repeats", "corpus") or name.startswith("logit_diff.")):
        raise ValueError("a measure in it is unknown")
    tables = {key: None if known[key] is None else _table(known[key]) for key in TABLES}
    shapes = {key: (len(rows), len(rows[0])) for key, rows in tables.items() if rows is not None}
    alone = shapes.get("zero", (0, 0))[1] == 1  # a layer of one head has no other to compare with
    if set(shapes) != set(("zero", "mean") if alone else TABLES) or len(set(shapes.values())) != 1:
        raise ValueError("the tables of a measure in it do not fit each other")
    return AblationEffects(unit, _number(known["baseline"]), _whole(known["count"], 1), **tables)  # type: ignore[arg-type]


def _evidence(found: object) -> AblationResults:
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"it is no {FORMAT} file")
    entries = _keys(found, ("format", *(field.name for field in fields(AblationResults))), "it")
    measures = entries["measures"]
    if not isinstance(measures, dict):
        raise ValueError("its measures are no table")
    effects = {_text(name): _effects(name, entry) for name, entry in measures.items()}
    if len({(len(one.zero), len(one.zero[0])) for one in effects.values()}) > 1:
        raise ValueError("its measures speak of unlike numbers of heads")
    step, seed = _whole(entries["step"], 0), _whole(entries["seed"], 0)
    return AblationResults(step, _text(entries["weights_sha256"]), seed, effects)
