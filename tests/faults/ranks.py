"""Several processes of one run: started one by one, as `srun` does, or by torchrun, with its agent above them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.faults.forkserver import ForkServer
from tests.faults.harness import FAULTY
from tests.faults.hook import Hook
from tests.faults.started import ROOT, Forked, Started, allowed

SHARED = (
    *FAULTY,
    *(
        "--model.dropout=0",
        "--optim.optimizer=adamw",
        "--train.batch_size=32",
        "--train.micro_batch_size=1",
        "--train.steps=40",
    ),
    *("--train.eval_every=20", "--train.save_every=5", "--train.keep_checkpoints=3"),
)
"""A run whose steps take long enough to be met in their midst, by whoever looks into metrics.jsonl. With AdamW: Muon
rounds to bf16, which makes much of the last digits, and in these numbers of processes differ."""


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Ranks:
    """The processes of one run without an agent. Use it in a `with`: nothing survives the body.

    Args:
        world: how many there are.
        hooks: harm that a rank does to itself.
        own: options, or a folder to start in (`cwd`) or an environment (`env`), of single ranks.
    """

    def __init__(
        self,
        server: ForkServer,
        world: int,
        *argv: object,
        hooks: Mapping[int, Hook] | None = None,
        own: Mapping[int, Sequence[str]] | None = None,
        how: Mapping[int, Mapping[str, Any]] | None = None,
    ) -> None:
        self.rank: list[Forked] = []
        places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
        for rank in range(world):
            given = dict((how or {}).get(rank, {}))
            env = {**places, "RANK": str(rank), "LOCAL_RANK": str(rank), **given.pop("env", {})}
            words = (*argv, *(own or {}).get(rank, ()))
            self.rank.append(Forked(server, *words, env=env, hook=(hooks or {}).get(rank), **given))

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for one in self.rank:
            if not one.ended():
                one.send(signal.SIGKILL)
                one.ended(10)

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait until something has come about."""
        self.rank[0].until(condition, what)

    def send(self, number: int, *ranks: int) -> None:
        """Send a signal to some ranks; to all if none is named."""
        for rank in ranks or range(len(self.rank)):
            self.rank[rank].send(number)

    def end(self, *ranks: int, within: float = 60) -> list[subprocess.CompletedProcess[str]]:
        """The end of some ranks, or of all."""
        deadline = time.monotonic() + within
        return [self.rank[k].end(max(1.0, deadline - time.monotonic())) for k in ranks or range(len(self.rank))]


def together(server: ForkServer, world: int, *argv: object) -> subprocess.CompletedProcess[str]:
    """Train with so many processes to the end; the first one's output."""
    with Ranks(server, world, *argv) as running:
        done = running.end(within=120)
    assert [one.returncode for one in done] == [0] * world, "\n".join(one.stderr for one in done)
    return done[0]


def torchrun(processes: int, *argv: object, options: Sequence[str] = (), **how: Any) -> Started:
    """`torchrun --standalone --nproc_per_node=N train.py ...`; `options` take the place of --standalone."""
    agent = (sys.executable, "-m", "torch.distributed.run", *(options or ("--standalone",)))
    return Started(*agent, f"--nproc_per_node={processes}", ROOT / "train.py", *argv, **how)


def everyone(started: Started) -> list[int]:
    """All processes of a torchrun, as a scheduler finds them that signals a whole job."""
    return [started.pid, *started.ranks().values()]


def once(folder: Path, make: Callable[[Path], None]) -> Path:
    """`folder`, made by the first of several pytest workers that asks for it; `make` gets the place to fill."""
    import fcntl

    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            make(folder)
    return folder


def end_within(started: Started, seconds: float) -> tuple[subprocess.CompletedProcess[str], float]:
    """The end of a job that was harmed, which must come within so many seconds; and how many it took."""
    begun = time.monotonic()
    done = started.end(seconds)
    took = time.monotonic() - begun
    started.nobody_left(allowed(5))
    return done, took


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    """Send a process a signal."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
