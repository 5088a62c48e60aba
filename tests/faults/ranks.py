"""Several processes of one run: started one by one, as `srun` does, or by torchrun with its agent."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tests.faults.forkserver import ForkServer
from tests.faults.harness import FAULTY
from tests.faults.started import ROOT, Started, allowed

SHARED = (
    *(*FAULTY, "--model.dropout=0", "--optim.optimizer=adamw", "--train.batch_size=32", "--train.micro_batch_size=1"),
    *("--train.steps=40", "--train.eval_every=20", "--train.save_every=5", "--train.keep_checkpoints=3"),
)
"""A run with steps long enough to be interrupted. AdamW, because Muon rounds to bf16, which enlarges differences in the
last digits between different numbers of processes."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Ranks:
    """The processes of one run without an agent; all are killed at the end of a `with` block.

    Args:
        own: `options` of a single rank, and its `hook`, `cwd` and `env`.
    """

    def __init__(
        self, server: ForkServer, world_size: int, *argv: object, own: Mapping[int, Mapping[str, Any]] | None = None
    ) -> None:
        self.rank = []
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world_size)}
        for rank in range(world_size):
            settings = {"options": (), "env": {}, **(own or {}).get(rank, {})}
            words = (*argv, *settings.pop("options"))
            env = {**address, "RANK": str(rank), "LOCAL_RANK": str(rank), **settings.pop("env")}
            self.rank.append(server.start(*words, env=env, **settings))

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *reason: object) -> None:
        for process in self.rank:
            if process.poll() is None:
                process.send(signal.SIGKILL)
                process.poll(10)

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for a condition, named `what` in the error."""
        self.rank[0].until(condition, what)

    def end(self, *ranks: int, within: float = 60) -> list[subprocess.CompletedProcess[str]]:
        """Wait for some ranks, or for all."""
        deadline = time.monotonic() + within
        return [self.rank[k].end(max(1.0, deadline - time.monotonic())) for k in ranks or range(len(self.rank))]


def run_ranks(server: ForkServer, world_size: int, *argv: object) -> None:
    """Train to the end with so many processes."""
    with Ranks(server, world_size, *argv) as running:
        done = running.end(within=120)
    assert [one.returncode for one in done] == [0] * world_size, "\n".join(one.stderr for one in done)


def torchrun(processes: int, *argv: object, options: Sequence[str] = ("--standalone",), **how: Any) -> Started:
    """`torchrun --standalone --nproc_per_node=N train.py ...`"""
    agent = (sys.executable, "-m", "torch.distributed.run", *options, f"--nproc_per_node={processes}")
    return Started(*agent, ROOT / "train.py", *argv, **how)


def end_within(started: Started, seconds: float) -> subprocess.CompletedProcess[str]:
    """Wait for a job, which must leave no process."""
    done = started.end(seconds)
    started.nobody_left(allowed(5))
    return done
