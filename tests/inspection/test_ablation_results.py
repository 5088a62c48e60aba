"""Ablation results: bootstrap intervals, and a JSON file that is checked when it is read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from common.errors import CHECKPOINT
from inspection.ablation_results import TABLES, AblationEffects, AblationResults, bootstrap
from tests.runs import user_error

L, H = 2, 3


def effects(unit: str, heads: int = H, seed: int = 0) -> AblationEffects:
    values = np.random.default_rng(seed).normal(size=(6, 5, L, heads))
    names = TABLES if heads > 1 else TABLES[:2]
    return AblationEffects(unit, 1.5, 5, {name: bootstrap(v, 1) for name, v in zip(names, values, strict=False)})


def results(heads: int = H) -> AblationResults:
    measures = {"repeats": effects("nats/token", heads), "logit_diff.pronoun": effects("nats", heads, 1)}
    return AblationResults(800, "ab" * 32, 1, measures)


@pytest.mark.parametrize("heads", [1, 3])
def test_saved_results_are_loaded(tmp_path: Path, heads: int) -> None:
    path = tmp_path / "attention" / "ablations.json"
    results(heads).save(path)
    data = json.loads(saved := path.read_bytes())
    AblationResults.load(path).save(path)
    assert path.read_bytes() == saved
    assert (data["format"], data["step"], data["seed"]) == ("glassgpt-ablations-1", 800, 1)
    repeats, tables = data["measures"]["repeats"], results(heads).measures["repeats"].tables
    assert (repeats["unit"], repeats["baseline"], repeats["count"]) == ("nats/token", 1.5, 5)
    assert {name: repeats[name] for name in TABLES if name in repeats} == {k: t.tolist() for k, t in tables.items()}


DAMAGE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "format": lambda data: data.update(format="glassgpt-ablations-2"),
    "missing entry": lambda data: data.pop("seed"),
    "no control": lambda data: data["measures"]["repeats"].pop("control_zero"),
    "unequal rows": lambda data: data["measures"]["repeats"]["zero"][1].pop(),
    "fewer layers": lambda data: data["measures"]["repeats"]["mean"].pop(),
    "nan": lambda data: data["measures"]["repeats"]["zero"][1].__setitem__(2, [float("nan")] * 3),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_malformed_results_are_refused(tmp_path: Path, name: str) -> None:
    results().save(tmp_path / "file")
    data = json.loads((tmp_path / "file").read_text())
    DAMAGE[name](data)
    (tmp_path / "file").write_text(json.dumps(data))
    with user_error(CHECKPOINT, "not a readable file of ablation results"):
        AblationResults.load(tmp_path / "file")


def test_interval_covers_the_mean_as_documented() -> None:
    generator = np.random.default_rng(5)
    for items, least, most in ((32, 0.92, 0.955), (8, 0.86, 0.90)):
        intervals = bootstrap(generator.normal(0.7, 2, size=(items, 3000)), seed=1)
        coverage = ((intervals[:, 1] <= 0.7) & (intervals[:, 2] >= 0.7)).mean()
        assert least < coverage < most, (items, coverage)


def test_interval_of_many_items_is_1_96_standard_errors() -> None:
    values = np.random.default_rng(2).exponential(size=(2000, 1))
    ((value, low, high),) = bootstrap(values, seed=1)
    error = values.std() / np.sqrt(2000)
    assert value == values.mean()
    assert [(value - low) / error, (high - value) / error] == pytest.approx([1.96, 1.96], rel=0.1)


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=40))
@settings(max_examples=50, deadline=None)
@example([0.7] * 3)  # the mean of a resample is 1e-16 larger
def test_interval_includes_its_value(values: list[float]) -> None:
    value, low, high = bootstrap(np.array(values), 1)
    assert min(values) - 1e-6 <= low <= value <= high <= max(values) + 1e-6
