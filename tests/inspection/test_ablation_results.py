"""The evidence file promises: what was saved is loaded without torch; a bad file is one line of error."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from common.errors import CHECKPOINT, DISK_OR_MEMORY, UserError
from inspection import ablation_results as evidence
from inspection.ablation_results import TABLES, AblationEffects, AblationResults, Interval, bootstrap, interval, table

ROOT = Path(__file__).parents[2]
L, H = 2, 3


def effects(unit: str, heads: int = H, seed: int = 0) -> AblationEffects:
    values = np.random.default_rng(seed).normal(size=(6, 5, L, heads))
    names = TABLES if heads > 1 else TABLES[:2]
    tables: dict[str, Any] = dict.fromkeys(TABLES)
    tables |= {name: table(one, 1) for name, one in zip(names, values, strict=False)}
    return AblationEffects(unit, 1.5, 5, **tables)


def some(heads: int = H) -> AblationResults:
    measures = {"repeats": effects("nats/token", heads), "logit_diff.pronoun": effects("nats", heads, 1)}
    return AblationResults(800, "ab" * 32, 1, measures)


@pytest.mark.parametrize("heads", [1, 3])
def test_what_was_saved_is_loaded(tmp_path: Path, heads: int) -> None:
    path = tmp_path / "attention" / "ablations.json"
    some(heads).save(path)
    assert AblationResults.load(path) == some(heads) and json.loads(path.read_text()) == some(heads).as_json()
    assert [p.name for p in path.parent.iterdir()] == ["ablations.json"]


def test_the_file_is_as_it_is_described(tmp_path: Path) -> None:
    some().save(tmp_path / "e")
    found = json.loads((tmp_path / "e").read_text())
    assert found["format"] == "glassgpt-ablations-1" and (found["step"], found["seed"]) == (800, 1)
    repeats = found["measures"]["repeats"]
    assert (repeats["unit"], repeats["baseline"], repeats["count"]) == ("nats/token", 1.5, 5)
    cell = some().measures["repeats"].difference_zero
    assert cell is not None and repeats["difference_zero"][1][2] == [cell[1][2].value, cell[1][2].low, cell[1][2].high]


def test_nothing_measured_is_evidence_too(tmp_path: Path) -> None:
    AblationResults(0, "", 1, {}).save(tmp_path / "e")
    assert AblationResults.load(tmp_path / "e").measures == {}


READER = """
import sys
sys.modules["torch"] = None  # importing it now raises ImportError
from inspection.ablation_results import AblationResults
print(AblationResults.load(sys.argv[1]).step)
"""


def test_the_reader_needs_no_torch(tmp_path: Path) -> None:
    some().save(tmp_path / "e")
    command = [sys.executable, "-c", READER, str(tmp_path / "e")]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout == "800\n"


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "e"
    path.write_text("old")

    def full(*paths: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(UserError, match="No space left") as caught:
        some().save(path)
    assert caught.value.exit_code == DISK_OR_MEMORY
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


# Files that nobody wrote with `save`.


def refused(path: Path, match: str = "evidence") -> None:
    with pytest.raises(UserError, match=match) as caught:
        AblationResults.load(path)
    assert caught.value.exit_code == CHECKPOINT and "\n" not in str(caught.value)


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", "No such file")
    refused(tmp_path, "Is a directory")


def put(*keys: Any) -> Callable[[Any], Callable[[dict[str, Any]], None]]:
    """A change that puts a value at a place of the table."""

    def of(value: Any) -> Callable[[dict[str, Any]], None]:
        def change(found: dict[str, Any]) -> None:
            for key in keys[:-1]:
                found = found[key]
            found[keys[-1]] = value

        return change

    return of


measure = ("measures", "repeats")
cell = (*measure, "zero", 1, 2)
WRONG: dict[str, Callable[[dict[str, Any]], Any]] = {
    "another format": put("format")("glassgpt-evidence-2"),
    "a format that is a list": put("format")(["glassgpt-ablations-1"]),
    "an unknown entry": put("more")(1),
    "a missing entry": lambda found: found.pop("seed"),
    "a negative step": put("step")(-1),
    "a step that is true": put("step")(True),
    "half a step": put("step")(800.5),
    "a step beyond all": put("step")(10**30),
    "a hash that is a number": put("weights_sha256")(7),
    "a hash that drives a terminal": put("weights_sha256")("\x1b[2J"),
    "measures in a list": put("measures")([]),
    "an unknown measure": put("measures", "loudness")({}),
    "a measure with a line break": put("measures", "logit_diff.a\nb")(some().as_json()["measures"]["repeats"]),
    "a measure that is a number": put(*measure)(3),
    "an unknown unit": put(*measure, "unit")("bananas"),
    "no items": put(*measure, "count")(0),
    "a baseline that is text": put(*measure, "baseline")("1.5"),
    "a baseline that is true": put(*measure, "baseline")(True),
    "a measure without its means": lambda found: found["measures"]["repeats"].pop("mean"),
    "no zero table": put(*measure, "zero")(None),
    "no control for some": put(*measure, "control_zero")(None),
    "a table of text": put(*measure, "zero")("xxx"),
    "an empty table": put(*measure, "zero")([]),
    "empty rows": put(*measure, "zero")([[], []]),
    "rows of unlike length": lambda found: found["measures"]["repeats"]["zero"][1].pop(),
    "fewer layers in one table": lambda found: found["measures"]["repeats"]["mean"].pop(),
    "fewer layers in one measure": lambda found: [
        found["measures"]["repeats"][name].pop() for name in TABLES if found["measures"]["repeats"][name]
    ],
    "an interval of two": put(*cell)([1, 2]),
    "an interval of four": put(*cell)([1, 0, 2, 3]),
    "an interval that is a table": put(*cell)({"value": 1}),
    "an interval beside its value": put(*cell)([1, 2, 3]),
    "an interval upside down": put(*cell)([1, 2, 0]),
    "an interval of nulls": put(*cell)([None, None, None]),
    "an interval of text": put(*cell)(["1", "0", "2"]),
    "an interval of truths": put(*cell)([True, False, True]),
    "an interval of nan": put(*cell)([float("nan")] * 3),
    "an interval without end": put(*cell)([0, float("-inf"), float("inf")]),
    "an interval of huge whole numbers": put(*cell)([10**400] * 3),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused(tmp_path: Path, name: str) -> None:
    found = copy.deepcopy(some().as_json())
    WRONG[name](found)
    (tmp_path / "e").write_text(json.dumps(found))
    refused(tmp_path / "e", "holds no evidence that can be read")


RAW = {
    "nothing": (b"", "no JSON"),
    "no text": (b"\xff\xfe\x00", "no UTF-8"),
    "a list": (b"[]", "no glassgpt-ablations-1"),
    "a number that overflows": (json.dumps(some().as_json()).replace("1.5", "1e999", 1).encode(), "no number"),
    "a name twice": (b'{"format": "glassgpt-ablations-1", "step": 1, "step": 2}', "twice"),
    "very deep": (b"[" * 100_000, "nested"),
    "a number of 10,000 digits": (b'{"step": ' + b"9" * 10_000 + b"}", "no evidence"),
}


@pytest.mark.parametrize("name", RAW)
def test_what_is_no_evidence_is_refused(tmp_path: Path, name: str) -> None:
    raw, reason = RAW[name]
    (tmp_path / "e").write_bytes(raw)
    refused(tmp_path / "e", reason)


def test_a_file_that_would_fill_the_memory_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "e").open("wb") as file:
        file.truncate(evidence.MAX_BYTES + 1)
    refused(tmp_path / "e", "larger")


def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    raw = json.dumps(some().as_json()).encode()
    for length in (*range(0, len(raw) - 1, 173), len(raw) - 1):
        (tmp_path / "e").write_bytes(raw[:length])
        refused(tmp_path / "e")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10**6), st.integers(0, 255))
@example(0, 0)
def test_a_changed_byte_is_refused_or_read(tmp_path: Path, place: int, byte: int) -> None:
    """A digit may become another digit; nothing else than evidence comes out, and no other error."""
    raw = bytearray(json.dumps(some().as_json()).encode())
    raw[place % len(raw)] = byte
    (tmp_path / "e").write_bytes(raw)
    try:
        found = AblationResults.load(tmp_path / "e")
    except UserError as error:
        assert error.exit_code == CHECKPOINT
    else:
        assert isinstance(found, AblationResults)


# The intervals.


def test_an_interval_holds_the_mean_as_often_as_it_says() -> None:
    """Of 32 items spread evenly, and of 8, fewer times than at the limit: what the docstring says."""
    generator = np.random.default_rng(5)
    for items, least, most in ((32, 0.92, 0.955), (8, 0.86, 0.90)):
        found = bootstrap(generator.normal(0.7, 2, size=(items, 3000)), seed=1)
        held = ((found[:, 1] <= 0.7) & (found[:, 2] >= 0.7)).mean()
        assert least < held < most, (items, held)


def test_an_interval_is_as_wide_as_the_formula_says() -> None:
    """With many items, 1.96 standard errors to either side."""
    values = np.random.default_rng(2).exponential(size=(2000, 1))
    ((value, low, high),) = bootstrap(values, seed=1)
    error = values.std() / np.sqrt(2000)
    assert value == values.mean()
    assert (value - low) / error == pytest.approx(1.96, rel=0.1) and (high - value) / error == pytest.approx(
        1.96, rel=0.1
    )


def test_the_seed_decides_the_resamples() -> None:
    values = np.random.default_rng(1).normal(size=(9, 4))
    assert np.array_equal(bootstrap(values, 1), bootstrap(values, 1))
    assert not np.array_equal(bootstrap(values, 1), bootstrap(values, 2))


def test_columns_are_compared_on_the_same_items() -> None:
    """Columns that differ by a constant differ by it in every resample."""
    one = np.random.default_rng(1).normal(size=9)
    found = bootstrap(np.stack([one, one + 3, one * 2], axis=1), 1)
    np.testing.assert_allclose(found[1], found[0] + 3, atol=1e-12)
    np.testing.assert_allclose(found[2], found[0] * 2, atol=1e-12)


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=40))
@settings(max_examples=50, deadline=None)
@example([0.7] * 3)  # of which each resample's mean is 1e-16 more
def test_an_interval_holds_its_own_value(values: list[float]) -> None:
    found = interval(np.array(values), 1)
    assert found.low <= found.value <= found.high
    assert min(values) - 1e-6 <= found.low and found.high <= max(values) + 1e-6
    if len(set(values)) == 1:
        assert found.high - found.low < 1e-6


def test_an_interval_is_clear_of_zero_or_not() -> None:
    assert Interval(1.0, 0.5, 2.0).clear and Interval(-1.0, -2.0, -0.5).clear
    assert not Interval(1.0, 0.0, 2.0).clear and not Interval(0.0, 0.0, 0.0).clear
