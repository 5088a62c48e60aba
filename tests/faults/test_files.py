"""Cut, flipped, missing and garbled files of a run: damage is named and skipped, and never becomes a silent new start."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from common.files import read_metrics
from tests.faults.harness import Reference, committed, numbers
from tests.faults.processes import run_script
from tests.runs import error_line

FILES = ("manifest.json", "model.safetensors", "optimizer.safetensors", "state.json", "vocabulary.json")
START, END = 6, 10


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut": cut,
    "flip": flip,
    "missing": Path.unlink,
    "noise": lambda path: path.write_bytes(bytes(range(256)) * (path.stat().st_size // 256 + 1)),
}


@pytest.fixture
def run(at_step_6: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return shutil.copytree(at_step_6, tmp_path / "run")


def resume(run: Path) -> subprocess.CompletedProcess[str]:
    done = run_script(f"--run.resume={run}", f"--run.stop_at_step={END}")
    assert "Traceback" not in done.stderr and "\x1b" not in done.stderr, done.stderr
    return done


@pytest.mark.parametrize("what", ["cut", "flip", "missing"])
@pytest.mark.parametrize("name", FILES)
def test_damaged_checkpoint_is_named_and_skipped(name: str, what: str, to_step_10: Reference, run: Path) -> None:
    """By sample.py and attend.py, and by a resume from the one before it, which ends with the same weights."""
    newest = run / "checkpoints" / f"{START:06d}"
    DAMAGES[what](newest / name)
    for script, argv in (("sample.py", ["--tokens=2"]), ("attend.py", ["--prompt=box"])):
        done = run_script(run, *argv, script=script)
        assert done.returncode == 0 and str(newest) in done.stderr, done.stderr
    done = resume(run)
    assert done.returncode == 0 and str(newest) in done.stderr, done.stderr
    to_step_10.check(run)


@pytest.mark.parametrize("what", ["flip", "missing"])
def test_without_a_good_checkpoint_nothing_is_started(what: str, run: Path) -> None:
    kept = {path: path.read_bytes() for path in (run / "metrics.jsonl", run / "samples.txt")}
    for folder in (run / "checkpoints").iterdir():
        DAMAGES[what](folder / "model.safetensors")
    done = resume(run)
    assert str(run) in error_line(done, 4)
    assert all(str(folder) in done.stderr for folder in (run / "checkpoints").iterdir())
    assert all(path.read_bytes() == content for path, content in kept.items())


@pytest.mark.parametrize("what", ["cut", "missing", "noise"])
def test_damaged_config_never_trains_another_run(what: str, to_step_10: Reference, run: Path) -> None:
    """Refused in one line, or resumed to the same weights: a shortened file must not bring back the defaults."""
    DAMAGES[what](run / "config.toml")
    done = resume(run)
    if done.returncode:
        error_line(done, done.returncode)
        assert done.returncode in (2, 4) and committed(run) == START
    else:
        assert to_step_10.same_weights(run) and numbers(run) == numbers(to_step_10.run)


def test_run_without_config_is_not_overwritten(reference: Reference, run: Path) -> None:
    (run / "config.toml").unlink()
    before = (run / "metrics.jsonl").read_bytes()
    done = run_script(*reference.argv, "--run.seed=2", f"--run.dir={run}")
    assert str(run) in error_line(done, 4)
    assert committed(run) == START and (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("what", ["cut", "missing", "noise"])
def test_damaged_metrics_cost_no_step(what: str, to_step_10: Reference, run: Path) -> None:
    """Lines that cannot be read are lost; those that follow are whole, in order, and none is there twice."""
    DAMAGES[what](run / "metrics.jsonl")
    assert resume(run).returncode == 0
    assert to_step_10.same_weights(run)
    lines, expected = (read_metrics(folder / "metrics.jsonl") for folder in (run, to_step_10.run))
    for key in ("loss", "val_loss"):
        found, steps = ([line["step"] for line in table if key in line] for table in (lines, expected))
        assert found == sorted(set(found)) and set(found) <= set(steps)
        assert [step for step in found if step > START] == [step for step in steps if step > START]


@pytest.mark.parametrize("what", ["missing", "noise"])
@pytest.mark.parametrize("name", ["samples.txt", "attention/000004.safetensors", "attention/eval_texts.json"])
def test_damage_to_other_files_costs_no_step(name: str, what: str, reference: Reference, run: Path) -> None:
    """The run ends well, up to the page."""
    DAMAGES[what](run / name)
    done = run_script(f"--run.resume={run}")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert reference.same_weights(run)
