"""Memory: what a process keeps between steps, and one line where there is not enough, with the micro-batch to try.

The batch of a step is never changed for the user.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator

import torch

from common.errors import DISK_OR_MEMORY, UserError

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
LARGEST = 32 << 20
"""Bytes: glibc takes no higher limit for what is part of the heap; larger blocks come and go on their own."""
WORDS = ("can't allocate memory", "out of memory", "not enough memory", "Cannot allocate memory")


def keep_freed_memory() -> None:
    """Let glibc keep what is freed, for the next step asks for as much.

    Else it is handed back and fetched again all through a step, and the system clears every page anew: a ninth of the
    time of a step (benchmarks/NOTES.md). Other libraries are left alone, and so is one that the user has set.
    """
    settings = [name for name in os.environ if name.startswith("MALLOC_")]
    if not sys.platform.startswith("linux") or settings or "malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(TRIM_THRESHOLD, 2**31 - 1)
        mallopt(MMAP_THRESHOLD, LARGEST)


def is_oom(error: BaseException) -> bool:
    """Whether an error says that memory ran out: torch has a class for a GPU, and only words for a processor."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in WORDS)


@contextlib.contextmanager
def advise_on_oom(rows: int, batch_size: int) -> Iterator[None]:
    """Turn running out of memory in the body into a line of advice.

    Args:
        rows: windows that a process holds at once.
        batch_size: windows of a whole step, over all processes.

    Raises:
        UserError: naming the micro-batch to try (exit code 6).
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_oom(error):
            raise
        if rows > 1:
            advice = f"try --train.micro_batch_size {rows // 2}, which leaves the step's batch of {batch_size} as it is"
        else:
            advice = "lower model.context or the model's size, or split it among processes by --train.sharding fsdp"
        raise UserError(f"out of memory with {rows} windows at once: {advice}", DISK_OR_MEMORY) from error
