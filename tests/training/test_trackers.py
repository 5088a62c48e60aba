"""wandb: what is sent there arrives, and nothing that it does touches training."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.runs import ROOT, TINY, script
from training.config import LogConfig, RunConfig
from training.trackers import Tracker

OFFLINE = dataclasses.replace(RunConfig(), log=LogConfig(wandb="offline"))
FAKE = """
import atexit, sys, time
TROUBLE, MOMENT = {trouble!r}, {moment!r}

def at(moment):
    if moment == MOMENT:
        print("\\x1b]0;noise\\x07", flush=True)
        if TROUBLE == "raises":
            raise ConnectionError("nobody\\x1b[2J answers\\nthere")
        while True:
            time.sleep(100)

class Run:
    def log(self, row, step):
        at("log")
    def finish(self, exit_code):
        at("finish")

def init(**options):
    at("init")
    return Run()

Settings = dict
atexit.register(at, "exit")
at("import")
"""
"""A wandb that does something bad at a certain moment."""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that puts a bad wandb in the place of the real one."""

    def make(trouble: str, moment: str) -> None:
        package = tmp_path / "fake" / "wandb"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(FAKE.format(trouble=trouble, moment=moment))
        monkeypatch.setenv("PYTHONPATH", str(package.parent))

    return make


@pytest.mark.parametrize("moment", ["import", "init", "log", "finish"])
def test_a_wandb_that_raises_is_one_line(
    moment: str, fake: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake("raises", moment)
    tracker = Tracker(OFFLINE, tmp_path, "name", visible=True)
    tracker.log(1, {"loss": 1.0})
    tracker.close()
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith("wandb is out (ConnectionError: nobody\\x1b[2J answers)")
    tracker.log(2, {"loss": 1.0})
    tracker.close()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("moment", ["import", "init", "log", "finish", "exit"])
def test_a_wandb_that_hangs_is_left_behind(
    moment: str, fake: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake("hangs", moment)
    tracker = Tracker(OFFLINE, tmp_path, "name", visible=True, patience=1.0, silence=0.8, room=100_000)
    process, start = tracker.process, time.monotonic()
    assert process is not None
    for step in range(2_000):
        tracker.log(step, {"loss": 1.0, "words": "what does not fit into the pipe either " * 3})
    assert time.monotonic() - start < 3
    tracker.close()
    assert time.monotonic() - start < 20
    assert process.poll() is not None
    crowded, *rest = [*capsys.readouterr().err.splitlines(), ""]
    if moment == "exit":  # all had been sent by then
        assert rest == [] or crowded == "wandb does not keep up; some lines are not sent"
    elif moment == "finish":
        assert "no answer within 1 s" in crowded + rest[0]
    else:
        assert crowded == "wandb does not keep up; some lines are not sent"
        assert len(rest) == 2 and rest[0].startswith("wandb is out (no answer within 1 s)")


def test_a_trainer_that_is_killed_leaves_no_wandb_behind(fake: Any, tmp_path: Path) -> None:
    fake("hangs", "log")
    program = (
        "import os, sys, time\nfrom pathlib import Path\nfrom tests.training.test_trackers import OFFLINE, Tracker\n"
        "tracker = Tracker(OFFLINE, Path(sys.argv[1]), 'name', visible=True, patience=1.0)\n"
        "tracker.log(1, {})\nprint(tracker.process.pid, flush=True)\ntime.sleep(0.5)\nos.kill(os.getpid(), 9)"
    )
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ['PYTHONPATH']}"}
    killed = subprocess.run([sys.executable, "-c", program, tmp_path], env=env, capture_output=True, text=True)
    left = Path("/proc", killed.stdout.strip(), "cmdline")
    assert killed.returncode == -9, killed.stderr
    deadline = time.monotonic() + 20
    while left.is_file() and left.read_bytes():  # what nobody waits for any more has no command line
        assert time.monotonic() < deadline, "it lives on"
        time.sleep(0.1)


def test_a_run_that_was_resumed_goes_on_there(tmp_path: Path) -> None:
    """Offline: two folders of one id, which `wandb sync` takes for parts of one run. Pictures are read when logged."""
    picture = tmp_path / "map.png"
    config = dataclasses.replace(OFFLINE, run=dataclasses.replace(OFFLINE.run, seed=7))
    for part in (1, 2):
        tracker = Tracker(config, tmp_path, "a name", visible=True)
        assert tracker.process is not None
        picture.write_bytes(png(part))
        tracker.log(part, {"loss": 1 / part, "bad": float("nan")}, sample="<b>&</b>", image=picture)
        picture.write_bytes(b"something else")
        begun = tracker.heard
        while tracker.heard == begun:  # it starts up
            time.sleep(0.01)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # as a terminal or a cluster sends to all at once
            os.kill(tracker.process.pid, number)
        tracker.close()
    paths = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len(paths) == 2 and len({path.name for path in paths}) == 1
    for part, path in enumerate(paths, 1):
        values = history(path)
        assert float(values["loss"]) == 1 / part and values["_step"] == str(part) and values["bad"] == "NaN"
        (shown,) = path.parent.glob("files/media/html/sample*.html")
        assert "&lt;b&gt;&amp;&lt;/b&gt;" in shown.read_text()
        (kept,) = path.parent.glob("files/media/images/pictures/map*.png")
        assert kept.read_bytes() == png(part)
        (run,) = (record.run for record in records(path) if record.run.run_id)
        assert (run.display_name, run.project) == ("a name", "glassgpt")
        settings = {item.key: json.loads(item.value_json) for item in run.config.update}
        assert settings["run"]["seed"] == 7 and {"model", "optim", "train"} <= set(settings)
    assert records_say_success(paths[0])


@pytest.mark.slow
def test_a_whole_run_arrives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fox.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    folder = tmp_path / "run"
    done = script("train.py", *TINY, f"--data.source={tmp_path}/fox.txt", f"--run.dir={folder}", "--log.wandb=offline")
    assert done.returncode == 0 and "wandb" not in done.stderr, done.stderr
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    items = [item for record in records(path) for item in record.history.item]
    keys = [item.key or item.nested_key[0] for item in items]
    assert {"loss", "val_loss", "sample", "pictures/attention", "pictures/loss", "final_val_loss"} <= set(keys)
    losses = [json.loads(item.value_json) for item, key in zip(items, keys, strict=True) if key == "loss"]
    assert len(losses) == 6 and all(isinstance(loss, float) for loss in losses)  # no picture took the name
    listed = subprocess.run(
        [sys.executable, "-m", "wandb", "sync", "--dry-run", path.parent],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "Would sync 1 run" in listed.stdout + listed.stderr


def test_nothing_is_started_unless_it_is_asked_for(tmp_path: Path) -> None:
    for config, visible in ((RunConfig(), True), (OFFLINE, False)):
        tracker = Tracker(config, tmp_path, "name", visible)
        tracker.log(1, {"loss": 1.0}, image=tmp_path / "none.png")
        tracker.close()
        assert tracker.process is None and not list(tmp_path.iterdir())


@pytest.mark.parametrize("kept", [b"../../etc", b"\xff\xfe", b""])
def test_an_id_that_is_none_is_not_believed(kept: bytes, tmp_path: Path) -> None:
    from training.trackers import run_id

    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "run-id.txt").write_bytes(kept)
    fresh = run_id(tmp_path)
    assert len(fresh) == 8 and run_id(tmp_path) == fresh


def png(size: int) -> bytes:
    """A small picture."""
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (size, size)).save(file, "png")
    return file.getvalue()


def history(path: Path) -> dict[str, str]:
    """What a `.wandb` file holds of its steps: JSON by name."""
    items = [item for record in records(path) for item in record.history.item]
    return {item.key or "/".join(item.nested_key): item.value_json for item in items}


def records_say_success(path: Path) -> bool:
    """Whether the run was ended with exit code 0."""
    return [record.exit.exit_code for record in records(path) if record.HasField("exit")] == [0]


def records(path: Path) -> Iterator[Any]:
    """The records of a `.wandb` file, by wandb's own definitions.

    It is a LevelDB log: behind 7 bytes, blocks of 32 KiB; each piece has a checksum (4 bytes), its length (2) and its
    kind (1: whole, 2 to 4: first, middle, last).
    """
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, pieces = path.read_bytes(), 7, b""
    assert data.startswith(b":W&B")
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:  # no piece begins in the last bytes of a block
            position += 32768 - position % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        pieces += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(pieces)
            yield record
            pieces = b""
