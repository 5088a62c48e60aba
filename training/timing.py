"""How long something takes on a machine, to its end."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from training.device import DistContext


def once(work: Callable[[], object], machine: DistContext) -> float:
    """The seconds that something takes on the machine, to its end."""
    settle(machine)
    start = time.perf_counter()
    work()
    settle(machine)
    return time.perf_counter() - start


def median(work: Callable[[], object], machine: DistContext, count: int) -> float:
    """The median time of doing something so often."""
    return statistics.median([once(work, machine) for _ in range(count)])


def settle(machine: DistContext) -> None:
    """Wait until a GPU is done with what it was told."""
    if machine.device.type == "cuda":
        torch.cuda.synchronize(machine.device)
