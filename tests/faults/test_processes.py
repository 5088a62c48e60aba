"""Several processes: stopped, killed, frozen, restarted, refused. They end together, and every checkpoint can be resumed.

Most tests start the processes one by one, as SLURM does; the rest start torchrun.
"""

import functools
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from common.errors import CONFIG, DATA, IN_USE, LOST_PROCESS
from tests.faults.harness import CORPUS, FAULTY, Reference, checkpoints, committed, named, numbers, steps_done
from tests.faults.processes import Running, environment, kill, launch, living, nobody_left, start
from tests.runs import ROOT, free_port

SOON = 10.0
"""Seconds in which a job that was asked to stop must save and end."""
TIMEOUT = 15
"""`run.dist_timeout` of the tests."""
AGENT_TIMEOUT = 30.0
"""Seconds after which torchrun kills a process that does not end."""
KILLED, FROZEN = signal.SIGKILL, signal.SIGSTOP
EACH_SHARDING = pytest.mark.parametrize("sharding", ["none", "fsdp"])
SHARED = (
    *(*FAULTY, "--model.dropout=0", "--optim.optimizer=adamw", "--train.batch_size=32", "--train.micro_batch_size=1"),
    *("--train.steps=40", "--train.eval_every=20", "--train.save_every=5", "--train.keep_checkpoints=3"),
    f"--run.dist_timeout={TIMEOUT}",
)
"""A run with steps long enough to be interrupted. AdamW, because Muon rounds to bf16, which enlarges differences in the
last digits between different numbers of processes."""
References = Callable[[str], Reference]


def environments(world_size: int) -> list[dict[str, str]]:
    """What each process of a run finds in its environment."""
    job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world_size)}
    return [{**job, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]


def start_ranks(world_size: int, *argv: object) -> list[Running]:
    """The processes of a run, started one by one as SLURM does."""
    return [start(*argv, env=env) for env in environments(world_size)]


def run_ranks(world_size: int, *argv: object) -> None:
    """Train to the end with so many processes."""
    done = [rank.end() for rank in start_ranks(world_size, *argv)]
    assert [one.returncode for one in done] == [0] * world_size, "\n".join(one.stderr for one in done)


def torchrun(processes: int, *argv: object, options: tuple[str, ...] = ("--standalone",), cwd: Path = ROOT) -> Running:
    """`torchrun --standalone --nproc_per_node=N train.py ...`"""
    agent = (sys.executable, "-m", "torch.distributed.run", *options, f"--nproc_per_node={processes}")
    return launch(*agent, ROOT / "train.py", *argv, cwd=cwd)


def torchrun_ranks() -> dict[int, int]:
    """The processes of the only torchrun, by rank."""
    return {int(environment(pid)["RANK"]): pid for pid in living() if "RANK" in environment(pid)}


def end_within(started: Running, seconds: float) -> subprocess.CompletedProcess[str]:
    """Wait for a torchrun, which must leave no process."""
    done = started.end(seconds)
    nobody_left(5)
    return done


@pytest.fixture(scope="session")
def references(tmp_path_factory: pytest.TempPathFactory) -> References:
    """Uninterrupted runs of two processes with some sharding."""
    folder = tmp_path_factory.mktemp("two processes")
    (folder / "fox.txt").write_text(CORPUS * 4)

    @functools.cache
    def make(sharding: str) -> Reference:
        argv = (*SHARED, f"--data.source={folder / 'fox.txt'}", f"--train.sharding={sharding}")
        run_ranks(2, *argv, f"--run.dir={folder / sharding}")
        return Reference(folder / sharding, argv)

    return make


def check_near(run: Path, reference: Path) -> None:
    """Every loss within 1e-5: the same batches in another number of processes."""
    for a, b in zip(numbers(run), numbers(reference), strict=True):
        assert a["step"] == b["step"] and a.get("tokens_seen") == b.get("tokens_seen")
        for name in ("loss", "val_loss", "final_val_loss"):
            assert a.get(name) == pytest.approx(b.get(name), abs=1e-5)


def resume_and_check(run: Path, reference: Reference, world_size: int = 2) -> None:
    """Every checkpoint is complete, and the resumed run ends as if nothing had happened."""
    assert checkpoints(run) == named(run)
    run_ranks(world_size, f"--run.resume={run}", f"--run.dist_timeout={TIMEOUT}")
    if world_size == 2:
        reference.check(run)
    else:
        check_near(run, reference.run)


def error_lines(*done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for one in done for line in one.stderr.splitlines() if line.startswith("error: ")]


def one_error(*done: subprocess.CompletedProcess[str]) -> str:
    """The only error line of all these processes together."""
    (line,) = error_lines(*done)
    return line


@EACH_SHARDING
@pytest.mark.parametrize(
    ("number", "ranks", "world_size"),
    [(signal.SIGTERM, (0, 1), 1), (signal.SIGTERM, (1,), 2), (signal.SIGINT, (0,), 4)],
    ids=["SIGTERM to all", "SIGTERM to rank 1", "SIGINT to rank 0"],
)
def test_all_processes_stop_at_the_same_step(
    sharding: str, number: int, ranks: tuple[int, ...], world_size: int, references: References,
    run: Path,
) -> None:  # fmt: skip
    """Whichever rank gets the signal; the run can be resumed on 1, 2 or 4 processes."""
    reference = references(sharding)
    running = start_ranks(2, *reference.argv, f"--run.dir={run}")
    running[0].until(lambda: steps_done(run) >= 7, "the eighth step")
    for rank in ranks:
        running[rank].send(number)
    done = [rank.end(SOON) for rank in running]
    assert {one.returncode for one in done} == {128 + number}, [one.stderr for one in done]
    assert not error_lines(*done)
    assert 7 <= committed(run) == steps_done(run) < 40
    resume_and_check(run, reference, world_size)


@EACH_SHARDING
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("number", [KILLED, FROZEN], ids=["killed", "frozen"])
def test_a_lost_process_ends_the_others(
    number: int, rank: int, sharding: str, references: References, run: Path
) -> None:
    """With one line and exit code 8: at once after a death, after `run.dist_timeout` if it is frozen."""
    reference, timeout = references(sharding), 3 if number == FROZEN else TIMEOUT
    running = start_ranks(2, *reference.argv, f"--run.dir={run}", f"--run.dist_timeout={timeout}")
    running[0].until(lambda: steps_done(run) >= 12, "the thirteenth step")
    before = committed(run)
    running[rank].send(number)
    done = running[1 - rank].end(SOON + (timeout if number == FROZEN else 0))
    running[rank].send(KILLED)
    running[rank].end()
    assert done.returncode == LOST_PROCESS and "--run.resume" in one_error(done)
    assert committed(run) >= before >= 10
    resume_and_check(run, reference)


@pytest.mark.parametrize("number", [signal.SIGTERM, KILLED, FROZEN], ids=["stopped", "killed", "frozen"])
def test_torchrun_ends_with_its_processes(number: int, references: References, run: Path) -> None:
    """A scheduler's SIGTERM to every process and torchrun's own count as one; a lost process ends the job."""
    started = torchrun(2, *references("none").argv, f"--run.dir={run}")
    started.until(lambda: steps_done(run) >= 12, "the thirteenth step")
    for pid in [started.pid, *torchrun_ranks().values()] if number == signal.SIGTERM else [torchrun_ranks()[1]]:
        kill(pid, number)
    done = end_within(started, SOON + (TIMEOUT + AGENT_TIMEOUT if number == FROZEN else 0))
    assert done.returncode == 1, done.stderr  # torchrun's own
    if number == signal.SIGTERM:
        assert f"--run.resume {run}" in done.stdout and not error_lines(done)
        assert committed(run) == steps_done(run)
    elif number == FROZEN:
        assert f"exitcode  : {LOST_PROCESS} " in done.stderr and "--run.resume" in one_error(done)
    assert committed(run) >= 10
    resume_and_check(run, references("none"))


@EACH_SHARDING
def test_processes_stop_once_torchrun_is_killed(sharding: str, references: References, run: Path) -> None:
    """They save, as after SIGTERM, and the run can be resumed."""
    started = torchrun(2, *references(sharding).argv, f"--run.dir={run}")
    started.until(lambda: steps_done(run) >= 12, "the thirteenth step")
    started.send(KILLED)
    started.end(SOON)
    nobody_left(SOON)
    assert 12 <= committed(run) == steps_done(run) < 40
    resume_and_check(run, references(sharding))


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
    started = torchrun(2, *argv, options=("--standalone", "--max-restarts=2"), cwd=tmp_path)
    started.until(lambda: steps_done(run) >= 12, "the thirteenth step")
    kill(torchrun_ranks()[rank])
    done = end_within(started, 120)
    assert done.returncode == 0, done.stderr
    assert "from step 10 to step 40" in done.stdout or "from step 15 to step 40" in done.stdout, done.stdout
    assert [path.name for path in run.parent.iterdir()] == [run.name]
    references(sharding).check(run)


def test_two_nodes_train_like_one(references: References, run: Path) -> None:
    """Two agents with torchrun's own rendezvous, one process each."""
    agent = ("--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--rdzv-id=both")
    argv = (*references("none").argv, f"--run.dir={run}")
    done = [node.end() for node in [torchrun(1, *argv, options=agent) for _ in range(2)]]
    assert [node.returncode for node in done] == [0, 0], done[0].stderr + done[1].stderr
    references("none").check(run)


@pytest.mark.parametrize(
    ("argument", "answer"), [("--train.stepz=3", "--train.steps"), ("--data.source=/now/here", "/now/here")]
)
def test_config_error_is_reported_once_across_ranks(argument: str, answer: str, run: Path) -> None:
    done = end_within(torchrun(2, argument, f"--run.dir={run}"), 60)
    assert done.returncode == 1 and answer in one_error(done)
    assert not (run / "config.toml").exists()


@pytest.mark.parametrize("different", ["--optim.lr=0.001", "--run.seed=3", "text"])
def test_ranks_that_differ_are_refused(different: str, run: Path, tmp_path: Path) -> None:
    ranks = []
    for rank, env in enumerate(environments(2)):
        folder = tmp_path / str(rank)
        folder.mkdir()
        argv = [*SHARED, "--data.source=fox.txt", f"--run.dir={run}"]
        text = CORPUS * 4
        if rank and different == "text":  # the same path has another content on another machine
            text = text.replace("brown fox", "fox brown")
        elif rank:
            argv.append(different)
        (folder / "fox.txt").write_text(text)
        ranks.append(start(*argv, cwd=folder, env={**env, "GLASSGPT_CACHE": str(folder / "cache")}))
    done = [rank.end(SOON + TIMEOUT) for rank in ranks]
    assert {one.returncode for one in done} <= {CONFIG, DATA}, [one.stderr for one in done]
    assert one_error(*done) and not (run / "config.toml").exists()


def test_a_second_job_is_refused(references: References, run: Path) -> None:
    """It names the process that has the folder."""
    first = start(*references("none").argv, "--train.steps=100000", f"--run.dir={run}")
    first.until(lambda: steps_done(run) >= 1, "the first step")
    done = end_within(torchrun(2, f"--run.resume={run}"), 30)
    assert f"process {first.pid}" in one_error(done) and f"exitcode  : {IN_USE} " in done.stderr
    first.send(signal.SIGTERM)
    assert first.end(SOON).returncode == 143
