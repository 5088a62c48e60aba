"""Several processes: stopped, killed, frozen, restarted, refused. They end together, and every checkpoint can be resumed.

Most tests start the processes one by one (`Ranks`), as SLURM does; the rest start torchrun.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from common.errors import CONFIG, DATA, IN_USE, LOST_PROCESS
from tests.faults.forkserver import ForkServer
from tests.faults.harness import CORPUS, checkpoints, committed, leftovers, numbers, sha, state
from tests.faults.hook import Hook
from tests.faults.ranks import SHARED, Ranks, end_within, free_port, make_once, run_ranks, torchrun
from tests.faults.started import ROOT, allowed, error_lines, kill, steps_done

SOON = 10.0
"""Seconds in which a job that was asked to stop must save and end."""
TIMEOUT = 15
"""`run.dist_timeout` of the tests."""
AGENT_TIMEOUT = 30.0
"""Seconds after which torchrun kills a process that does not end."""
EACH_SHARDING = pytest.mark.parametrize("sharding", ["none", "fsdp"])


def options(corpus: Path, sharding: str = "none", optimizer: str = "adamw") -> tuple[str, ...]:
    """Of the run that all tests make."""
    chosen = (f"--train.sharding={sharding}", f"--optim.optimizer={optimizer}")
    return (*SHARED, f"--data.source={corpus}", f"--run.dist_timeout={TIMEOUT}", *chosen)


def write_corpus(path: Path) -> None:
    path.write_text(CORPUS * 4)


class References:
    """Uninterrupted runs of two processes, made when needed and shared by all pytest workers."""

    def __init__(self, server: ForkServer, root: Path) -> None:
        self.server, self.root = server, root
        self.corpus = make_once(root / "fox.txt", write_corpus)

    def run(self, sharding: str = "none", optimizer: str = "adamw") -> Path:
        def make(folder: Path) -> None:
            argv = options(self.corpus, sharding, optimizer)
            run_ranks(self.server, 2, *argv, f"--run.dir={folder}.partial")
            Path(f"{folder}.partial").rename(folder)

        return make_once(self.root / f"{sharding}-{optimizer}", make)


@pytest.fixture(scope="session")
def references(server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> References:
    base = tmp_path_factory.getbasetemp()
    return References(server, (base.parent if base.name.startswith("popen-") else base) / "shared")


def check_equal(run: Path, reference: Path) -> None:
    """The same bits of weights and optimizer state, and the same metrics."""
    assert sha(run) == sha(reference) and state(run) == state(reference)
    assert numbers(run) == numbers(reference)
    assert (run / "samples.txt").read_bytes() == (reference / "samples.txt").read_bytes()
    assert not leftovers(run)


def check_near(run: Path, reference: Path) -> None:
    """Every loss within 1e-5: the same batches in another number of processes."""
    lines, expected = ([dict(line) for line in numbers(folder)] for folder in (run, reference))
    assert [line["step"] for line in lines] == [line["step"] for line in expected]
    for a, b in zip(lines, expected, strict=True):
        for name in ("loss", "val_loss", "final_val_loss"):
            assert a.get(name) == pytest.approx(b.get(name), abs=1e-5)
        assert a.get("tokens_seen") == b.get("tokens_seen")


def check_complete(run: Path) -> None:
    """Every named checkpoint is complete."""
    named = [path for path in (run / "checkpoints").iterdir() if path.name.isdecimal()]
    assert len(named) == len(checkpoints(run)) > 0


def one_error(done: Sequence[subprocess.CompletedProcess[str]], *words: str) -> str:
    """The only error line of all these processes together."""
    text = "\n".join(one.stderr for one in done)
    assert "Traceback" not in text, text
    (line,) = error_lines(text)
    assert all(word in line for word in words), line
    return line


# ---- signals ----


@EACH_SHARDING
@pytest.mark.parametrize(
    ("number", "ranks", "world_size"),
    [(signal.SIGTERM, (0, 1), 1), (signal.SIGTERM, (1,), 2), (signal.SIGINT, (0,), 4)],
    ids=["SIGTERM to all", "SIGTERM to rank 1", "SIGINT to rank 0"],
)
def test_all_processes_stop_at_the_same_step(
    sharding: str, number: int, ranks: tuple[int, ...], world_size: int, server: ForkServer, references: References,
    tmp_path: Path,
) -> None:  # fmt: skip
    """Whichever rank gets the signal; the run can be resumed on 1, 2 or 4 processes."""
    run, reference = tmp_path / "run", references.run(sharding)
    with Ranks(server, 2, *options(references.corpus, sharding), f"--run.dir={run}") as running:
        running.until(lambda: steps_done(run) >= 7, "the eighth step")
        running.send(number, *ranks)
        done = running.end(within=SOON)
    assert {one.returncode for one in done} == {128 + number}, [one.stderr for one in done]
    assert not error_lines(done[0].stderr + done[1].stderr)
    assert 7 <= committed(run) == steps_done(run) < 40
    check_complete(run)
    run_ranks(server, world_size, f"--run.resume={run}")
    (check_equal if world_size == 2 else check_near)(run, reference)


@pytest.mark.parametrize("to_all", [False, True], ids=["to torchrun", "to all"])
def test_torchrun_passes_signals_on(to_all: bool, server: ForkServer, references: References, tmp_path: Path) -> None:
    """A scheduler's signal to every process and torchrun's own count as one."""
    run = tmp_path / "run"
    with torchrun(2, *options(references.corpus), f"--run.dir={run}") as started:
        started.until(lambda: steps_done(run) >= 7, "the eighth step")
        for pid in [started.pid, *(started.ranks().values() if to_all else ())]:
            kill(pid, signal.SIGTERM)
        done = end_within(started, SOON)
    assert done.returncode == 1, done.stderr  # torchrun's own
    assert f"--run.resume {run}" in done.stdout and not error_lines(done.stderr)
    assert 7 <= committed(run) == steps_done(run) < 40
    check_complete(run)
    run_ranks(server, 2, f"--run.resume={run}")
    check_equal(run, references.run())


# ---- lost processes ----


@EACH_SHARDING
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_a_lost_process_ends_the_others(
    number: int, rank: int, sharding: str, server: ForkServer, references: References, tmp_path: Path
) -> None:
    """With one line and exit code 8: at once after a death, after `run.dist_timeout` if it is frozen."""
    run, reference = tmp_path / "run", references.run(sharding, "muon")
    timeout = 3 if number == signal.SIGSTOP else TIMEOUT
    argv = (*options(references.corpus, sharding, "muon"), f"--run.dir={run}", f"--run.dist_timeout={timeout}")
    with Ranks(server, 2, *argv) as running:
        running.until(lambda: steps_done(run) >= 12, "the thirteenth step")
        before = committed(run)
        running.send(number, rank)
        done = running.end(1 - rank, within=SOON + (timeout if number == signal.SIGSTOP else 0))
    assert done[0].returncode == LOST_PROCESS, done[0].stderr
    one_error(done, "--run.resume")
    assert committed(run) >= before >= 10
    check_complete(run)
    run_ranks(server, 2, f"--run.resume={run}", f"--run.dist_timeout={TIMEOUT}")
    check_equal(run, reference)


def test_rank_0_is_killed_while_saving(server: ForkServer, references: References, tmp_path: Path) -> None:
    run = tmp_path / "run"
    hooks = {0: Hook(1, "SIGKILL", "rename", ".writing-000010")}
    with Ranks(server, 2, *options(references.corpus), f"--run.dir={run}", hooks=hooks) as running:
        (done,) = running.end(1, within=SOON + TIMEOUT)
    assert done.returncode == LOST_PROCESS, done.stderr
    assert committed(run) == 5
    run_ranks(server, 2, f"--run.resume={run}")
    check_equal(run, references.run())


def test_a_process_that_never_starts_is_lost(server: ForkServer, references: References, tmp_path: Path) -> None:
    run = tmp_path / "run"
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "RANK": "0"}
    argv = (*options(references.corpus), f"--run.dir={run}", "--run.dist_timeout=2")
    done = server.start(*argv, env={**env, "LOCAL_RANK": "0"}).end(SOON)
    assert done.returncode == LOST_PROCESS, done.stderr
    one_error([done])
    assert not (run / "config.toml").exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_torchrun_ends_when_a_process_is_lost(
    number: int, server: ForkServer, references: References, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with torchrun(2, *options(references.corpus), f"--run.dir={run}") as started:
        started.until(lambda: steps_done(run) >= 12, "the thirteenth step")
        kill(started.ranks()[1], number)
        done = end_within(started, SOON if number == signal.SIGKILL else TIMEOUT + AGENT_TIMEOUT + SOON)
    assert done.returncode == 1, done.stderr  # torchrun's own
    assert len(error_lines(done.stderr)) <= 1, done.stderr
    if number == signal.SIGSTOP:
        assert f"exitcode  : {LOST_PROCESS} " in done.stderr and "--run.resume" in error_lines(done.stderr)[0]
    assert committed(run) >= 10
    run_ranks(server, 2, f"--run.resume={run}")
    check_equal(run, references.run())


# ---- restarts ----


@pytest.mark.parametrize(
    ("has_run_dir", "rank", "sharding"),
    [(True, 1, "none"), (False, 0, "fsdp")],
    ids=["run.dir", "rank 0, fsdp, no run.dir"],
)
def test_a_restarted_job_continues(
    has_run_dir: bool, rank: int, sharding: str, references: References, tmp_path: Path
) -> None:
    """From its newest checkpoint, in the same folder, to the same bits."""
    run = tmp_path / "runs" / ("quickstart" if has_run_dir else references.corpus.stem)
    argv = (*options(references.corpus, sharding), *([f"--run.dir={run}"] if has_run_dir else []))
    agent = ("--standalone", "--max-restarts=2")
    with torchrun(2, *argv, options=agent, cwd=tmp_path) as started:
        started.until(lambda: steps_done(run) >= 12, "the thirteenth step")
        kill(started.ranks()[rank])
        done = started.end()
        started.nobody_left()
    assert done.returncode == 0, done.stderr
    assert "from step 10 to step 40" in done.stdout or "from step 15 to step 40" in done.stdout, done.stdout
    assert [path.name for path in run.parent.iterdir()] == [run.name]
    check_equal(run, references.run(sharding))


def test_two_nodes_train_like_one(references: References, tmp_path: Path) -> None:
    """Two agents with torchrun's own rendezvous, one process each."""
    run = tmp_path / "run"
    agent = ("--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--rdzv-id=both")
    argv = (*options(references.corpus), f"--run.dir={run}")
    with torchrun(1, *argv, options=agent) as a, torchrun(1, *argv, options=agent) as b:
        done = [node.end() for node in (a, b)]
    assert [node.returncode for node in done] == [0, 0], done[0].stderr + done[1].stderr
    check_equal(run, references.run())


# ---- mistakes ----


@pytest.mark.parametrize(
    ("argument", "answer"), [("--train.stepz=3", "--train.steps"), ("--data.source=/now/here", "/now/here")]
)
def test_config_error_is_reported_once_across_ranks(argument: str, answer: str, tmp_path: Path) -> None:
    with torchrun(2, argument, f"--run.dir={tmp_path / 'run'}") as started:
        done = end_within(started, 60)
    assert done.returncode == 1
    (line,) = error_lines(done.stderr)
    assert answer in line
    assert not (tmp_path / "run" / "config.toml").exists()


@pytest.mark.parametrize("change", ["--optim.lr=0.001", "--run.seed=3"])
def test_ranks_with_different_configs_are_refused(
    change: str, server: ForkServer, references: References, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with Ranks(server, 2, *options(references.corpus), f"--run.dir={run}", own={1: [change]}) as running:
        done = running.end(within=SOON + TIMEOUT)
    assert {one.returncode for one in done} == {CONFIG}, [one.stderr for one in done]
    one_error(done)
    assert not (run / "config.toml").exists()


def test_ranks_with_different_texts_are_refused(server: ForkServer, tmp_path: Path) -> None:
    """The same path has another content on another machine."""
    run, how = tmp_path / "run", {}
    for rank, text in enumerate((CORPUS * 4, CORPUS.replace("brown fox", "fox brown") * 4)):
        folder = tmp_path / str(rank)
        folder.mkdir()
        (folder / "fox.txt").write_text(text)
        how[rank] = {"cwd": folder, "env": {"GLASSGPT_CACHE": str(folder / "cache")}}
    with Ranks(server, 2, *options(Path("fox.txt")), f"--run.dir={run}", how=how) as running:
        done = running.end(within=SOON + TIMEOUT)
    assert {one.returncode for one in done} <= {CONFIG, DATA}, [one.stderr for one in done]
    one_error(done)
    assert not (run / "config.toml").exists()


# ---- one trainer per run folder ----


def check_refused(run: Path, owner: int) -> None:
    """A second trainer names the process that has the folder: alone in 2 s (best of three), and under torchrun."""
    seconds = []
    for _ in range(3):
        start = time.monotonic()
        command = [sys.executable, str(ROOT / "train.py"), f"--run.resume={run}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        seconds.append(time.monotonic() - start)
        assert done.returncode == IN_USE, done.stderr
    assert min(seconds) < allowed(2) and f"process {owner}" in one_error([done])
    with torchrun(2, f"--run.resume={run}") as second:
        done = end_within(second, 30)
    (line,) = error_lines(done.stderr)
    assert f"process {owner}" in line and f"exitcode  : {IN_USE} " in done.stderr


def test_a_second_trainer_is_refused(server: ForkServer, references: References, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = server.start(*options(references.corpus), "--train.steps=100000", f"--run.dir={run}")
    first.until(lambda: steps_done(run) >= 1, "the first step")
    check_refused(run, first.pid)
    first.send(signal.SIGTERM)
    assert first.end(SOON).returncode == 143
