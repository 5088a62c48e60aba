"""Cut, flipped, missing and garbled files: damage is named and passed over, and never becomes a silent new start."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.forkserver import ForkServer
from tests.faults.harness import FAULTY, Reference, checkpoints, committed, numbers
from tests.runs import said

FILES = ("manifest.json", "model.safetensors", "optimizer.safetensors", "state.json", "vocabulary.json")
STANDS, BEFORE, ENDS = 6, 4, 8
Damage = Callable[[Path], None]


def cut(share: float, more: int) -> Damage:
    """Keep so much of a file, and so many bytes more or less."""

    def damage(path: Path) -> None:
        data = path.read_bytes()
        path.write_bytes((data + b"\0")[: int(len(data) * share) + more])

    return damage


def flip(share: float) -> Damage:
    """Flip one bit at so much of the way through a file."""

    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[min(len(data) - 1, int(len(data) * share))] ^= 4
        path.write_bytes(data)

    return damage


def fold(path: Path) -> None:
    """Put a folder in the place of a file."""
    path.unlink()
    path.mkdir()


def fill(pattern: bytes) -> Damage:
    """Fill a file with other bytes."""

    def damage(path: Path) -> None:
        path.write_bytes(pattern * (path.stat().st_size // len(pattern) + 1))

    return damage


DAMAGES: dict[str, Damage] = {
    "cut to nothing": cut(0, 0),
    "cut in half": cut(0.5, 0),
    "a byte short": cut(1, -1),
    "a byte long": cut(1, 1),
    "first bit": flip(0),
    "middle bit": flip(0.5),
    "last bit": flip(1),
    "missing": Path.unlink,
    "a folder": fold,
}


@pytest.fixture(scope="module")
def stands(server: ForkServer, reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run at step 6 with checkpoints of steps 4 and 6, and perhaps of the best."""
    return reference.stopped_at(STANDS, server, tmp_path_factory.mktemp("stands") / "run")


@pytest.fixture(scope="module")
def whole(server: ForkServer, reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """The same run, never disturbed, up to step 8."""
    options = (*reference.argv, f"--run.stop_at_step={ENDS}")
    return Reference.make(server, tmp_path_factory.mktemp("whole") / "run", options)


@pytest.fixture
def run(stands: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return shutil.copytree(stands, tmp_path / "run")


def resume(server: ForkServer, run: Path) -> subprocess.CompletedProcess[str]:
    return server.run(f"--run.resume={run}", f"--run.stop_at_step={ENDS}")


def newest(run: Path) -> Path:
    return run / "checkpoints" / f"{STANDS:06d}"


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_named_and_passed_over(
    name: str, server: ForkServer, whole: Reference, stands: Path, tmp_path: Path
) -> None:
    """Resumed from the one before it, the run ends with the same weights; the damaged one is written anew."""
    for what, damage in DAMAGES.items():
        run = shutil.copytree(stands, tmp_path / "run")
        damage(newest(run) / name)
        assert committed(run) == BEFORE, what
        done = resume(server, run)
        assert done.returncode == 0 and "Traceback" not in done.stderr, (what, done.stderr)
        assert str(newest(run)) in done.stderr, (what, done.stderr)
        assert f"from step {BEFORE}" in done.stdout, what
        whole.check(run)
        shutil.rmtree(run)


@pytest.mark.parametrize("name", FILES)
def test_what_reads_a_damaged_checkpoint_names_it(name: str, server: ForkServer, stands: Path, tmp_path: Path) -> None:
    """sample.py and attend.py, given the run or the damaged folder itself."""
    for what, damage in DAMAGES.items():
        run = shutil.copytree(stands, tmp_path / "run")
        damage(newest(run) / name)
        readers = [("sample.py", ["--tokens=2"]), ("attend.py", ["--prompt=box"])]
        for script, argv in readers if what in ("cut in half", "middle bit", "missing") else readers[:1]:
            done = server.run(run, *argv, script=script)
            assert done.returncode == 0 and str(newest(run)) in done.stderr, (what, script, done.stderr)
            assert "Traceback" not in done.stderr, (what, script)
            said(server.run(newest(run), *argv, script=script), 4)
        shutil.rmtree(run)


@pytest.mark.parametrize("name", FILES)
def test_without_a_good_checkpoint_nothing_is_begun_anew(name: str, server: ForkServer, run: Path) -> None:
    kept = [(path, path.read_bytes()) for path in (run / "metrics.jsonl", run / "samples.txt")]
    for folder in (run / "checkpoints").iterdir():
        flip(0.5)(folder / name)
    done = resume(server, run)
    line = said(done, 4)
    assert str(run) in line
    for folder in (run / "checkpoints").iterdir():
        assert str(folder) in done.stderr  # each is named
    assert [path.read_bytes() for path, _ in kept] == [data for _, data in kept]


def emptied(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()


def removed(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")


def garbage(run: Path) -> None:
    """Names that look a little like steps; none holds anything good."""
    shutil.rmtree(run / "checkpoints")
    for name in (
        "000008",
        "-1",
        "1e3",
        "٣",
        "²",
        "000004 ",
        "latest",
        ".writing-000006",
        "..x",
        "9" * 200,
        "a\nb",
        "\x1b[31m",
    ):
        (run / "checkpoints" / name).mkdir(parents=True)
    (run / "checkpoints" / "000006").write_text("a file")
    (run / "checkpoints" / "000007").symlink_to(run / "checkpoints")


@pytest.mark.parametrize("empty", [emptied, removed, garbage])
def test_a_run_without_checkpoints_is_said_to_be_one(empty: Damage, server: ForkServer, run: Path) -> None:
    empty(run)
    for script, argv in (("train.py", [f"--run.resume={run}"]), ("sample.py", [run]), ("attend.py", [run])):
        done = server.run(*argv, script=script)
        said(done, 4)
        assert "\x1b" not in done.stderr and "\x1b" not in done.stdout


def test_garbage_beside_good_checkpoints_is_passed_over(
    server: ForkServer, whole: Reference, stands: Path, run: Path
) -> None:
    garbage(run)
    for folder in checkpoints(stands):
        target = run / "checkpoints" / folder.name
        if target.is_file():
            target.unlink()
        shutil.copytree(folder, target)
    done = resume(server, run)
    assert done.returncode == 0 and "Traceback" not in done.stderr and "\x1b" not in done.stderr, done.stderr
    assert whole.same_weights(run)


GARBLED: dict[str, Damage] = {
    **{what: DAMAGES[what] for what in ("cut to nothing", "cut in half", "a byte short", "middle bit", "missing")},
    "noise": fill(bytes(range(256))),
    "NUL bytes": fill(b"\0"),  # as after a power cut
}


@pytest.mark.parametrize("what", GARBLED)
def test_a_damaged_config_never_trains_another_run(what: str, server: ForkServer, whole: Reference, run: Path) -> None:
    """Refused in one line, or resumed to the same weights; a shortened file must not bring back the defaults."""
    GARBLED[what](run / "config.toml")
    done = resume(server, run)
    if done.returncode:
        said(done, done.returncode)
        assert done.returncode in (2, 4), done.stderr
        assert committed(run) == STANDS
    else:
        assert whole.same_weights(run)
        assert numbers(run) == numbers(whole.run)


def test_a_run_without_its_config_is_not_begun_anew_over_its_checkpoints(
    server: ForkServer, corpus: Path, run: Path
) -> None:
    """Else its metrics would go, and a run with other settings would later be resumed from this one's checkpoints."""
    (run / "config.toml").unlink()
    before = (run / "metrics.jsonl").read_bytes()
    options = (*FAULTY, f"--data.source={corpus}", "--run.seed=2", "--run.stop_at_step=2")
    done = server.run(*options, f"--run.dir={run}")
    assert done.returncode in (2, 4), done.stdout
    assert str(run) in said(done, done.returncode)
    assert committed(run) == STANDS and (run / "metrics.jsonl").read_bytes() == before


def steps_of(lines: list[Any], key: str) -> list[int]:
    return [line["step"] for line in lines if key in line]


@pytest.mark.parametrize("what", GARBLED)
def test_damaged_metrics_cost_no_step_and_make_no_double_line(
    what: str, server: ForkServer, whole: Reference, run: Path
) -> None:
    """Lines that cannot be read are lost; those that follow are whole, in order, and none is there twice."""
    GARBLED[what](run / "metrics.jsonl")
    done = resume(server, run)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert whole.same_weights(run)
    lines, wanted = (
        [json.loads(line) for line in (at / "metrics.jsonl").read_text().splitlines()] for at in (run, whole.run)
    )
    for key in ("loss", "val_loss"):
        steps = steps_of(lines, key)
        assert steps == sorted(set(steps)) and set(steps) <= set(steps_of(wanted, key))
        assert [step for step in steps_of(wanted, key) if step > STANDS] == [step for step in steps if step > STANDS]


@pytest.mark.parametrize("what", GARBLED)
@pytest.mark.parametrize("name", ["samples.txt", "attention/000004.safetensors", "attention/eval_texts.json"])
def test_damage_to_what_is_only_looked_at_costs_no_step(
    name: str, what: str, server: ForkServer, reference: Reference, run: Path
) -> None:
    """Up to the last picture and the page: the run ends well, and says what it could not read."""
    GARBLED[what](run / name)
    done = server.run(f"--run.resume={run}", "--run.stop_at_step=0")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert reference.same_weights(run)
    told = ["loss", "val_loss", "final_val_loss"]  # where a sample ends depends on those before it
    assert [kept(line, told) for line in numbers(run)] == [kept(line, told) for line in numbers(reference.run)]


def kept(line: tuple[Any, ...], keys: list[str]) -> tuple[Any, ...]:
    """Some of a metrics line, and its step."""
    return tuple((key, value) for key, value in line if key in ("step", *keys))


def test_a_folder_that_is_no_run_is_said_to_be_none(server: ForkServer, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("no folder")
    for name in ("empty", "file", "nowhere"):
        for script, argv in (
            ("train.py", [f"--run.resume={tmp_path / name}"]),
            ("sample.py", [tmp_path / name]),
            ("attend.py", [tmp_path / name]),
        ):
            said(server.run(*argv, script=script), 4)
