"""A hundred kills at random moments, and one at each file operation of a run: what is resumed ends the same.

A moment is chosen by the CPU time that the process has used, which is the same on a busy machine. Each chain (start,
SIGKILL, resume, SIGKILL, ... until the run is complete) has a cache of its own, so that preparing data is interrupted too.
"""

from __future__ import annotations

import math
import random
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.faults.forkserver import ForkServer
from tests.faults.harness import FAULTY, Reference, committed
from tests.faults.hook import Hook
from tests.faults.started import KILLED
from tests.faults.strace import calls, require_strace, under_strace

KILLS = 50
LONGER = ("--train.steps=60", "--train.eval_every=6", "--train.save_every=4", "--optim.decay_fraction=0.3")
SHORT = 4


def resume_or_start(run: Path, options: Sequence[str]) -> list[str]:
    """A folder without config.toml is not a run: the same command starts it again."""
    if (run / "config.toml").is_file():
        return [f"--run.resume={run}", *(option for option in options if option.startswith("--run.stop_at_step"))]
    return [*options, f"--run.dir={run}"]


def cpu_seconds(pid: int) -> float:
    """CPU time of a process."""
    try:
        return time.clock_gettime((~pid << 3) | 2)  # clock_getcpuclockid(3)
    except OSError:
        return math.inf


class Chain:
    """A run that is killed and resumed until it is complete. `length`: CPU seconds of a whole run."""

    def __init__(self, server: ForkServer, whole: Reference, folder: Path, length: float = 60) -> None:
        self.server, self.whole = server, whole
        self.run, self.cache = folder / "run", folder / "cache"
        self.newest, self.starts, self.kills = -1, 0, 0
        self.length, self.used = length, 0.0

    def start(self, share: float) -> bool:
        """Start or resume, kill after that share of a whole run's CPU time; True once the run is complete."""
        self.starts += 1
        argv = resume_or_start(self.run, self.whole.argv)
        child = self.server.start(*argv, env={"GLASSGPT_CACHE": str(self.cache)})
        code = None
        while code is None and (used := cpu_seconds(child.pid)) < share * self.length:
            self.used, code = used, child.poll(0.001)
        if code is None:
            child.send(signal.SIGKILL)
            code = child.end().returncode
            self.kills += code == KILLED
        assert code in (0, KILLED), child.err.read_text()
        now = committed(self.run)
        assert now >= self.newest, "a saved step was lost"
        self.newest = now
        return code == 0


@pytest.fixture(scope="module")
def longer(server: ForkServer, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    options = (*FAULTY, *LONGER, f"--data.source={corpus}")
    return Reference.make(server, tmp_path_factory.mktemp("longer") / "run", options)


@pytest.mark.parametrize("seed", [1, 2])
def test_fifty_random_kills(seed: int, server: ForkServer, longer: Reference, tmp_path: Path) -> None:
    draw = random.Random(seed)
    uninterrupted = Chain(server, longer, tmp_path / "uninterrupted")
    assert uninterrupted.start(1)
    kills = runs = 0
    while kills < KILLS:
        runs += 1
        chain = Chain(server, longer, tmp_path / str(runs), uninterrupted.used)
        # Killed early and often at first, then later and later: from the first files to the last picture.
        share = draw.choice((0.2, 0.5, 1.0))
        while not chain.start(draw.uniform(0, share + chain.starts / 15) if kills + chain.kills < KILLS else 9):
            assert chain.starts < 60, "the run makes no progress"
        longer.check(chain.run)
        kills += chain.kills
        shutil.rmtree(tmp_path / str(runs))


@pytest.fixture(scope="module")
def short(server: ForkServer, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Two saves and an evaluation, without the report at the end."""
    options = (*FAULTY, f"--run.stop_at_step={SHORT}", f"--data.source={corpus}")
    return Reference.make(server, tmp_path_factory.mktemp("short") / "run", options)


@pytest.mark.parametrize("part", range(2))
def test_killed_before_each_file_operation_of_a_new_run(
    part: int, server: ForkServer, short: Reference, tmp_path: Path
) -> None:
    """Whatever is opened for writing, renamed or removed; saves of checkpoints are in test_saves.py."""
    log, run = tmp_path / "log", tmp_path / "run"

    def start(hook: Hook | None) -> int:
        return server.run(*resume_or_start(run, short.argv), hook=hook).returncode

    assert start(Hook(under=str(run), log=str(log))) == 0
    operations = log.read_text().splitlines()
    assert len(operations) > 20
    for at in range(1 + part, len(operations) + 1, 2):
        if f"{run}/checkpoints/" in operations[at - 1]:
            continue
        shutil.rmtree(run)
        assert start(Hook(under=str(run), at=at)) == KILLED, operations[at - 1]
        assert start(None) == 0, operations[at - 1]
        short.check(run)


@pytest.mark.parametrize("part", range(2))
def test_killed_at_each_system_call_of_a_new_run(
    part: int, server: ForkServer, short: Reference, tmp_path: Path
) -> None:
    require_strace()
    log, run = tmp_path / "log", tmp_path / "run"

    def start(*options: str) -> tuple[int, int]:
        child = server.start(*resume_or_start(run, short.argv), hook=Hook(under=str(run), at=1, do="SIGSTOP"))
        return under_strace(child, log, options).returncode, child.pid

    code, pid = start()
    assert code == 0
    found = [call for call in calls(log, run, pid) if call.changes and call.thread == "main"]
    targets = [call for call in found if not call.paths[0].startswith(str(run / "checkpoints"))][part::2]
    assert len(targets) > 10
    for call in targets:
        shutil.rmtree(run)
        code, _ = start(*call.as_nth("signal=KILL"))
        assert code == KILLED, call.text
        assert server.run(*resume_or_start(run, short.argv)).returncode == 0, call.text
        short.check(run)
