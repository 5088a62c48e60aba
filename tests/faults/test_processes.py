"""Several processes: stopped, killed, frozen, restarted, refused. They end together, and every checkpoint can be resumed.

Most tests start the processes one by one (`Ranks`), as SLURM does; the rest start torchrun.
"""

import functools
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.errors import CONFIG, DATA, IN_USE, LOST_PROCESS
from tests.faults.forkserver import ForkServer
from tests.faults.harness import CORPUS, Reference, checkpoints, committed, named, numbers
from tests.faults.hook import Hook
from tests.faults.ranks import SHARED, Ranks, end_within, free_port, run_ranks, torchrun
from tests.faults.started import error_lines, kill, steps_done

SOON = 10.0
"""Seconds in which a job that was asked to stop must save and end."""
TIMEOUT = 15
"""`run.dist_timeout` of the tests."""
AGENT_TIMEOUT = 30.0
"""Seconds after which torchrun kills a process that does not end."""
KILLED, FROZEN = signal.SIGKILL, signal.SIGSTOP
EACH_SHARDING = pytest.mark.parametrize("sharding", ["none", "fsdp"])
References = Callable[[str], Reference]


@pytest.fixture(scope="session")
def references(server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> References:
    """Uninterrupted runs of two processes with some sharding."""
    folder = tmp_path_factory.mktemp("two processes")
    (folder / "fox.txt").write_text(CORPUS * 4)

    @functools.cache
    def make(sharding: str) -> Reference:
        argv = (*SHARED, f"--data.source={folder / 'fox.txt'}", f"--run.dist_timeout={TIMEOUT}")
        reference = Reference(server, folder / sharding, (*argv, f"--train.sharding={sharding}"))
        run_ranks(server, 2, *reference.argv, f"--run.dir={reference.run}")
        return reference

    return make


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


def check_near(run: Path, reference: Path) -> None:
    """Every loss within 1e-5: the same batches in another number of processes."""
    lines, expected = ([dict(line) for line in numbers(folder)] for folder in (run, reference))
    for a, b in zip(lines, expected, strict=True):
        assert a["step"] == b["step"] and a.get("tokens_seen") == b.get("tokens_seen")
        for name in ("loss", "val_loss", "final_val_loss"):
            assert a.get(name) == pytest.approx(b.get(name), abs=1e-5)


def resume_and_check(server: ForkServer, run: Path, reference: Reference, world_size: int = 2) -> None:
    """Every checkpoint is complete, and the resumed run ends as if nothing had happened."""
    assert checkpoints(run) == named(run)
    run_ranks(server, world_size, f"--run.resume={run}", f"--run.dist_timeout={TIMEOUT}")
    if world_size == 2:
        reference.check(run)
    else:
        check_near(run, reference.run)


def one_error(*done: subprocess.CompletedProcess[str]) -> str:
    """The only error line of all these processes together."""
    (line,) = error_lines("\n".join(one.stderr for one in done))
    return line


@EACH_SHARDING
@pytest.mark.parametrize(
    ("number", "ranks", "world_size"),
    [(signal.SIGTERM, (0, 1), 1), (signal.SIGTERM, (1,), 2), (signal.SIGINT, (0,), 4)],
    ids=["SIGTERM to all", "SIGTERM to rank 1", "SIGINT to rank 0"],
)
def test_all_processes_stop_at_the_same_step(
    sharding: str, number: int, ranks: tuple[int, ...], world_size: int, server: ForkServer, references: References,
    run: Path,
) -> None:  # fmt: skip
    """Whichever rank gets the signal; the run can be resumed on 1, 2 or 4 processes."""
    reference = references(sharding)
    with Ranks(server, 2, *reference.argv, f"--run.dir={run}") as running:
        running.until(lambda: steps_done(run) >= 7, "the eighth step")
        for rank in ranks:
            running.rank[rank].send(number)
        done = running.end(within=SOON)
    assert {one.returncode for one in done} == {128 + number}, [one.stderr for one in done]
    assert not error_lines(done[0].stderr + done[1].stderr)
    assert 7 <= committed(run) == steps_done(run) < 40
    resume_and_check(server, run, reference, world_size)


@EACH_SHARDING
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("number", [KILLED, FROZEN], ids=["killed", "frozen"])
def test_a_lost_process_ends_the_others(
    number: int, rank: int, sharding: str, server: ForkServer, references: References, run: Path
) -> None:
    """With one line and exit code 8: at once after a death, after `run.dist_timeout` if it is frozen."""
    reference, timeout = references(sharding), 3 if number == FROZEN else TIMEOUT
    with Ranks(server, 2, *reference.argv, f"--run.dir={run}", f"--run.dist_timeout={timeout}") as running:
        running.until(lambda: steps_done(run) >= 12, "the thirteenth step")
        before = committed(run)
        running.rank[rank].send(number)
        (done,) = running.end(1 - rank, within=SOON + (timeout if number == FROZEN else 0))
    assert done.returncode == LOST_PROCESS and "--run.resume" in one_error(done)
    assert committed(run) >= before >= 10
    resume_and_check(server, run, reference)


def test_rank_0_is_killed_while_saving(server: ForkServer, references: References, run: Path) -> None:
    own = {0: {"hook": Hook(1, "SIGKILL", "rename", ".writing-000010")}}
    with Ranks(server, 2, *references("none").argv, f"--run.dir={run}", own=own) as running:
        (done,) = running.end(1, within=SOON + TIMEOUT)
    assert done.returncode == LOST_PROCESS and committed(run) == 5, done.stderr
    resume_and_check(server, run, references("none"))


@pytest.mark.parametrize("number", [signal.SIGTERM, KILLED, FROZEN], ids=["stopped", "killed", "frozen"])
def test_torchrun_ends_with_its_processes(number: int, server: ForkServer, references: References, run: Path) -> None:
    """A scheduler's SIGTERM to every process and torchrun's own count as one; a lost process ends the job."""
    with torchrun(2, *references("none").argv, f"--run.dir={run}") as started:
        started.until(lambda: steps_done(run) >= 12, "the thirteenth step")
        for pid in [started.pid, *started.ranks().values()] if number == signal.SIGTERM else [started.ranks()[1]]:
            kill(pid, number)
        done = end_within(started, SOON + (TIMEOUT + AGENT_TIMEOUT if number == FROZEN else 0))
    assert done.returncode == 1, done.stderr  # torchrun's own
    if number == signal.SIGTERM:
        assert f"--run.resume {run}" in done.stdout and not error_lines(done.stderr)
        assert committed(run) == steps_done(run)
    elif number == FROZEN:
        assert f"exitcode  : {LOST_PROCESS} " in done.stderr and "--run.resume" in one_error(done)
    assert committed(run) >= 10
    resume_and_check(server, run, references("none"))


@pytest.mark.parametrize(
    ("has_run_dir", "rank", "sharding"),
    [(True, 1, "none"), (False, 0, "fsdp")],
    ids=["run.dir", "rank 0, fsdp, no run.dir"],
)
def test_a_restarted_job_continues(
    has_run_dir: bool, rank: int, sharding: str, references: References, tmp_path: Path
) -> None:
    """From its newest checkpoint, in the same folder, to the same bits."""
    run = tmp_path / "runs" / ("quickstart" if has_run_dir else "fox")
    argv = (*references(sharding).argv, *([f"--run.dir={run}"] if has_run_dir else []))
    with torchrun(2, *argv, options=("--standalone", "--max-restarts=2"), cwd=tmp_path) as started:
        started.until(lambda: steps_done(run) >= 12, "the thirteenth step")
        kill(started.ranks()[rank])
        done = end_within(started, 120)
    assert done.returncode == 0, done.stderr
    assert "from step 10 to step 40" in done.stdout or "from step 15 to step 40" in done.stdout, done.stdout
    assert [path.name for path in run.parent.iterdir()] == [run.name]
    references(sharding).check(run)


def test_two_nodes_train_like_one(references: References, run: Path) -> None:
    """Two agents with torchrun's own rendezvous, one process each."""
    agent = ("--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--rdzv-id=both")
    argv = (*references("none").argv, f"--run.dir={run}")
    with torchrun(1, *argv, options=agent) as a, torchrun(1, *argv, options=agent) as b:
        done = [node.end() for node in (a, b)]
    assert [node.returncode for node in done] == [0, 0], done[0].stderr + done[1].stderr
    references("none").check(run)


@pytest.mark.parametrize(
    ("argument", "answer"), [("--train.stepz=3", "--train.steps"), ("--data.source=/now/here", "/now/here")]
)
def test_config_error_is_reported_once_across_ranks(argument: str, answer: str, run: Path) -> None:
    with torchrun(2, argument, f"--run.dir={run}") as started:
        done = end_within(started, 60)
    assert done.returncode == 1 and answer in one_error(done)
    assert not (run / "config.toml").exists()


@pytest.mark.parametrize("different", ["learning rate", "seed", "text"])
def test_ranks_that_differ_are_refused(
    different: str, server: ForkServer, references: References, run: Path, tmp_path: Path
) -> None:
    own: dict[int, dict[str, Any]] = {1: {"options": ["--run.seed=3" if different == "seed" else "--optim.lr=0.001"]}}
    argv = [*references("none").argv, f"--run.dir={run}"]
    if different == "text":  # the same path has another content on another machine
        argv += ["--data.source=fox.txt"]
        for rank, text in enumerate((CORPUS * 4, CORPUS.replace("brown fox", "fox brown") * 4)):
            folder = tmp_path / str(rank)
            folder.mkdir()
            (folder / "fox.txt").write_text(text)
            own[rank] = {"cwd": folder, "env": {"GLASSGPT_CACHE": str(folder / "cache")}}
    with Ranks(server, 2, *argv, own=own) as running:
        done = running.end(within=SOON + TIMEOUT)
    assert {one.returncode for one in done} <= {CONFIG, DATA}, [one.stderr for one in done]
    assert one_error(*done) and not (run / "config.toml").exists()


def test_a_second_job_is_refused(server: ForkServer, references: References, run: Path) -> None:
    """It names the process that has the folder."""
    first = server.start(*references("none").argv, "--train.steps=100000", f"--run.dir={run}")
    first.until(lambda: steps_done(run) >= 1, "the first step")
    with torchrun(2, f"--run.resume={run}") as second:
        done = end_within(second, 30)
    assert f"process {first.pid}" in one_error(done) and f"exitcode  : {IN_USE} " in done.stderr
    first.send(signal.SIGTERM)
    assert first.end(SOON).returncode == 143
