"""Weights & Biases may raise, hang or be unreachable at any moment: training ends with the same weights, and in time.

What is stated: of a wandb that does not answer the end of a run waits 10 s, and 30 s for one that has begun to send the
last of it (`training/trackers.py`); of one that fails it does not wait.
"""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path

import pytest

from tests.faults.forkserver import ForkServer
from tests.faults.harness import Reference
from tests.faults.started import WORD, Forked, allowed, environment, pids, train
from training.trackers import PATIENCE, SILENCE

SLACK = 8.0
"""Seconds beside the stated ones: starting processes on a machine that is busy with several of these tests."""

FAKE = """
import atexit, time
TROUBLE, MOMENT = {trouble!r}, {moment!r}

def at(moment):
    if moment == MOMENT:
        print("noise\\x1b]0;noise\\x07", flush=True)
        if TROUBLE == "raises":
            raise ConnectionError("nobody answers")
        while True:
            time.sleep(100)

class Run:
    def log(self, row, step):
        at("log")
    def finish(self, exit_code=0):
        at("finish")

def init(**options):
    at("init")
    return Run()

Settings = Html = Image = lambda *words, **options: None
atexit.register(at, "exit")
at("import")
"""

WAITS = {
    ("raises", "import"): 0.0,
    ("raises", "init"): 0.0,
    ("raises", "log"): 0.0,
    ("raises", "finish"): 0.0,
    ("raises", "exit"): 0.0,
    ("hangs", "import"): SILENCE,
    ("hangs", "init"): SILENCE,
    ("hangs", "log"): SILENCE,
    ("hangs", "finish"): PATIENCE,
    ("hangs", "exit"): 2.0,
}
"""What the end of a run may wait for, in seconds."""


def fake(folder: Path, trouble: str, moment: str) -> str:
    """A package `wandb` that does something bad at a certain moment; the folder to import it from."""
    package = folder / "fake" / "wandb"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(FAKE.format(trouble=trouble, moment=moment))
    return str(package.parent)


def living(word: str) -> list[int]:
    """The processes that carry a word in their environment."""
    return [pid for pid in pids() if environment(pid).get(WORD) == word]


def test_whatever_wandb_does_a_run_ends_with_the_same_weights_and_in_time(
    server: ForkServer, reference: Reference, tmp_path: Path
) -> None:
    """All at once, as they mostly wait."""
    assert SILENCE <= 10 and PATIENCE <= 30  # what is promised
    children: dict[tuple[str, str], tuple[Forked, Path]] = {}
    begun = time.monotonic()
    for trouble, moment in WAITS:
        folder = tmp_path / f"{trouble}-{moment}"
        env = {"PYTHONPATH": fake(folder, trouble, moment), WORD: str(folder)}
        argv = (*reference.argv, f"--run.dir={folder / 'run'}", "--log.wandb=online")
        children[trouble, moment] = (Forked(server, *argv, env=env), folder)
    took: dict[tuple[str, str], float] = {}
    ends_at: dict[tuple[str, str], float] = {}
    while len(took) < len(children):
        for case, (child, _) in children.items():
            if case not in ends_at and "No head passes" in child.said():
                ends_at[case] = time.monotonic()  # training and report are over: what follows is waiting for wandb
            if case not in took and child.ended():
                took[case] = time.monotonic() - ends_at.get(case, begun)
        assert time.monotonic() - begun < allowed(240), set(children) - set(took)
        time.sleep(0.02)
    for case, (child, folder) in children.items():
        done = child.end()
        said = [line for line in done.stderr.splitlines() if line.strip()]
        assert done.returncode == 0, (case, done.stderr)
        reference.check(folder / "run")
        assert took[case] < WAITS[case] + allowed(SLACK), (case, took)
        wanted = 0 if case[1] == "exit" else 1
        assert len(said) == wanted and all(line.startswith("wandb is out (") for line in said), (case, done.stderr)
        assert "\x1b" not in done.stdout + done.stderr
        assert not living(str(folder)), case


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_a_server_that_cannot_be_reached(reference: Reference, tmp_path: Path) -> None:
    """The real wandb, which tries for a long time; the run waits for it no longer than is stated."""
    run = tmp_path / "run"
    env = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0123456789" * 4, "HOME": str(tmp_path)}
    with train(*reference.argv, f"--run.dir={run}", "--log.wandb=online", env=env) as started:
        started.until(lambda: "No head passes" in started.out.read_text(), "the report")
        begun = time.monotonic()
        done = started.end(60)
        took = time.monotonic() - begun
        started.nobody_left()
    assert done.returncode == 0, done.stderr
    reference.check(run)
    assert took < SILENCE + allowed(SLACK)
    (said,) = (line for line in done.stderr.splitlines() if line.strip())
    assert said.startswith("wandb is out (")
