"""Several processes: asked to stop, killed, frozen, restarted; all of them end together, and what was saved goes on.

Most tests start the processes one by one, as SLURM does (`Ranks`). What torchrun does to them is tested with torchrun.
"""

from __future__ import annotations

import contextlib
import shutil
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
from tests.faults.ranks import SHARED, Ranks, end_within, everyone, free_port, kill, once, together, torchrun
from tests.faults.started import ROOT, Forked, Started, allowed, error_lines, loaded, steps_done, train

SOON = 10.0
"""Seconds within which a job that was asked to stop has saved and ended."""
TIMEOUT = 15
"""`run.dist_timeout` of the tests: seconds after which a process that does not answer is given up."""
AGENT = 30.0
"""Seconds that torchrun grants a process before it kills it."""
SPLIT = pytest.mark.parametrize("sharding", ["none", "fsdp"])


def options(corpus: Path, sharding: str = "none", optimizer: str = "adamw") -> tuple[str, ...]:
    """Of the run that all these tests make."""
    chosen = (f"--train.sharding={sharding}", f"--optim.optimizer={optimizer}")
    return (*SHARED, f"--data.source={corpus}", f"--run.dist_timeout={TIMEOUT}", *chosen)


class Whole:
    """Runs of two processes that nothing disturbed, made when they are asked for; one set for all pytest workers."""

    def __init__(self, server: ForkServer, root: Path) -> None:
        self.server, self.root = server, root
        self.corpus = once(root / "fox.txt", lambda path: void(path.write_text(CORPUS * 4)))

    def run(self, sharding: str = "none", optimizer: str = "adamw") -> Path:
        def make(folder: Path) -> None:
            chosen = options(self.corpus, sharding, optimizer)
            together(self.server, 2, *chosen, f"--run.dir={folder}.partial")
            Path(f"{folder}.partial").rename(folder)

        return once(self.root / f"{sharding}-{optimizer}", make)


def void(_: object) -> None:
    """Nothing."""


@pytest.fixture(scope="session")
def whole(server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    base = tmp_path_factory.getbasetemp()
    return Whole(server, (base.parent if base.name.startswith("popen-") else base) / "shared")


def check_equal(run: Path, reference: Path) -> None:
    """The same bits of weights and moments, and the same story."""
    assert sha(run) == sha(reference) and state(run) == state(reference)
    assert numbers(run) == numbers(reference)
    assert (run / "samples.txt").read_bytes() == (reference / "samples.txt").read_bytes()
    assert not leftovers(run)


def check_near(run: Path, reference: Path) -> None:
    """The same order of tokens: every loss within 1e-5, every other number the same."""
    lines, wanted = ([dict(line) for line in numbers(one)] for one in (run, reference))
    assert [line["step"] for line in lines] == [line["step"] for line in wanted]
    for line, other in zip(lines, wanted, strict=True):
        for name in ("loss", "val_loss", "final_val_loss"):
            assert line.get(name) == pytest.approx(other.get(name), abs=1e-5)
        assert line.get("tokens_seen") == other.get("tokens_seen")


def check_whole(run: Path) -> None:
    """Every checkpoint that has its name is whole."""
    named = [path for path in (run / "checkpoints").iterdir() if path.name.isdecimal()]
    assert len(named) == len(checkpoints(run)) > 0


def one_line(done: Sequence[subprocess.CompletedProcess[str]], *words: str) -> str:
    """The only line of error that all these processes wrote together."""
    text = "\n".join(one.stderr for one in done)
    assert "Traceback" not in text, text
    (said,) = error_lines(text)
    assert all(word in said for word in words), said
    return said


# ---- signals ----


@SPLIT
@pytest.mark.parametrize(
    ("number", "ranks", "world"),
    [
        (signal.SIGTERM, (0, 1), 1),
        (signal.SIGTERM, (1,), 2),
        (signal.SIGINT, (0,), 4),
        (signal.SIGINT, (0, 1), 2),
    ],
    ids=["SIGTERM to all", "SIGTERM to the second", "SIGINT to the first", "SIGINT to all"],
)
def test_all_processes_stop_at_the_same_step(
    sharding: str, number: int, ranks: tuple[int, ...], world: int, server: ForkServer, whole: Whole, tmp_path: Path
) -> None:
    """Whoever is asked, all stop; resumed on 1, 2 or 4 processes the run goes on with the same tokens."""
    run, reference = tmp_path / "run", whole.run(sharding)
    with Ranks(server, 2, *options(whole.corpus, sharding), f"--run.dir={run}") as running:
        running.until(lambda: steps_done(run) >= 7, "the eighth step")
        running.send(number, *ranks)
        done = running.end(within=SOON)
    assert {one.returncode for one in done} == {128 + number}, [one.stderr for one in done]
    assert not error_lines(done[0].stderr + done[1].stderr)
    step = committed(run)
    assert 7 <= step == steps_done(run) < 40
    check_whole(run)
    together(server, world, f"--run.resume={run}")
    (check_equal if world == 2 else check_near)(run, reference)


@pytest.mark.parametrize(
    ("number", "to_all"),
    [(signal.SIGTERM, False), (signal.SIGINT, False), (signal.SIGTERM, True), (signal.SIGINT, True)],
    ids=["SIGTERM", "SIGINT", "SIGTERM to all", "SIGINT to all"],
)
def test_torchrun_is_asked_to_stop(number: int, to_all: bool, server: ForkServer, whole: Whole, tmp_path: Path) -> None:
    """It passes the signal on. That, and the scheduler's own, which comes a moment earlier, are one request."""
    run = tmp_path / "run"
    with torchrun(2, *options(whole.corpus), f"--run.dir={run}") as started:
        started.until(lambda: steps_done(run) >= 7, "the eighth step")
        for pid in everyone(started) if to_all else [started.pid]:
            kill(pid, number)
        done, _ = end_within(started, SOON)
    assert done.returncode == 1, done.stderr  # torchrun's own, whatever its processes ended with
    assert f"--run.resume {run}" in done.stdout and not error_lines(done.stderr)
    assert 7 <= committed(run) == steps_done(run) < 40
    check_whole(run)
    together(server, 2, f"--run.resume={run}")
    check_equal(run, whole.run())


# ---- a process that dies or freezes ----


@SPLIT
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_a_lost_process_ends_the_others(
    number: int, rank: int, sharding: str, server: ForkServer, whole: Whole, tmp_path: Path
) -> None:
    """A death is noticed at once, a freeze after `run.dist_timeout`. One line, exit code 8, and nothing saved is lost."""
    run, reference = tmp_path / "run", whole.run(sharding, "muon")
    timeout = 3 if number == signal.SIGSTOP else TIMEOUT
    argv = (*options(whole.corpus, sharding, "muon"), f"--run.dir={run}", f"--run.dist_timeout={timeout}")
    with Ranks(server, 2, *argv) as running:
        running.until(lambda: steps_done(run) >= 12, "the thirteenth step")
        before = committed(run)
        running.send(number, rank)
        done = running.end(1 - rank, within=SOON + (timeout if number == signal.SIGSTOP else 0))
    assert done[0].returncode == LOST_PROCESS, done[0].stderr
    one_line(done, "--run.resume")
    assert committed(run) >= before >= 10
    check_whole(run)
    together(server, 2, f"--run.resume={run}", f"--run.dist_timeout={TIMEOUT}")
    check_equal(run, reference)


@pytest.mark.parametrize("operation", ["write", "rename"])
def test_the_first_process_is_killed_in_a_save(
    operation: str, server: ForkServer, whole: Whole, tmp_path: Path
) -> None:
    """The others wait for it, and are told."""
    run = tmp_path / "run"
    hooks = {0: Hook(1, "SIGKILL", operation, "000010")}
    with Ranks(server, 2, *options(whole.corpus), f"--run.dir={run}", hooks=hooks) as running:
        (done,) = running.end(1, within=SOON + TIMEOUT)
    assert done.returncode == LOST_PROCESS, done.stderr
    assert committed(run) == 5
    together(server, 2, f"--run.resume={run}")
    check_equal(run, whole.run())


def test_nobody_leaves_before_the_last_save_is_done(server: ForkServer, whole: Whole, tmp_path: Path) -> None:
    """torchrun grants the others 30 s once one has gone: too little for a large model to be saved."""
    run, log = tmp_path / "run", tmp_path / "log"
    hooks = {0: Hook(2, "SIGSTOP", "mkdir", ".writing", log=str(log))}  # the first is that of step 0
    argv = (*options(whole.corpus), f"--run.dir={run}", "--train.save_every=1000")
    with Ranks(server, 2, *argv, hooks=hooks) as running:
        running.until(lambda: steps_done(run) >= 7, "the eighth step")
        running.send(signal.SIGTERM)
        assert running.rank[0].held(), log.read_text()
        assert not running.rank[1].ended(within=2)
        running.send(signal.SIGCONT, 0)
        done = running.end(within=SOON)
    assert {one.returncode for one in done} == {143}
    assert committed(run) == steps_done(run)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_never_starts(rank: int, server: ForkServer, whole: Whole, tmp_path: Path) -> None:
    """The others wait for `run.dist_timeout`, not for ever."""
    run = tmp_path / "run"
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "RANK": str(rank)}
    argv = (*options(whole.corpus), f"--run.dir={run}", "--run.dist_timeout=2")
    done = Forked(server, *argv, env={**env, "LOCAL_RANK": "0"}).end(SOON)
    assert done.returncode == LOST_PROCESS, done.stderr
    one_line([done])
    assert not (run / "config.toml").exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_torchrun_ends_when_a_process_is_lost(number: int, server: ForkServer, whole: Whole, tmp_path: Path) -> None:
    """Within `run.dist_timeout`, and the 30 s after which torchrun kills a process that does not end; nobody is left."""
    run = tmp_path / "run"
    with torchrun(2, *options(whole.corpus), f"--run.dir={run}") as started:
        started.until(lambda: steps_done(run) >= 12, "the thirteenth step")
        kill(started.ranks()[1], number)
        limit = SOON if number == signal.SIGKILL else TIMEOUT + AGENT + SOON
        done, _ = end_within(started, limit)
    assert done.returncode == 1, done.stderr  # torchrun's own
    assert len(error_lines(done.stderr)) <= 1, done.stderr
    if number == signal.SIGSTOP:
        assert f"exitcode  : {LOST_PROCESS} " in done.stderr and "--run.resume" in error_lines(done.stderr)[0]
    assert committed(run) >= 10
    together(server, 2, f"--run.resume={run}")
    check_equal(run, whole.run())


# ---- elastic restart ----


@pytest.mark.parametrize(
    ("named", "rank", "sharding"),
    [(True, 1, "none"), (False, 0, "none"), (False, 1, "fsdp")],
    ids=["run.dir", "the first, no run.dir", "full, no run.dir"],
)
def test_a_job_with_restarts_goes_on_by_itself(
    named: bool, rank: int, sharding: str, whole: Whole, tmp_path: Path
) -> None:
    """From its newest checkpoint, in the same folder, to the same bits."""
    run = tmp_path / "runs" / "quickstart"
    argv = (*options(whole.corpus, sharding), *([f"--run.dir={run}"] if named else []))
    if not named:  # a text of one's own gives its name to the run
        run = tmp_path / "runs" / whole.corpus.stem
    agent = ("--standalone", "--max-restarts=2")
    with torchrun(2, *argv, options=agent, cwd=tmp_path) as started:
        started.until(lambda: steps_done(run) >= 12, "the thirteenth step")
        kill(started.ranks()[rank])
        done = started.end()
        started.nobody_left()
    assert done.returncode == 0, done.stderr
    assert "from step 10 to step 40" in done.stdout or "from step 15 to step 40" in done.stdout, done.stdout
    assert [path.name for path in run.parent.iterdir()] == [run.name]
    check_equal(run, whole.run(sharding))


def test_a_job_with_restarts_loses_a_process_before_its_first_checkpoint(whole: Whole, tmp_path: Path) -> None:
    run = tmp_path / "run"
    agent = ("--standalone", "--max-restarts=2")
    with torchrun(2, *options(whole.corpus), f"--run.dir={run}", options=agent) as started:
        started.until(lambda: 1 in started.ranks() and loaded(started.ranks()[1], "libtorch_cpu"), "torch is loaded")
        assert not (run / "config.toml").exists()
        kill(started.ranks()[1])
        done = started.end()
    assert done.returncode == 0, done.stderr
    check_equal(run, whole.run())


# ---- what is refused ----


@pytest.mark.parametrize(
    ("typed", "answer"), [("--train.stepz=3", "--train.steps"), ("--data.source=/now/here", "/now/here")]
)
def test_what_is_mistyped_is_said_once(typed: str, answer: str, tmp_path: Path) -> None:
    with torchrun(2, typed, f"--run.dir={tmp_path / 'run'}") as started:
        done, _ = end_within(started, 60)
    assert done.returncode == 1
    (said,) = error_lines(done.stderr)
    assert answer in said
    assert not (tmp_path / "run" / "config.toml").exists()


@pytest.mark.parametrize("change", ["--optim.lr=0.001", "--train.save_every=7", "--run.seed=3", "--model.d_model=16"])
def test_processes_with_other_settings_are_refused(
    change: str, server: ForkServer, whole: Whole, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with Ranks(server, 2, *options(whole.corpus), f"--run.dir={run}", own={1: [change]}) as running:
        done = running.end(within=SOON + TIMEOUT)
    assert {one.returncode for one in done} == {CONFIG}, [one.stderr for one in done]
    one_line(done)
    assert not (run / "config.toml").exists()


def test_processes_with_another_text_are_refused(server: ForkServer, whole: Whole, tmp_path: Path) -> None:
    """The same path on another machine, where another file lies."""
    run, how = tmp_path / "run", {}
    for rank, text in enumerate((CORPUS * 4, CORPUS.replace("brown fox", "fox brown") * 4)):
        folder = tmp_path / str(rank)
        folder.mkdir()
        (folder / "fox.txt").write_text(text)
        how[rank] = {"cwd": folder, "env": {"GLASSGPT_CACHE": str(folder / "cache")}}
    argv = (*options(Path("fox.txt")), f"--run.dir={run}")
    with Ranks(server, 2, *argv, how=how) as running:
        done = running.end(within=SOON + TIMEOUT)
    assert {one.returncode for one in done} <= {CONFIG, DATA}, [one.stderr for one in done]
    one_line(done)
    assert not (run / "config.toml").exists()


# ---- two nodes ----


def test_two_nodes_learn_what_one_learns(whole: Whole, tmp_path: Path) -> None:
    """Two agents that find each other by torchrun's own rendezvous, one process each; and they stop together."""
    run = tmp_path / "run"
    agent = ("--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--rdzv-id=both")
    argv = (*options(whole.corpus), f"--run.dir={run}")
    with torchrun(1, *argv, options=agent) as one, torchrun(1, *argv, options=agent) as other:
        done = [node.end() for node in (one, other)]
    assert [node.returncode for node in done] == [0, 0], done[0].stderr + done[1].stderr
    check_equal(run, whole.run())


# ---- one folder, one trainer ----


def fastest_refusal(run: Path, *argv: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """What a second trainer is told, and how soon: the best of three, as the machine is busy."""
    took = []
    for _ in range(3):
        begun = time.monotonic()
        done = subprocess.run(
            [sys.executable, ROOT / "train.py", *argv], cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        took.append(time.monotonic() - begun)
        assert done.returncode == IN_USE, done.stderr
    return done, min(took)


def test_a_second_trainer_is_refused_at_once(server: ForkServer, whole: Whole, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = Forked(server, *options(whole.corpus), "--train.steps=100000", f"--run.dir={run}")
    first.until(lambda: steps_done(run) >= 1, "the first step")
    for argv in ([f"--run.resume={run}"], [*options(whole.corpus), f"--run.dir={run}"]):
        if argv[0].startswith("--run.resume"):
            done, took = fastest_refusal(run, *argv)
            assert took < allowed(2)
            assert f"process {first.pid}" in one_line([done])
    with torchrun(2, f"--run.resume={run}") as second:
        done, _ = end_within(second, 30)
    assert f"process {first.pid}" in one_line([done_lines(done)]) and f"exitcode  : {IN_USE} " in done.stderr
    first.send(signal.SIGTERM)
    assert first.end(SOON).returncode == 143


def done_lines(done: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    """Without the traceback that torchrun itself prints."""
    text = "\n".join(error_lines(done.stderr))
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout, text)


def test_a_trainer_is_refused_while_torchrun_trains(whole: Whole, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with torchrun(2, *options(whole.corpus), "--train.steps=100000", f"--run.dir={run}") as first:
        first.until(lambda: steps_done(run) >= 1, "the first step")
        owner = first.ranks()[0]
        done, took = fastest_refusal(run, f"--run.resume={run}")
        assert took < allowed(2) and f"process {owner}" in one_line([done])
        with torchrun(2, f"--run.resume={run}") as second:
            done, _ = end_within(second, 30)
        assert f"process {owner}" in one_line([done_lines(done)])
        assert first.process.poll() is None


LINGERING = """
import subprocess, sys
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], close_fds=False, start_new_session=True)
class Run:
    def log(self, row, step):
        pass
    def finish(self, exit_code=0):
        pass
def init(**options):
    return Run()
Settings = Html = Image = lambda *words, **options: None
"""
"""A wandb that starts a process of its own, which outlives everybody."""


def test_the_lock_dies_with_its_process(server: ForkServer, whole: Whole, tmp_path: Path) -> None:
    """Killed, with a child of a child still there: the folder is free."""
    run, package = tmp_path / "run", tmp_path / "fake" / "wandb"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(LINGERING)
    argv = (*options(whole.corpus), f"--run.dir={run}", "--log.wandb=online")
    with train(*argv, "--train.steps=100000", env={"PYTHONPATH": str(package.parent)}) as first:
        first.until(lambda: steps_done(run) >= 6 and len(first.living()) >= 3, "a step, and a child of wandb")
        kill(first.pid)
        first.end()
        assert first.living()
        done = server.run(f"--run.resume={run}", "--train.steps=40", "--log.wandb=disabled")
        assert done.returncode == 0, done.stderr


def owner(run: Path) -> int:
    """The process that a run folder's lock names."""
    try:
        return int((run / "lock").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 0


def test_the_lock_dies_with_its_process_while_workers_encode(tmp_path: Path) -> None:
    text, run, cache = tmp_path / "large.txt", tmp_path / "run", tmp_path / "cache"
    text.write_text("".join(f"{k} foxes jumped over {k * k} lazy dogs on day {k % 365}.\n" for k in range(450_000)))
    argv = (*SHARED, "--data.tokenizer=byte", f"--data.source={text}", f"--run.dir={run}", "--data.workers=2")
    env = {"GLASSGPT_CACHE": str(cache)}

    def command(pid: int) -> bytes:
        with contextlib.suppress(OSError):
            return Path(f"/proc/{pid}/cmdline").read_bytes()
        return b""

    def working(started: Started) -> bool:
        """A worker that has not become a program of its own yet still is its parent, lock and all."""
        own = [pid for pid in started.living() if command(pid) not in (b"", command(started.pid))]
        return len(own) >= 2 and len(own) == len(started.living()) - 1 and owner(run) == started.pid

    with train(*argv, env=env) as first:
        first.until(lambda: working(first), "workers encode")
        workers = [pid for pid in first.living() if pid != first.pid]
        for pid in workers:
            kill(pid, signal.SIGSTOP)  # so that it is certain that they outlive it
        kill(first.pid)
        first.end()
        assert set(workers) & set(first.living())
        with train(*argv, env=env) as second:
            second.until(lambda: working(second), "the second one has the lock, and encodes")
            second.send(signal.SIGTERM)
            assert second.end(SOON).returncode == 143
        for pid in workers:
            kill(pid, signal.SIGCONT)
        first.nobody_left()
    shutil.rmtree(cache)
