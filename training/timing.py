"""How long something takes on a machine, to its end."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from training.device import DistContext


def once(work: Callable[[], object], ctx: DistContext) -> float:
    """The seconds that something takes on the machine, to its end."""
    settle(ctx)
    start = time.perf_counter()
    work()
    settle(ctx)
    return time.perf_counter() - start


def median(work: Callable[[], object], ctx: DistContext, count: int) -> float:
    """The median time of doing something so often."""
    return statistics.median([once(work, ctx) for _ in range(count)])


def settle(ctx: DistContext) -> None:
    """Wait until a GPU is done with what it was told."""
    if ctx.device.type == "cuda":
        torch.cuda.synchronize(ctx.device)
